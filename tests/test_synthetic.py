import math
from dataclasses import replace

import pytest
import torch

from saebench.bench.recovery import Recovery, recovery_of_oracle, recovery_of_sae
from saebench.bench.synthetic import (
    SIZES,
    Hierarchy,
    Sample,
    Synthetic,
    SyntheticSettings,
    compensated,
    orthogonalised,
    zipf_probabilities,
)
from saebench.metrics import assignment
from saebench.sae import initialise, new_sae

PLAIN = SyntheticSettings(
    n_features=40, d_in=24, max_probability=0.3, min_probability=0.05, correlation_scale=0.0, orthogonal_steps=0
)
TREE = Hierarchy(n_roots=2, branching=3, depth=2)  # 2 + 6 + 18 features, 8 of them parents
HIERARCHICAL = replace(PLAIN, hierarchy=TREE, correlation_scale=0.1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scores_of(
    W_dec: list, directions: list, fired: list, truth: list, x: list | None = None, x_hat: list | None = None
) -> dict[str, float]:
    """Scores of hand-written latents and features, on hand-written activity."""
    coefficients = torch.tensor(truth, dtype=torch.float32)
    d = len(directions[0])
    rows = torch.tensor(x) if x is not None else torch.arange(len(truth) * d).float().view(len(truth), d)
    recovery = Recovery(torch.tensor(W_dec), torch.tensor(directions))
    estimate = torch.tensor(x_hat) if x_hat is not None else rows
    recovery.add(Sample(rows, coefficients), torch.tensor(fired, dtype=torch.float32), estimate)
    return recovery.scores()


AXES = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
ALL_FIRE = [[1, 1, 1], [1, 0, 0]]


# ---------------------------------------------------------------------------------- scores


def test_a_perfect_dictionary_scores_one_whatever_its_order_and_lengths() -> None:
    permuted = [[0.0, 3.0, 0.0], [0.0, 0.0, 0.5], [2.0, 0.0, 0.0]]
    scores = scores_of(permuted, AXES, [[1, 1, 1], [0, 0, 1]], ALL_FIRE)
    for name in ("f1", "precision", "recall", "mcc", "uniqueness", "signed_mcc", "matched_f1", "mmcs", "recovered"):
        assert scores[name] == pytest.approx(1.0), name
    assert scores["explained_variance"] == 1.0
    assert scores["dead"] == 0
    assert scores["l0"] == scores["true_l0"] == 2


def test_a_flipped_latent_is_no_match_but_for_the_published_mcc() -> None:
    flipped = [[-1.0, 0.0, 0.0], *AXES[1:]]
    scores = scores_of(flipped, AXES, ALL_FIRE, ALL_FIRE)
    assert scores["mcc"] == pytest.approx(1.0)
    for name in ("signed_mcc", "recovered", "mmcs"):
        assert scores[name] == pytest.approx(2 / 3), name


def test_a_dead_latent_is_no_match_but_for_the_published_mcc() -> None:
    scores = scores_of(AXES, AXES, [[1, 1, 0], [1, 0, 0]], ALL_FIRE)
    assert scores["mcc"] == pytest.approx(1.0)
    assert scores["signed_mcc"] == pytest.approx(2 / 3)
    assert scores["dead"] == pytest.approx(1 / 3)
    assert scores["f1"] == scores["matched_f1"] == pytest.approx(2 / 3)


def test_two_latents_for_one_feature_are_not_unique_and_one_of_them_has_to_match_another() -> None:
    twice = [AXES[0], AXES[0], AXES[1]]
    scores = scores_of(twice, AXES, [[1, 1, 1], [1, 1, 0]], ALL_FIRE)
    assert scores["uniqueness"] == pytest.approx(2 / 3)
    assert scores["signed_mcc"] == pytest.approx(2 / 3)  # the second copy gets the third axis, at cosine 0
    assert scores["f1"] == pytest.approx(1.0)  # every latent fires with its nearest feature
    assert scores["recovered"] == pytest.approx(2 / 3)


def test_the_assignment_is_the_best_as_a_whole_not_row_by_row() -> None:
    rows, columns = assignment(torch.tensor([[0.9, 0.8], [0.8, 0.1]]))
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 1), (1, 0)]


def test_f1_counts_what_is_missed_and_what_is_false() -> None:
    # Fires on rows 0, 1, 2; should on 1, 2, 3, 4: 2 hits, 1 false, 2 missed.
    fired, truth = [[1], [1], [1], [0], [0]], [[0], [1], [1], [1], [1]]
    scores = scores_of([[1.0, 0.0]], [[1.0, 0.0]], fired, truth)
    assert scores["precision"] == pytest.approx(2 / 3)
    assert scores["recall"] == pytest.approx(1 / 2)
    assert scores["f1"] == scores["matched_f1"] == pytest.approx(4 / 7)


def test_explained_variance_is_about_the_mean_of_the_rows() -> None:
    x = [[0.0, 0.0], [2.0, 0.0], [4.0, 0.0]]  # Σ‖x - mean‖² = 8
    scores = scores_of([[1.0, 0.0]], [[1.0, 0.0]], [[1]] * 3, [[1]] * 3, x, [[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    assert scores["explained_variance"] == pytest.approx(1 - 2 / 8)


def test_recovered_asks_for_a_cosine_above_nine_tenths() -> None:
    angle = [[0.91, math.sqrt(1 - 0.91**2), 0.0], [0.0, 0.89, math.sqrt(1 - 0.89**2)]]
    scores = scores_of(angle, AXES, [[1, 1], [1, 0]], ALL_FIRE)
    assert scores["recovered"] == pytest.approx(1 / 3)
    assert scores["rare_mmcs"] == pytest.approx(0.89)  # of two features that two latents could hold, the second
    assert scores["rare_recovered"] == 0


def test_scores_do_not_depend_on_how_rows_come_in_batches() -> None:
    data = Synthetic(HIERARCHICAL)
    sample = data.sample(64, generator())
    acts = torch.relu(sample.x @ data.directions_ND[:10].T - 1)
    x_hat = acts @ data.directions_ND[:10]
    whole, parts = (Recovery(data.directions_ND[:10], data.directions_ND) for _ in range(2))
    whole.add(sample, acts, x_hat)
    for rows in (slice(0, 5), slice(5, 64)):
        parts.add(Sample(sample.x[rows], sample.coefficients[rows]), acts[rows], x_hat[rows])
    assert parts.scores() == pytest.approx(whole.scores())


def test_the_oracle_of_full_width_is_perfect() -> None:
    scores = recovery_of_oracle(Synthetic(PLAIN), 40, 2000, generator())
    for name in ("f1", "mcc", "uniqueness", "signed_mcc", "matched_f1", "mmcs", "recovered", "explained_variance"):
        assert scores[name] == pytest.approx(1.0, abs=1e-5), name
    assert scores["rare_f1"] == scores["rare_recovered"] == 1
    assert scores["l0"] == scores["true_l0"]


def test_a_narrow_oracle_loses_what_its_width_leaves_out() -> None:
    scores = recovery_of_oracle(Synthetic(PLAIN), 10, 2000, generator())
    assert scores["f1"] == scores["signed_mcc"] == pytest.approx(1.0)
    assert scores["recovered"] == pytest.approx(10 / 40)
    assert scores["l0"] < scores["true_l0"]
    assert 0.3 < scores["explained_variance"] < 0.95


def test_an_oracle_of_no_or_too_many_latents_is_refused() -> None:
    with pytest.raises(ValueError, match=r"d_sae is 41; expected 1 to n_features = 40 for an oracle"):
        recovery_of_oracle(Synthetic(PLAIN), 41, 10, generator())


def test_an_untrained_sae_scores_low() -> None:
    data = Synthetic(replace(SIZES["mini"], orthogonal_steps=0))
    sae = new_sae("topk", 128, 256, k=6)
    initialise(sae, torch.zeros(128), generator())
    scores = recovery_of_sae(sae, data, 2048, generator(1))
    assert scores["f1"] < 0.1
    assert scores["mcc"] < 0.4
    assert scores["recovered"] == scores["rare_recovered"] == 0
    assert scores["l0"] == pytest.approx(6, abs=0.01)


# ---------------------------------------------------------------------------------- data


def test_zipf_probabilities_run_from_the_largest_to_the_smallest() -> None:
    settings = replace(PLAIN, n_features=4, exponent=1.0, max_probability=0.4, min_probability=0.1)
    # 1, 1/2, 1/3, 1/4 onto [0.1, 0.4]
    assert zipf_probabilities(settings).tolist() == pytest.approx([0.4, 0.2, 0.4 / 3, 0.1])


def test_compensation_of_a_small_tree_by_hand() -> None:
    rates = torch.tensor([0.4, 0.2, 0.1, 0.05])  # one root, two children, one feature outside
    tree = Hierarchy(n_roots=1, branching=2, depth=1)
    # 0.2/0.4 · (1 + 0.1/0.4) and 0.1/0.4 · (1 + 0.2/0.4)
    assert compensated(rates, tree).tolist() == pytest.approx([0.4, 0.625, 0.375, 0.05])
    assert compensated(rates, replace(tree, exclusive=False)).tolist() == pytest.approx([0.4, 0.5, 0.25, 0.05])
    assert compensated(torch.tensor([0.1, 0.2, 0.1]), tree).tolist() == pytest.approx([0.1, 1.0, 1.0])
    assert compensated(rates, None).tolist() == rates.tolist()


def test_independent_features_fire_at_their_rates_with_their_magnitudes() -> None:
    data, n = Synthetic(PLAIN), 20_000
    sample = data.sample(n, generator())
    fires = sample.coefficients > 0
    error = (data.rates_N * (1 - data.rates_N) / n).sqrt()
    # Coefficients below 0 do not fire.
    rates = data.rates_N * torch.special.ndtr(data.mean_N / data.std_N)
    assert ((fires.float().mean(0) - rates).abs() < 4.5 * error).all()
    calm = data.std_N < data.mean_N / 4  # never cut at 0
    counts, sums = fires.sum(0)[calm], sample.coefficients.sum(0)[calm]
    assert ((sums / counts - data.mean_N[calm]).abs() < 4.5 * data.std_N[calm] / counts.sqrt()).all()
    centred = fires.float() - fires.float().mean(0)
    correlation = torch.corrcoef(centred.T).triu(1)
    assert correlation.abs().max() < 5.5 / math.sqrt(n)


def test_rows_are_the_coefficients_times_the_directions_and_the_bias() -> None:
    data = Synthetic(replace(HIERARCHICAL, max_probability=0.06))
    sample = data.sample(100, generator())
    assert (sample.coefficients == 0).all(1).any()  # some rows have no feature at all
    expected = sample.coefficients.double() @ data.directions_ND.double() + data.bias_D.double()
    torch.testing.assert_close(sample.x, expected.float())
    assert data.directions_ND.norm(dim=1).tolist() == pytest.approx([1.0] * 40)
    assert float(data.bias_D.norm()) == pytest.approx(0.5)


def test_correlations_are_those_of_the_copula() -> None:
    settings = replace(PLAIN, n_features=8, correlation_rank=2, correlation_scale=0.5, std_coefficients=(0.0, 0.0))
    data = Synthetic(replace(settings, max_probability=0.5, min_probability=0.4999))
    fires = (data.sample(100_000, generator()).coefficients > 0).double()
    latent = data.loadings_NR.double() @ data.loadings_NR.double().T
    latent.fill_diagonal_(1.0)
    assert latent.triu(1).abs().max() > 0.3
    # P(both above their medians) = 1/4 + arcsin ρ / 2π
    torch.testing.assert_close(fires.T @ fires / len(fires), 0.25 + latent.arcsin() / (2 * math.pi), atol=0.008, rtol=0)


def test_loadings_never_take_all_of_a_feature_s_variance() -> None:
    data = Synthetic(replace(PLAIN, correlation_rank=4, correlation_scale=2.0))
    assert data.loadings_NR.pow(2).sum(1).max() <= 0.99 + 1e-6
    assert data.own_N.min() >= 0.1 - 1e-4


def test_no_child_fires_without_its_parent_nor_beside_a_sibling() -> None:
    coefficients = Synthetic(HIERARCHICAL).sample(8_000, generator()).coefficients
    fires = coefficients > 0
    parents = fires[:, :8]
    children = fires[:, 2:26].view(-1, 8, 3)
    assert children.any()
    assert not (children & ~parents[:, :, None]).any()
    assert children.sum(2).max() == 1


def test_siblings_fire_together_unless_exclusive() -> None:
    data = Synthetic(replace(HIERARCHICAL, hierarchy=replace(TREE, exclusive=False)))
    fires = data.sample(8_000, generator()).coefficients > 0
    children = fires[:, 2:26].view(-1, 8, 3)
    assert not (children & ~fires[:, :8, None]).any()
    assert children.sum(2).max() == 3


def test_features_of_a_tree_without_exclusion_fire_at_their_rates() -> None:
    tree = replace(TREE, exclusive=False)
    settings = replace(PLAIN, hierarchy=tree, std_coefficients=(0.0, 0.0), max_probability=0.4, min_probability=0.01)
    data, n = Synthetic(replace(settings, exponent=1.5)), 40_000
    assert data.drawn_N.max() < 1
    rates = (data.sample(n, generator()).coefficients > 0).float().mean(0)
    assert ((rates - data.rates_N).abs() < 4.5 * (data.rates_N / n).sqrt()).all()


@pytest.mark.parametrize("scaled", [True, False])
def test_children_are_scaled_by_their_parent_over_its_mean(scaled: bool) -> None:
    tree = replace(TREE, scale_children=scaled)
    settings = replace(PLAIN, hierarchy=tree, std_coefficients=(1.0, 0.0), max_probability=0.9, min_probability=0.5)
    coefficients = Synthetic(settings).sample(8_000, generator()).coefficients
    together = (coefficients[:, 0] > 0) & (coefficients[:, 2] > 0)
    correlation = torch.corrcoef(coefficients[together][:, [0, 2]].T)[0, 1]
    assert float(correlation) == pytest.approx(0.7 if scaled else 0.0, abs=0.05)


def test_orthogonalised_rows_are_unit_and_further_apart() -> None:
    rows = torch.nn.functional.normalize(torch.randn(60, 20, generator=generator()), dim=1)
    apart = orthogonalised(rows, 100, 0.01)
    overlap = [(r @ r.T - torch.eye(60)).pow(2).sum() for r in (rows, apart)]
    assert apart.norm(dim=1).tolist() == pytest.approx([1.0] * 60)
    assert overlap[1] < 0.75 * overlap[0]
    assert overlap[1] > 60**2 / 20 - 60 - 1e-3  # the Welch bound
    assert torch.equal(orthogonalised(rows, 0, 0.01), torch.nn.functional.normalize(rows, dim=1))


def test_orthogonalisation_follows_the_gradient_of_its_objective() -> None:
    rows = torch.randn(7, 5, generator=generator())
    rows = torch.nn.functional.normalize(rows, dim=1)
    reference = rows.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([reference], lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        gram = reference @ reference.T
        off = gram - torch.diag(gram.diagonal())
        (off.pow(2).sum() + 7 * (gram.diagonal() - 1).pow(2).sum()).backward()
        optimizer.step()
    expected = torch.nn.functional.normalize(reference.detach(), dim=1)
    torch.testing.assert_close(orthogonalised(rows, 5, 0.01), expected, atol=1e-5, rtol=1e-4)


def test_seeds_decide_constants_and_samples() -> None:
    first, second = Synthetic(HIERARCHICAL), Synthetic(HIERARCHICAL)
    assert torch.equal(first.directions_ND, second.directions_ND)
    assert torch.equal(first.sample(50, generator(3)).x, second.sample(50, generator(3)).x)
    assert not torch.equal(first.sample(50, generator(3)).x, first.sample(50, generator(4)).x)
    other = Synthetic(replace(HIERARCHICAL, seed=7))
    assert not torch.equal(first.directions_ND, other.directions_ND)
    assert not torch.equal(first.std_N, other.std_N)


def test_sizes_have_the_settings_of_synthsaebench() -> None:
    large = SIZES["16k"]
    assert (large.n_features, large.d_in, large.exponent) == (16_384, 768, 0.5)
    assert (large.max_probability, large.min_probability) == (0.4, 5e-4)
    assert (large.correlation_rank, large.correlation_scale) == (25, 0.1)
    assert large.hierarchy == Hierarchy(n_roots=128, branching=4, depth=3, exclusive=True, scale_children=True)
    assert large.hierarchy.n_features() == 128 * (1 + 4 + 16 + 64)
    assert (large.orthogonal_steps, large.orthogonal_lr, large.bias_norm) == (100, 3e-4, 0.5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n_features": 1}, "n_features is 1; expected at least 2"),
        ({"exponent": 0.0}, "exponent is 0.0; expected more than 0"),
        ({"correlation_scale": -0.1}, "correlation_scale is -0.1; expected at least 0"),
        ({"bias_norm": -1.0}, "bias_norm is -1.0; expected at least 0"),
        ({"min_probability": 0.5}, "firing probabilities run from 0.3 to 0.5; expected 0 < min_probability"),
        ({"max_probability": 1.5}, "firing probabilities run from 1.5 to 0.05; expected 0 < min_probability"),
        ({"mean_coefficients": (5.0, 0.0)}, "coefficients have means (5.0, 0.0)"),
        (
            {"hierarchy": Hierarchy(n_roots=2, branching=3, depth=3)},
            "n_features is 40; the hierarchy has 80: add features, or take fewer roots, branches or levels",
        ),
    ],
)
def test_impossible_settings_are_refused(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match="expected|hierarchy") as refused:
        replace(PLAIN, **changed)
    assert message in str(refused.value)


def test_an_impossible_hierarchy_is_refused() -> None:
    with pytest.raises(ValueError, match="hierarchy branching is 1; expected at least 2"):
        Hierarchy(n_roots=2, branching=1)

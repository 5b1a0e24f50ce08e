"""Latents of two SAEs one to one: by hand, scaled and shuffled, sampled; over seeds; on disk."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HOOK, LATENTS, an_sae

from saebench.bench.stability import (
    StabilityConfig,
    figures_of,
    in_words,
    mean_over_latents,
    over_seeds,
    recorded,
    stability,
    table_of,
)
from saebench.index import compare
from saebench.index.compare import one_to_one
from saebench.sae import save_sae
from saebench.store import Store

# As docs/metrics.md has it: the third of the other SAE points almost away from the third of the one.
LEFT = torch.eye(3)
RIGHT = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.8, 0.6], [0.0, 0.6, -0.8]])


def test_the_worked_example() -> None:
    found = one_to_one(LEFT, RIGHT)
    assert (found.left.tolist(), found.right.tolist()) == ([0, 1, 2], [0, 2, 1])
    np.testing.assert_allclose(found.cosines, [1, 0.6, 0.6], atol=1e-6)
    figures = {(each.figure, each.at): each for each in figures_of(found, None, "a", "a ~ b")}
    assert figures["pw_mcc", None].value == pytest.approx(2.2 / 3)
    assert figures["returning", 0.7].value == figures["returning", 0.9].value == pytest.approx(1 / 3)
    assert figures["best_cosine", None].value == pytest.approx(0.8)
    assert figures["pw_mcc", None].low is None  # of three latents
    assert in_words(list(figures.values())) == (
        "One to one, 3 latents have a mean cosine (PW-MCC) of 0.733; 33% of them above 0.7, 33% of them above 0.9."
    )


def test_neither_lengths_nor_order_matter_and_a_flipped_latent_is_no_match() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 16, generator=generator)
    order = torch.randperm(200, generator=generator)
    found = one_to_one(rows, rows[order] * torch.rand(200, 1, generator=generator))
    assert (order[found.right] == torch.from_numpy(found.left)).all()
    np.testing.assert_allclose(found.cosines, 1, atol=1e-6)
    assert one_to_one(rows, -rows).cosines.max() < 0.9


def test_dead_latents_neither_find_nor_are_found() -> None:
    found = one_to_one(LEFT, RIGHT, np.array([True, True, True]), np.array([True, False, True]))
    assert (found.left.tolist(), found.right.tolist()) == ([0, 1], [0, 2])
    assert found.best.tolist() == pytest.approx([1, 0.6, 0, 1, 0.6])
    with pytest.raises(ValueError, match="3 and 0 latents are alive"):
        one_to_one(LEFT, RIGHT, None, np.zeros(3, bool))


def test_of_too_many_latents_a_sample_is_matched_with_all_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(compare, "_CELLS", 400)
    found = one_to_one(rows, rows, seed=3)
    assert found.sampled
    assert len(found.left) == 10
    np.testing.assert_array_equal(found.left, found.right)
    np.testing.assert_array_equal(found.left, one_to_one(rows, rows, seed=3).left)
    assert found.left.tolist() != one_to_one(rows, rows, seed=4).left.tolist()


def test_the_interval_over_seeds() -> None:
    # Without a seed there is one pair: 0.7, 0.6, 0.5; variance 2/3 × 0.02; t = 4.3027 at 2 degrees of freedom.
    mean, low, high = over_seeds(np.array([0.5, 0.6, 0.7]), 3)
    assert (mean, high - mean, mean - low) == pytest.approx((0.6, 0.49682, 0.49682), abs=1e-4)
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        own = generator.normal(size=5)
        pairs = np.array([own[a] + own[b] for a in range(5) for b in range(a + 1, 5)])
        _, low, high = over_seeds(pairs, 5)
        covered += low <= 0 <= high
    assert 930 <= covered <= 970


def test_the_interval_over_latents_covers_the_mean() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(1000):
        _, low, high = mean_over_latents(generator.beta(2, 1, size=100))
        assert low is not None
        assert high is not None
        covered += low <= 2 / 3 <= high
    assert 930 <= covered <= 970
    assert mean_over_latents(np.ones(9)) == (1, None, None)
    # Ten that all come back do not say that all do: 0.025^(1/10) = 0.69150.
    assert mean_over_latents(np.ones(10), share=True) == pytest.approx((1, 0.69150, 1), abs=1e-5)


@pytest.fixture
def run(store: Store, tmp_path: Path) -> Path:
    """Three SAEs that say of themselves that they differ in seed: two of the same latents in another order, and another."""
    saes = [an_sae("relu", store), an_sae("relu", store), an_sae("relu", store, seed=1)]
    order = torch.randperm(LATENTS, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, axis in (("W_enc", 1), ("W_dec", 0), ("b_enc", 0)):
            saes[1].get_parameter(name).copy_(saes[0].get_parameter(name).index_select(axis, order))
    for seed, sae in enumerate(saes):
        identity = {"name": f"relu-seed{seed}", "seed": seed, "architecture": "relu", "order": 0}
        metadata = {"model_name": "m", "hook_name": HOOK, "context_size": 16}
        save_sae(
            sae,
            tmp_path / f"saes/relu-seed{seed}",
            metadata | {"saebench": {"identity": identity, "store": str(store.folder)}},
        )
    return tmp_path


def test_seeds_of_a_run_are_found_and_matched(run: Path) -> None:
    config = StabilityConfig(run=run, device="cpu", rows=2000)
    figures = {(each.sae, each.figure, each.at): each for each in stability(config)}
    of_pairs = {
        pair: {(each.figure, each.at): each for each in found}
        for pair in ((0, 1), (0, 2), (2, 1))  # in either order
        if (found := recorded(run, *(run / f"saes/relu-seed{seed}" for seed in pair)))
    }
    same, other, third = of_pairs.values()
    assert same["returning", 0.9].value == 1.0
    assert same["pw_mcc", None].value == pytest.approx(1.0)
    assert same["encoder_cosine", None].value == pytest.approx(1.0)
    assert same["dead", None].value == pytest.approx(1 / LATENTS)  # the last of each
    assert same["pw_mcc", None].n == LATENTS - 1
    values = [pair["pw_mcc", None].value or 0.0 for pair in (same, other, third)]
    mean = figures["relu-seed0", "pw_mcc", None]
    assert (mean.of, mean.n) == ("3 seeds", 3)
    assert mean.value == pytest.approx(np.mean(values))
    assert mean.low is not None
    assert mean.low < 0.9
    untrained = figures["untrained", "pw_mcc", None].value
    assert untrained is not None
    assert other["pw_mcc", None].value == pytest.approx(untrained, abs=0.05)  # no more than chance has

    heading, *rows = table_of(run)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert next(row for row in rows if row[0] == "relu-seed0 ~ relu-seed1")[1:4] == ["1.000", "1.000", "1.000"]
    assert (len(rows), heading[1]) == (4, "PW-MCC")  # three pairs, and the untrained one
    assert table_of(run / "elsewhere") == []
    written = (run / "bench/stability.json").stat().st_mtime_ns
    assert {(each.sae, each.figure, each.at): each for each in stability(config)} == figures
    assert (run / "bench/stability.json").stat().st_mtime_ns == written  # nothing was found anew
    shutil.copy(run / "saes/relu-seed1/sae_weights.safetensors", run / "saes/relu-seed2/sae_weights.safetensors")
    assert (
        recorded(run, run / "saes/relu-seed0", run / "saes/relu-seed2") is not None
    )  # those of seed 1, which it is now
    again = {(each.sae, each.figure, each.at): each for each in stability(config)}
    assert again["relu-seed0", "pw_mcc", None].value == pytest.approx(1.0)


def test_what_cannot_be_held_against_each_other_is_refused(run: Path) -> None:
    seeds = sorted((run / "saes").iterdir())
    with pytest.raises(
        ValueError, match=r"has no SAEs that differ in seed alone; train some with `saebench train --seed 0,1,2`"
    ):
        stability(StabilityConfig(run=run / "elsewhere", device="cpu"))
    with pytest.raises(ValueError, match="give two or more of one hook with --sae"):
        stability(StabilityConfig(run=run, sae=(seeds[0],), device="cpu"))
    config = json.loads((seeds[0] / "cfg.json").read_text())
    config["metadata"]["hook_name"] = "blocks.0.hook_resid_post"
    (seeds[0] / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"are of different hooks; expected SAEs of one"):
        stability(StabilityConfig(run=run, sae=tuple(seeds[:2]), device="cpu"))
    assert recorded(run, seeds[0], seeds[1]) is None

import tracemalloc

import numpy as np
import pytest
import torch

from saebench.metrics import (
    Sums,
    density_metrics,
    fidelity_metrics,
    loss_and_kl,
    massive_metrics,
    near_duplicates,
    reconstruction_metrics,
    reconstruction_terms,
    resampled,
    total,
    total_variance,
)


def metrics_of(
    x: torch.Tensor,
    x_hat: torch.Tensor,
    l0: torch.Tensor | None = None,
    doc: torch.Tensor | None = None,
    chunk: int = 10**6,
) -> dict:
    sums = Sums()
    zeros = torch.zeros(len(x))
    doc = torch.zeros(len(x), dtype=torch.int64) if doc is None else doc
    for start in range(0, len(x), chunk):
        part = slice(start, start + chunk)
        terms = reconstruction_terms(x[part], x_hat[part], (zeros if l0 is None else l0)[part], zeros[part])
        sums.add(doc[part], {**terms, "vector": x[part]})
    return {name: float(value) for name, value in reconstruction_metrics(total(sums.table())).items()}


def test_reconstruction_metrics_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    x_hat = torch.tensor([[3.0, 0.0], [0.5, 0.0]])
    got = metrics_of(x, x_hat, l0=torch.tensor([2.0, 1.0]))
    assert got["l0"] == 1.5
    assert got["mse"] == (16 + 0.25) / 2
    # mean (2, 2): Σ‖x−x̄‖² = 1 + 4 + 1 + 4
    assert got["fvu"] == pytest.approx(16.25 / 10)
    assert got["explained_variance"] == pytest.approx(1 - 16.25 / 10)
    assert got["cosine"] == pytest.approx((9 / 15 + 1) / 2)
    assert got["l2_ratio"] == pytest.approx((3 / 5 + 0.5) / 2)
    assert got["gamma"] == pytest.approx((9 + 0.25) / (9 + 0.5))


def test_constant_offset_is_not_explained_variance() -> None:
    """Centring per batch hides a constant error; the mean of all rows does not."""
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    offset = torch.tensor([5.0, 0.0, 0.0])
    got = metrics_of(x, x + offset)
    assert got["fvu"] == pytest.approx(2500 / float(((x - x.mean(0)) ** 2).sum()), rel=1e-5)


def test_a_zero_reconstruction_has_cosine_zero_and_no_nan() -> None:
    got = metrics_of(torch.ones(3, 2), torch.zeros(3, 2))
    assert (got["cosine"], got["l2_ratio"]) == (0.0, 0.0)
    assert np.isnan(got["gamma"])  # 0/0: no value, and written as null


@pytest.mark.parametrize("scale", [1e-3, 7.0, 1e4])
def test_ratios_do_not_change_with_the_scale_of_the_model(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(50, 4, generator=generator) + 3, torch.randn(50, 4, generator=generator)
    one, other = metrics_of(x, x + 0.1 * noise), metrics_of(scale * x, scale * (x + 0.1 * noise))
    for name in ("fvu", "gamma", "cosine", "l2_ratio"):
        assert other[name] == pytest.approx(one[name], rel=1e-5)
    assert other["mse"] == pytest.approx(one["mse"] * scale**2, rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_batches_of_any_size_give_the_same_figures(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(50, 4, generator=generator) + 3, torch.randn(50, 4, generator=generator)
    doc = torch.randint(0, 5, (50,), generator=generator)
    assert metrics_of(x, x + noise, doc=doc, chunk=chunk) == pytest.approx(metrics_of(x, x + noise, doc=doc), rel=1e-12)


def test_loss_and_kl_by_hand_and_without_underflow() -> None:
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    want = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    clean, other = p.log().expand(2, 2), q.log().expand(2, 2) + 7.0  # logits need not be normalised
    loss, kl = loss_and_kl(clean, other, torch.tensor([0, 1]))
    assert kl.tolist() == pytest.approx([want, want], rel=1e-6)
    assert loss.tolist() == pytest.approx([-np.log(0.9), -np.log(0.1)], rel=1e-6)
    ends = torch.tensor([[0.0, -200.0]]), torch.tensor([[0.0, -400.0]])
    assert torch.isfinite(loss_and_kl(*ends, torch.tensor([0]))[1]).all()
    random = torch.randn(6, 5).log_softmax(-1), torch.randn(6, 5)
    assert loss_and_kl(*random, torch.zeros(6, dtype=torch.int64))[1].min() >= 0


def test_figures_with_massive_rows_are_those_of_all_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=generator).double() + 1.0
    x[:3] *= 200
    x_hat = x + torch.randn(x.shape, generator=generator)
    terms = {
        "rows": 47.0, "squared_norm": float(x[3:].pow(2).sum()), "vector": x[3:].sum(0).numpy(),
        "squared_error": float((x - x_hat)[3:].pow(2).sum()), "massive_rows": 3.0,
        "massive_norm": float(x[:3].pow(2).sum()), "massive_vector": x[:3].sum(0).numpy(),
        "massive_error": float((x - x_hat)[:3].pow(2).sum()),
    }  # fmt: skip
    found = massive_metrics(terms)
    spread = (x - x.mean(0)).pow(2).sum(1)
    assert found["fvu_all"] == pytest.approx(float((x - x_hat).pow(2).sum() / spread.sum()))
    assert found["massive_share"] == pytest.approx(float(spread[:3].sum() / spread.sum()))
    without = massive_metrics({name: value for name, value in terms.items() if "massive" not in name})
    own = float((x - x_hat)[3:].pow(2).sum() / (x[3:] - x[3:].mean(0)).pow(2).sum())
    assert (without["fvu_all"], without["massive_share"]) == (pytest.approx(own), pytest.approx(0.0))


SUMS = {
    "positions": 10.0,
    "ce_clean": 20.0,
    "ce_spliced": 22.0,
    "ce_zero": 60.0,
    "ce_mean": 40.0,
    "kl": 1.0,
    "kl_zero": 50.0,
}


def test_fidelity_by_hand() -> None:
    got = {name: float(value) for name, value in fidelity_metrics({k: np.float64(v) for k, v in SUMS.items()}).items()}
    assert got == pytest.approx({
        "ce_clean": 2.0, "ce_spliced": 2.2, "ce_zero": 6.0, "ce_mean": 4.0, "delta_ce": 0.2,
        "loss_recovered_zero": 38 / 40, "loss_recovered_mean": 18 / 20, "kl": 0.1, "kl_zero": 5.0, "kl_score": 49 / 50,
    })  # fmt: skip


def test_loss_recovered_is_never_clipped() -> None:
    got = fidelity_metrics({k: np.float64(v) for k, v in {**SUMS, "ce_spliced": 19.0}.items()})
    assert got["loss_recovered_zero"] > 1
    got = fidelity_metrics({k: np.float64(v) for k, v in {**SUMS, "ce_spliced": 90.0}.items()})
    assert got["loss_recovered_zero"] < 0


def test_sums_are_kept_per_document_whatever_the_order() -> None:
    sums = Sums()
    sums.add(torch.tensor([7, 3, 7]), {"a": torch.tensor([1.0, 2.0, 3.0])})
    sums.add(torch.tensor([9, 3]), {"a": torch.tensor([4.0, 5.0]), "v": torch.tensor([[1.0, 0.0], [0.0, 1.0]])})
    table = sums.table()
    by_document = {doc: float(table["a"][place]) for doc, place in sums.index.items()}
    assert by_document == {3: 7.0, 7: 4.0, 9: 4.0}
    assert table["v"][sums.index[7]].tolist() == [0.0, 0.0]
    assert total(table)["v"].tolist() == [1.0, 1.0]


def test_a_batch_is_read_from_the_device_once_however_many_documents_and_quantities(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU each read waits for what was begun before it."""
    reads: list[tuple[int, ...]] = []
    copy = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: reads.append(tuple(tensor.shape)) or copy(tensor))
    monkeypatch.setattr(torch.Tensor, "__int__", lambda _: pytest.fail("a number was read alone"))
    sums = Sums()
    sums.add(torch.arange(1000) % 500, {"a": torch.ones(1000), "v": torch.ones(1000, 3)})
    sums.add(torch.arange(0), {"a": torch.ones(0), "v": torch.ones(0, 3)})
    assert reads == [(500, 5), (0, 5)]
    table = sums.table()
    assert [table[name].shape for name in ("a", "v")] == [(500,), (500, 3)]
    assert all((column == 2.0).all() for column in table.values())


def test_bootstrap_resamples_documents_whole() -> None:
    """Numerator and denominator move together: a ratio that is the same in every document has no spread."""
    table = {"n": np.array([1.0, 10.0, 100.0]), "d": np.array([2.0, 20.0, 200.0])}
    samples = resampled([table], 500, seed=0)[0]
    assert np.allclose(samples["n"] / samples["d"], 0.5)
    assert samples["n"].std() > 0


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        table = {"n": rng.normal(3.0, 1.0, 40), "d": np.ones(40)}
        samples = resampled([table], 400, seed=1)[0]
        low, high = np.quantile(samples["n"] / samples["d"], (0.025, 0.975))
        covered += low <= 3.0 <= high
    assert 0.88 <= covered / 200 <= 0.98


def test_all_tables_see_the_same_samples_however_many_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    tables = [{"n": rng.normal(size=300), "v": rng.normal(size=(300, 4))}, {"n": rng.normal(size=300)}]
    whole = resampled(tables, 50, seed=3)
    draws = np.random.default_rng(3).multinomial(300, np.full(300, 1 / 300), size=50).astype(np.float64)
    assert np.array_equal(whole[0]["v"], draws @ tables[0]["v"])
    monkeypatch.setattr("saebench.metrics._DRAWS", 7 * 300)
    parts = resampled(tables, 50, seed=3)
    for one, other in zip(whole, parts, strict=True):
        assert {name: values.shape for name, values in other.items()} == {name: v.shape for name, v in one.items()}
        assert all(np.allclose(other[name], values, rtol=1e-12, atol=1e-12) for name, values in one.items())


def test_the_bootstrap_of_many_documents_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, 20 samples of 100,000 documents would be 16 MB, and as much again in float64."""
    monkeypatch.setattr("saebench.metrics._DRAWS", 2 * 10**5)
    table = {"n": np.ones(10**5)}
    tracemalloc.start()
    found = resampled([table], 20, seed=0)[0]["n"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.tolist() == [1e5] * 20
    assert peak < 6e6


def test_total_variance_of_resamples_recentres() -> None:
    x = torch.tensor([[0.0], [0.0], [4.0], [4.0]])
    sums = Sums()
    sums.add(torch.tensor([0, 0, 1, 1]), {"rows": torch.ones(4), "squared_norm": (x**2).sum(1), "vector": x})
    assert float(total_variance(total(sums.table()))) == 16.0
    samples = resampled([sums.table()], 50, seed=0)[0]
    assert set(np.round(total_variance(samples), 9)) == {0.0, 16.0}


def test_documents_may_come_in_any_order() -> None:
    generator = torch.Generator().manual_seed(0)
    doc, x = torch.arange(60) // 6 * 3, torch.randn(60, generator=generator, dtype=torch.float64)
    drawn = []
    for order in (torch.arange(60), torch.randperm(60, generator=generator)):
        sums = Sums()
        for part in order.split(7):
            sums.add(doc[part], {"x": x[part], "vector": x[part, None]})
        drawn.append(resampled([sums.table()], 20, seed=0)[0])
    for name in ("x", "vector"):
        np.testing.assert_allclose(drawn[1][name], drawn[0][name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_rows_that_are_all_the_same_have_no_variance(scale: float) -> None:
    row = torch.randn(64, generator=torch.Generator().manual_seed(0)) * scale
    x = row.expand(5000, 64) * (1 + 1e-7 * torch.randn(5000, 1, generator=torch.Generator().manual_seed(1)))
    sums = Sums()
    columns = {"rows": torch.ones(5000), "squared_norm": x.double().pow(2).sum(1), "vector": x}
    sums.add(torch.arange(5000) % 7, columns)
    assert float(total_variance(total(sums.table()))) == 0
    x = x * (1 + 1e-4 * torch.randn(5000, 64, generator=torch.Generator().manual_seed(2)))  # as little as float16 tells
    sums = Sums()
    sums.add(torch.arange(5000) % 7, {**columns, "squared_norm": x.double().pow(2).sum(1), "vector": x})
    want = float((x.double() - x.double().mean(0)).pow(2).sum())
    assert float(total_variance(total(sums.table()))) == pytest.approx(want, rel=1e-3)


def test_density_by_hand() -> None:
    got = density_metrics(torch.tensor([0, 1, 2, 50]), 100)
    assert got == {
        "dense_fraction": 0.5, "dense_fraction_10": 0.25,
        "dense_share_of_firing": 52 / 53, "dense_share_of_firing_10": 50 / 53,
    }  # fmt: skip


def test_near_duplicates_are_counted_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """By direction, whatever their lengths; opposite ones are none."""
    rows = torch.eye(6, 8)
    rows = torch.cat([rows, 3 * rows[:1], -rows[1:2], rows[2:3] + 0.1 * rows[3:4], rows[4:5] + 0.2 * rows[5:6]])
    assert near_duplicates(rows) == 4  # 0 and its multiple, 2 and what is 0.995 along it
    monkeypatch.setattr("saebench.metrics._PAIRS", 30)
    assert near_duplicates(rows) == 4

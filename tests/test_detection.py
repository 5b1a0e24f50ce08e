"""The bench of labels: single latents held against what a labeller says of tokens."""

from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from saebench.bench.detection import PythonConfig, _figures, bench_python, best_latents
from saebench.bench.results import Figure, as_rate, drawn_interval
from saebench.files import read_json


def columns(*rows: list[int]) -> sparse.csr_array:
    return sparse.csr_array(np.array(rows, bool))


def test_the_worked_example_of_the_docs() -> None:
    # Documents 0 and 1 choose, 2 and 3 score. The label holds on two rows of each pair.
    fires = columns([1, 1], [1, 0], [0, 1], [0, 1], [1, 1], [0, 0], [1, 0], [0, 0])
    holds = columns([1], [1], [0], [0], [1], [1], [0], [0]).tocsc()
    chosen, documents = np.arange(8) < 4, np.array([0, 0, 1, 1, 2, 2, 3, 3])
    best, f1 = best_latents(fires[:4], holds.tocsr()[:4])
    assert (best.tolist(), f1.tolist()) == ([0], [1.0])  # the second has 2·1/(3 + 2)
    config = PythonConfig(run=Path("r"), resamples=200)
    label, mean, found, surely = _figures(config, "a", ["x"], fires, holds, np.ones(8, bool), chosen, documents)
    assert (label.of, label.value, label.n) == ("x", 0.5, 2)  # 2·1/(2 + 2), though the second latent has 2/3 there
    assert label.low is None  # of two documents
    assert (mean.value, found.value, surely.value) == (0.5, 0.0, 0.0)


def half(n: int, without: int = 0) -> list[Figure]:
    """Of a label on one row of each of n documents of either half, which its latent finds in the odd ones; and of documents that have neither."""
    there = np.arange(2 * (n + without)) < 2 * n
    fires = sparse.csr_array((there & (np.arange(len(there)) // 2 % 2 == 0))[:, None])
    documents, chosen = np.arange(len(there)), np.arange(len(there)) % 2 == 0
    config = PythonConfig(run=Path("r"), resamples=500)
    return _figures(
        config, "a", ["x"], fires, sparse.csc_array(there[:, None]), np.ones(len(there), bool), chosen, documents
    )


def test_intervals_are_students_of_the_documents_that_there_is_anything_in() -> None:
    """Of n documents h are found: F1 = 2h/(n + h), and so of each sample, whose h is binomial."""
    for n, without in ((9, 0), (9, 40)):
        assert [(each.low, each.high) for each in half(n, without)] == [(None, None)] * 4
    for without in (0, 30):
        label, mean, found, surely = half(10, without)
        assert (label.value, label.n, label.low, label.high) == (pytest.approx(2 / 3), 10, mean.low, mean.high)
        assert (found.value, surely.value) == (1, 0)
        assert label.low is not None
        assert label.value is not None
        # By the delta method sd of 2h/(n + h) is 2n/(n + h)² √2.5 = 0.1405; t(9) = 2.262, √(10/9) = 1.054.
        assert label.value - label.low == pytest.approx(2.262 * 1.054 * 0.1405, rel=0.15)
    assert drawn_interval(0.5, np.array([0.4, 0.6] * 50), 10) == pytest.approx((0.5 - 0.23965, 0.5 + 0.23965), abs=1e-4)
    assert drawn_interval(0.1, np.array([0.4, 0.6] * 50), 10)[0] == 0  # a share is no less
    assert drawn_interval(0.5, np.array([0.4, 0.6] * 50), 9) == (None, None)


def test_what_all_documents_have_or_none_is_not_certain() -> None:
    assert as_rate(0.0, 0.0, 0.0, 10) == (0, pytest.approx(0.30850, abs=1e-5))  # 1 − 0.025^(1/10)
    assert as_rate(1.0, 1.0, 1.0, 10) == (pytest.approx(0.69150, abs=1e-5), 1)
    assert as_rate(0.5, 0.4, 0.6, 10) == (0.4, 0.6)
    assert as_rate(0.0, None, None, 9) == (None, None)
    generator, held, alone = np.random.default_rng(0), 0, 0
    for _ in range(1000):  # a share of 0.05, of which 36 in 100 draws of 20 documents have none
        rate = float(generator.binomial(20, 0.05) / 20)
        ends = drawn_interval(rate, generator.binomial(20, rate, size=200) / 20, 20)
        low, high = as_rate(rate, *ends, 20)
        assert low is not None
        assert high is not None
        held += low <= 0.05 <= high
        alone += ends[0] <= 0.05 <= ends[1]
    assert held > 930
    assert alone < 700


def of_all(figures: list[Figure], name: str) -> float:
    (value,) = (each.value for each in figures if (each.sae, each.of, each.figure) == (name, "all", "f1"))
    assert value is not None
    return value


def test_oracle_sae_and_untrained_rank_as_they_must(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = PythonConfig(
        run=tmp_path, sae=(run / "saes/topk-k4",), store=run.parent.parent / "store", labeller="tokens", resamples=20, least=10, device="cpu",
    )  # fmt: skip
    figures = bench_python(config)
    (said,) = (text for text in caplog.messages if "for an interval" in text)
    assert said.startswith("too few documents of the second half (under 10) for an interval: all, ")
    assert all(each.low is None for each in figures if each.of == "all" and each.sae != "oracle")
    untrained = next(each.sae for each in figures if each.sae.startswith("untrained"))
    assert 1.0 == of_all(figures, "oracle") > of_all(figures, "topk-k4") > of_all(figures, untrained)
    before = (tmp_path / "bench/python.json").read_bytes()
    assert bench_python(config) == figures
    assert (tmp_path / "bench/python.json").read_bytes() == before
    units = read_json(tmp_path / "bench/python.json")["units"]
    assert len(units) == 4
    # Paired: the mean over labels is the difference of the means.
    (excess,) = (Figure(*row) for row in units["differences"]["figures"])
    assert (excess.sae, excess.of, excess.figure) == ("topk-k4", "excess", "f1")
    assert excess.value == pytest.approx(of_all(figures, "topk-k4") - of_all(figures, untrained))
    assert excess.low is not None
    assert excess.low > 0
    assert excess in figures
    with pytest.raises(ValueError, match="no label of 'python' holds on 50 rows in 3 documents of either half of"):
        bench_python(PythonConfig(run=tmp_path, sae=config.sae, store=config.store, device="cpu"))

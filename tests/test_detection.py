"""The bench of labels: single latents held against what a labeller says of tokens."""

from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from saebench.bench.detection import PythonConfig, _figures, bench_python, best_latents
from saebench.bench.results import Figure
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
    assert (label.low, label.high) == (0.0, pytest.approx(2 / 3))  # of samples 2-2, 2-3 and 3-3
    assert (mean.value, found.value, surely.value) == (0.5, 0.0, 0.0)


def of_all(figures: list[Figure], name: str) -> float:
    (value,) = (each.value for each in figures if (each.sae, each.of, each.figure) == (name, "all", "f1"))
    assert value is not None
    return value


def test_oracle_sae_and_untrained_rank_as_they_must(run: Path, tmp_path: Path) -> None:
    config = PythonConfig(
        run=tmp_path, sae=(run / "saes/topk-k4",), store=run.parent.parent / "store", labeller="tokens", resamples=20, least=10, device="cpu",
    )  # fmt: skip
    figures = bench_python(config)
    untrained = next(each.sae for each in figures if each.sae.startswith("untrained"))
    assert 1.0 == of_all(figures, "oracle") > of_all(figures, "topk-k4") > of_all(figures, untrained)
    before = (tmp_path / "bench/python.json").read_bytes()
    assert bench_python(config) == figures
    assert (tmp_path / "bench/python.json").read_bytes() == before
    assert len(read_json(tmp_path / "bench/python.json")["units"]) == 3
    with pytest.raises(ValueError, match="no label of 'python' holds on 50 rows in 3 documents of either half of"):
        bench_python(PythonConfig(run=tmp_path, sae=config.sae, store=config.store, device="cpu"))

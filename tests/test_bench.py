"""Benches: their results on disk, and as a table."""

from pathlib import Path

import pytest

from saebench.bench.results import Figure, Results
from saebench.printed import show_figures


def test_results_are_kept_a_unit_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "bench/probes.json"
    results = Results(path, "probes")
    found = [Figure("a", "all", "auc", 1.0, 0.5, 0.4, 0.6, 3), Figure("a", "all", "auc", 4.0, None)]
    assert results.get("a", {"seed": 0}) is None
    assert results.put("a", {"seed": 0}, found) == found
    again = Results(path, "probes")
    assert again.get("a", {"seed": 0}) == found
    assert list(again.units()) == [("a", {"seed": 0}, found)]
    assert again.get("a", {"seed": 1}) is None
    again.put("a", {"seed": 1}, found[:1])
    assert list(Results(path, "probes").units()) == [("a", {"seed": 1}, found[:1])]


def test_results_of_another_bench_are_left_alone(tmp_path: Path) -> None:
    Results(tmp_path / "x.json", "probes").put("a", {}, [])
    with pytest.raises(
        ValueError, match=r"has results of 'probes', version 1; expected 'absorption', version 1: move it away"
    ):
        Results(tmp_path / "x.json", "absorption")


def test_figures_as_a_table() -> None:
    shown = show_figures(
        [
            Figure("a", "all", "auc", 1.0, 0.5, 0.4, 0.6, 3),
            Figure("a", "all", "auc", 4.0, None, n=3),
            Figure("pca", "all", "auc", 1.0, 0.25, n=3),
        ]
    )
    assert shown.splitlines() == [
        "SAE  of                 auc at 1  auc at 4  n",
        "---------------------------------------------",
        "a    all  0.500 (0.400 to 0.600)         –  3",
        "pca  all                   0.250         –  3",
    ]

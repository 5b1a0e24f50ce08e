"""The bench of known features: on data small enough for seconds."""

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_gradients import one_thread

from saebench.bench import ground_truth
from saebench.bench.ground_truth import PRESETS, Preset, SyntheticConfig, bench_synthetic
from saebench.bench.results import Figure, Results, mean_interval, over_seeds
from saebench.bench.synthetic import Synthetic, SyntheticSettings
from saebench.cli import main

__all__ = ["one_thread"]

SMALL = SyntheticSettings(
    n_features=24, d_in=16, max_probability=0.25, min_probability=0.05, correlation_rank=2, orthogonal_steps=50
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "mini", Preset(SMALL, 16, 60_000, 3, 4096))


def config(out: Path, **options: Any) -> SyntheticConfig:
    return SyntheticConfig(out=out, **{"arch": ("topk", "gated"), "batch": 200, "device": "cpu", "lr": 1e-2} | options)


def value(figures: list[Figure], sae: str, name: str) -> float:
    (found,) = (figure.value for figure in figures if (figure.sae, figure.figure) == (sae, name))
    assert found is not None
    return found


def test_the_oracle_ranks_first_and_the_untrained_last(tmp_path: Path) -> None:
    figures = bench_synthetic(config(tmp_path))
    for name in ("f1", "signed_mcc", "matched_f1"):
        scores = {sae: value(figures, sae, name) for sae in ("oracle", "topk", "gated", "untrained")}
        assert scores["oracle"] == pytest.approx(1.0) == max(scores.values())
        assert scores["untrained"] == min(scores.values())
    assert value(figures, "oracle", "mcc") == pytest.approx(1.0)
    assert bench_synthetic(config(tmp_path)) == figures  # nothing is done again
    (tmp_path / "bench/synthetic.json").unlink()
    assert bench_synthetic(config(tmp_path)) == figures  # and all of it alike


def test_stopped_it_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bench_synthetic(config(tmp_path / "whole", arch=("topk",)))
    sample, left = Synthetic.sample, iter([*range(100), signal.SIGINT])

    def interrupted(self: Synthetic, *args: Any) -> Any:
        if next(left, None) is signal.SIGINT:
            signal.raise_signal(signal.SIGINT)
        return sample(self, *args)

    monkeypatch.setattr(Synthetic, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench_synthetic(config(tmp_path / "cut", arch=("topk",)))
    assert (tmp_path / "cut/bench/synthetic-mini-seed0/checkpoint.json").exists()
    assert bench_synthetic(config(tmp_path / "cut", arch=("topk",))) == whole
    assert not (tmp_path / "cut/bench/synthetic-mini-seed0/checkpoint.json").exists()


def test_seeds_give_an_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--arch", "topk", "--samples", "4000", "--batch", "200", "--device", "cpu", "--lr", "0.01"]
    assert main(["bench", "synthetic", "--out", str(tmp_path), "--seed", "0,1,2", *options]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("topk"))
    assert " to " in line
    assert line.endswith("  3")
    assert mean_interval([1.0, 2.0]) == (None, None)
    low, high = mean_interval([1.0, 2.0, 3.0])
    assert (low, high) == (pytest.approx(2 - 4.3027 / 3**0.5, abs=1e-3), pytest.approx(2 + 4.3027 / 3**0.5, abs=1e-3))


def test_units_that_differ_in_more_than_their_seed_are_not_averaged(tmp_path: Path) -> None:
    results = Results(tmp_path / "x.json", "synthetic")
    for l0, value in ((6, 0.8), (12, 0.4)):
        for seed in range(3):
            name = f"mini-topk-l0-{l0}-seed{seed}"
            figure = Figure("topk", "synthetic", "f1", None, value + seed / 100)
            results.put(name, {"name": name, "seed": seed, "l0": l0}, [figure])
    for store in "ab":  # as of two stores
        results.put(f"{store} · all", {"store": store}, [Figure("PCA", "all", "auc", 1.0, 0.5)])
    assert [(each.sae, each.n, each.value and round(each.value, 4)) for each in over_seeds(results)] == [
        ("PCA (a · all)", 0, 0.5),
        ("PCA (b · all)", 0, 0.5),
        ("topk (mini-topk-l0-12)", 3, 0.41),
        ("topk (mini-topk-l0-6)", 3, 0.81),
    ]


def test_published_rows_stand_beside_those_of_the_same_setting() -> None:
    rows = ground_truth._published(SyntheticConfig(out=Path("x"), preset="16k"), PRESETS["16k"])
    assert value(rows, "matryoshka (published)", "f1") == 0.879
    assert ground_truth._published(SyntheticConfig(out=Path("x")), replace_l0(25)) == []


def replace_l0(l0: int) -> Preset:
    return PRESETS["mini"]._replace(l0=l0, data=replace(SMALL, seed=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 10}, "samples is 10; expected at least 200"),
        ({"arch": ()}, "arch is empty; expected one or more of"),
    ],
)
def test_impossible_settings_are_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)

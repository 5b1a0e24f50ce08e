"""What is told apart: paired differences, seeds, lines at equal L0."""

import math
from typing import Any

import numpy as np
import pytest

from saebench.evaluate.compare import (
    LEAST_DOCUMENTS,
    Evaluated,
    Reseeding,
    difference,
    half_of,
    least_differences,
    over_seeds,
    recipes,
    seed_spread,
    undecided,
)
from saebench.evaluate.frontiers import at_equal_l0
from saebench.evaluate.tables import equal_l0_tables, seed_table
from saebench.metrics import reconstruction_metrics, resampled, total

RNG = np.random.default_rng(0)


def entry(name: str, l0: float, fvu: float, *, draws: Any = None, sample: str = "s", **more: Any) -> Evaluated:
    known = {
        "name": name, "path": name, "architecture": "topk", "kind": "SAE", "writes": ["a"], "d_sae": 8, "l0": l0, "fvu": fvu, "baselines": {},
    }  # fmt: skip
    return Evaluated(
        known | more,
        {} if draws is None else {"fvu": np.asarray(draws, dtype=float), "l0": np.full(len(draws), l0)},
        sample,
    )


# ------------------------------------------------------------------------------------------- differences


def test_a_difference_is_paired_by_bootstrap_samples() -> None:
    hard = RNG.normal(size=1000)  # what both share
    own = RNG.normal(size=(2, 1000)) * 0.01
    one, other = recipes(
        [entry("a", 8, 0.5, draws=0.5 + hard + own[0]), entry("b", 8, 0.45, draws=0.45 + hard + own[1])]
    )
    found = difference(one, other, "fvu", None)
    assert found is not None
    assert found.value == pytest.approx(0.05)
    assert found.half == pytest.approx(1.96 * np.std(own[0] - own[1], ddof=1), rel=1e-4)
    assert found.told_apart  # though each alone is ± 2
    # Spread of reseeding adds to it: one seed on either side.
    seeded = difference(one, other, "fvu", Reseeding(0.03, 10**6))
    assert seeded is not None
    assert seeded.half == pytest.approx(1.96 * math.hypot(found.half / 1.96, 0.03 * math.sqrt(2)), rel=1e-4)
    assert not seeded.told_apart


def test_what_was_evaluated_on_other_documents_is_not_paired() -> None:
    one, other, unsampled = recipes(
        [entry("a", 8, 0.5, draws=[1, 2]), entry("b", 8, 0.5, draws=[1, 2], sample="t"), entry("c", 8, 0.5)]
    )
    assert difference(one, other, "fvu", None) is None
    assert difference(one, unsampled, "fvu", None) is None
    assert difference(one, one, "kl", None) is None
    assert least_differences([one, other, unsampled]) == {}


def test_rankings_that_cannot_be_told_are_marked() -> None:
    noise = RNG.normal(size=(4, 500)) * 0.01
    values = {"best": 0.1, "close": 0.105, "far": 0.3, "elsewhere": 0.3}
    found = recipes(
        entry(name, 8, fvu, draws=fvu + noise[i], writes=["b" if name == "elsewhere" else "a"])
        for i, (name, fvu) in enumerate(values.items())
    )
    assert undecided(found, "fvu") == {"close"}
    assert least_differences(found)["fvu"] == pytest.approx(1.96 * 0.01 * math.sqrt(2), rel=0.1)


def test_least_differences_are_of_every_column() -> None:
    noise = RNG.normal(size=(2, 500)) * 0.01
    one, other = (
        entry(name, 8, 0.1, draws=0.1 + noise[i], gamma=0.9, dead_fraction=0.2, recipe=name)
        for i, name in enumerate("ab")
    )
    one.draws["gamma"], other.draws["gamma"] = 0.9 + noise
    assert set(least_differences(recipes([one, other]))) == {"l0", "fvu", "gamma"}
    # What no documents decide is told by seeds alone: two of each, with Student's t of two degrees of freedom.
    seeds = [
        sae._replace(entry=sae.entry | {"path": f"{sae.entry['path']}{dead}", "dead_fraction": dead})
        for sae in (one, other)
        for dead in (0.1, 0.2)
    ]
    found = least_differences(recipes(seeds))
    assert found["dead_fraction"] == pytest.approx(4.302653 * math.sqrt(0.005))
    assert "dense_fraction" not in found


def test_what_was_evaluated_on_another_store_is_not_ranked_beside_it() -> None:
    noise = RNG.normal(size=(4, 500)) * 0.01
    points = (("a", 0.10, "s"), ("random", 0.102, "t"), ("b", 0.104, "s"), ("random2", 0.3, "t"))
    found = recipes(
        entry(name, 8, fvu, draws=fvu + noise[i], evaluated_on=store) for i, (name, fvu, store) in enumerate(points)
    )
    assert undecided(found, "fvu") == {"b"}
    saes = [
        entry(f"{a}{l0}{store}", l0, fvu + (store == "t"), architecture=a, evaluated_on=store, store=store)
        for store in "st"
        for a, l0, fvu in (("x", 8, 0.3), ("x", 32, 0.2), ("y", 8, 0.4), ("y", 32, 0.3))
    ]
    one, other = at_equal_l0(saes)
    assert [each["figures"]["fvu"]["x"]["values"][0] for each in (one, other)] == [0.3, 1.3]
    assert [rows[0][0] for rows in equal_l0_tables([one, other])] == ["FVU at equal L0, s", "FVU at equal L0, t"]
    # A folder whose rows are others by now is told apart by the hash.
    grown = at_equal_l0([sae._replace(entry=sae.entry | {"store": "folder"}) for sae in saes])
    assert [each["store"] for each in grown] == ["folder as of s", "folder as of t"]


def test_what_was_trained_on_fewer_rows_or_elsewhere_is_a_line_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    def saes(name: str, rows: int | None, *l0s: float) -> list[Evaluated]:
        return [
            entry(f"{name}{l0}", l0, 0.5 - 0.1 * math.log2(l0 / 8), architecture="x", tokens_trained=rows) for l0 in l0s
        ]

    (found,) = at_equal_l0([*saes("long", 2000, 8, 32), *saes("short", 1000, 8, 16), *saes("theirs", None, 8, 64)])
    assert list(found["figures"]["fvu"]) == ["x, 2,000 rows", "x, 1,000 rows", "x, made elsewhere"]
    assert at_equal_l0(saes("alone", 2000, 8, 32)) == []
    assert not caplog.records
    assert at_equal_l0([*saes("long", 2000, 8, 16), *saes("short", 1000, 32, 64)]) == []
    assert "no L0 is common to the SAEs of a with 8 latents" in caplog.text
    assert "x, 1,000 rows 32.0 to 64.0; x, 2,000 rows 8.0 to 16.0" in caplog.text


def test_seeds_are_one_recipe() -> None:
    seeds = [
        entry(f"x-seed{i}", 8 + i, fvu, recipe="r", draws=[fvu, fvu + 0.1]) for i, fvu in enumerate((0.1, 0.2, 0.3))
    ]
    found = recipes([*seeds, entry("y", 9, 0.5, recipe="q", draws=[0.5, 0.7])])
    assert [len(recipe.members) for recipe in found] == [3, 1]
    assert found[0].mean("fvu") == pytest.approx(0.2)
    assert found[0].spread("fvu") == pytest.approx(0.1)
    assert found[0].draws("fvu") == pytest.approx([0.2, 0.3])
    assert found[1].spread("fvu") is None
    assert seed_spread(found, "fvu") == (pytest.approx(0.1), 2)
    assert seed_spread(found[1:], "fvu") is None
    (row,) = over_seeds(found)
    assert (row["name"], row["seeds"], row["l0"]) == ("x", 3, [9.0, 1.0])
    assert seed_table([row])[1][:4] == ["x", "3", "9.0 ± 1.0", "0.2000 ± 0.1000"]


@pytest.mark.parametrize("documents", [LEAST_DOCUMENTS, 100])
def test_intervals_cover_the_truth(documents: int) -> None:
    """Of 1,000 draws of documents from one law, 93 to 97% of 95% intervals hold the truth: of FVU, and of a paired difference."""
    resamples, draws = 200, 1000
    rng = np.random.default_rng(1)
    shape = (documents, draws)
    rows = rng.poisson(200, shape) + 20.0
    hard = rng.lognormal(0, 0.3, shape)  # what a document's variance is
    errors = [rows * hard * rng.lognormal(math.log(share), 0.2, shape) for share in (0.10, 0.11)]
    norms = rows * hard
    # The means of lognormals: e^{m + s²/2}; errors and norms share all else.
    truths = [share * math.exp(0.02) for share in (0.10, 0.11)]
    covered = {"fvu": 0, "difference": 0}
    for k in range(draws):
        tables = [{"squared_error": e[:, k], "squared_norm": norms[:, k], "rows": rows[:, k], "vector": np.zeros((documents, 1)),
                   **dict.fromkeys(("l0", "l1", "squared_norm_hat", "dot", "cosine", "norm_ratio"), rows[:, k])} for e in errors]  # fmt: skip
        sampled = resampled(
            [{n: t[n] for n in ("squared_error", "squared_norm", "rows")} for t in tables], resamples, k
        )
        fvus = [sums["squared_error"] / sums["squared_norm"] for sums in sampled]
        values = [float(reconstruction_metrics(total(t))["fvu"]) for t in tables]
        half = half_of(float(np.var(fvus[0], ddof=1)), documents)
        covered["fvu"] += abs(values[0] - truths[0]) <= half
        drawn = [entry(name, 8, v, draws=d) for name, v, d in zip("ab", values, fvus, strict=True)]
        one, other = recipes(one._replace(documents=documents) for one in drawn)
        found = difference(one, other, "fvu", None)
        assert found is not None
        covered["difference"] += bool(abs(found.value - (truths[0] - truths[1])) <= found.half)
    assert all(930 <= n <= 970 for n in covered.values()), covered


@pytest.mark.parametrize("n_seeds", [2, 3])
def test_equal_recipes_of_few_seeds_are_told_apart_in_five_of_a_hundred_draws(n_seeds: int) -> None:
    """By lines through two L0s, too; what documents add is small and known."""
    rng, told = np.random.default_rng(n_seeds), {"difference": 0, "line": 0}
    draws = 200
    for _ in range(draws):
        saes = [
            entry(f"{a}{l0}-seed{i}", l0, f := 0.4 + 0.05 * rng.normal(), recipe=f"{a}{l0}", architecture=a, draws=f + np.zeros(2))
            for a in ("topk", "relu")
            for l0 in (16.0, 64.0)
            for i in range(n_seeds)
        ]  # fmt: skip
        found = recipes(saes)
        one, other = found[0], found[2]
        apart = difference(one, other, "fvu", seed_spread([one, other], "fvu"))
        assert apart is not None
        told["difference"] += apart.told_apart
        (compared,) = at_equal_l0(saes)
        told["line"] += any(line["behind"] > line["behind_half"] for line in compared["figures"]["fvu"].values())
    assert all(0.02 * draws <= n <= 0.085 * draws for n in told.values()), told


def test_samples_without_a_value_make_no_interval_and_no_error() -> None:
    """As where few documents have a loss."""
    gaps = np.array([0.1, np.nan, 0.2])
    saes = [
        entry(f"{a}{l0}", l0, 0.3 + l0 / 100, draws=gaps, architecture=a)
        for a in ("topk", "relu")
        for l0 in (8.0, 32.0)
    ]
    assert difference(*recipes(saes)[:2], "fvu", None) is None
    assert least_differences(recipes(saes)).keys() == {"l0"}
    (found,) = at_equal_l0(saes)
    assert found["figures"]["fvu"]["relu"]["halves"] == [None] * len(found["l0s"])
    assert found["figures"]["fvu"]["topk"]["behind_half"] is None


# ------------------------------------------------------------------------------------------- lines at equal L0


def test_an_sae_that_never_fires_is_in_no_line() -> None:
    saes = [
        entry(f"{a}{l0}", l0, 1 / l0, architecture=a, baselines={"pca_fvu": 2 / l0})
        for a in ("topk", "relu")
        for l0 in (8.0, 32.0)
    ]
    dead = entry("dead", 0.0, 1.0, architecture="relu", baselines={"pca_fvu": 1.0})
    assert at_equal_l0([*saes, dead]) == at_equal_l0(saes)


@pytest.mark.parametrize("l0", [math.exp(2.7715), 15.7, 16.0, 31.99])
def test_of_equal_l0s_the_best_alone_is_on_a_line(l0: float) -> None:
    saes = [entry("best", l0 * (1 - 1e-7), 0.39), entry("worse", l0 * (1 + 1e-7), 0.9), entry("end", 64.0, 0.2)]
    others = [entry(f"g{at}", at, 0.95, architecture="gated") for at in (10.0, 60.0)]
    (found,) = at_equal_l0([*saes, *others])
    assert found["l0s"][0] == pytest.approx(l0)
    assert found["figures"]["fvu"]["topk"]["values"][0] == pytest.approx(0.39)


def test_lines_are_compared_where_their_l0s_overlap() -> None:
    def sae(architecture: str, l0: float, fvu: float, pca: float = 0.5, kind: str = "SAE") -> Evaluated:
        name = f"{architecture}{l0}{kind}"
        return entry(
            name, l0, fvu, architecture=architecture, kind=kind, baselines={"pca_fvu": pca, "untrained_fvu": 0.9}
        )

    saes = [sae("relu", 10.0, 0.4), sae("relu", 1000.0, 0.2), sae("topk", 100.0, 0.1), sae("topk", 1.0, 0.3)]
    (found,) = at_equal_l0(saes)
    assert [round(l0, 3) for l0 in found["l0s"]] == [10.0, 16.0, 32.0, 64.0, 100.0]
    # In log L0, 10 is halfway between 1 and 100, and 100 is halfway between 10 and 1000; two points make a straight line.
    lines = found["figures"]["fvu"]
    assert lines["topk"]["values"][0] == pytest.approx(0.2)
    assert lines["topk"]["values"][2] == pytest.approx(0.3 - 0.1 * math.log10(32))
    assert lines["relu"]["values"][-1] == pytest.approx(0.3)
    # Means over the range: of straight lines the values in their middle.
    assert lines["topk"]["mean"] == pytest.approx(0.15)
    assert lines["relu"]["mean"] == pytest.approx(0.35)
    assert (lines["topk"]["behind"], lines["relu"]["behind"]) == (0.0, pytest.approx(0.2))
    assert lines["topk"]["excess"] == pytest.approx(0.5 - 0.15)
    assert "behind" not in lines["PCA of rank L0"]
    control = [entry(f"c{l0}", l0, 0.6, control="frozen-decoder") for l0 in (1.0, 100.0)]
    (held,) = at_equal_l0([*saes[2:], *control])  # one line, and what it must beat
    assert held["figures"]["fvu"]["topk"]["excess"] == pytest.approx(0.5 - held["figures"]["fvu"]["topk"]["mean"])
    assert at_equal_l0(saes[:3]) == []  # one TopK alone: nothing is extrapolated
    assert at_equal_l0([sae("relu", 1.0, 0.4), sae("relu", 2.0, 0.3), *saes[2:3], sae("topk", 50.0, 0.2)]) == []
    table, *_ = equal_l0_tables([found])
    assert table[0] == ["FVU at equal L0", "L0 10.0", "L0 16.0", "L0 32.0", "L0 64.0", "L0 100.0", "mean", "behind the best", "beyond baselines"]  # fmt: skip
    assert [row[0] for row in table[1:]] == ["relu", "topk", "PCA of rank L0", "untrained SAE"]
    assert table[2][-3:] == ["0.1500", "best", "0.3500"]
    assert table[1][-2] == "0.2000"
    # Another hook is another comparison, and another kind another line.
    kinds = [sae("topk", 10.0, 0.4, kind="transcoder"), sae("topk", 30.0, 0.1, kind="transcoder")]
    (both,) = at_equal_l0([*saes[2:], *kinds])
    assert {"topk", "topk transcoder", "untrained SAE", "untrained transcoder"} <= set(both["figures"]["fvu"])
    assert at_equal_l0([*saes[2:], *(one._replace(entry=one.entry | {"writes": ["b"]}) for one in kinds)]) == []


def test_lines_carry_their_intervals_and_controls_are_baselines() -> None:
    noise = RNG.normal(size=(4, 300)) * 0.01
    points = [("topk", 10, 0.30), ("topk", 40, 0.20), ("gated", 10, 0.302), ("gated", 40, 0.202)]
    saes = [entry(f"{a}{l0}", l0, fvu, draws=fvu + noise[i], architecture=a) for i, (a, l0, fvu) in enumerate(points)]
    controls = [entry(f"c{l0}", l0, fvu, control="frozen-decoder") for l0, fvu in ((10, 0.5), (40, 0.4))]
    (found,) = at_equal_l0([*saes, *controls])
    lines = found["figures"]["fvu"]
    assert lines["topk"]["halves"][0] == pytest.approx(1.96 * np.std(noise[0], ddof=1), rel=1e-4)
    assert lines["gated"]["behind"] == pytest.approx(0.002)
    means = (noise[0] + noise[1] - noise[2] - noise[3]) / 2
    assert lines["gated"]["behind_half"] == pytest.approx(1.96 * np.std(means, ddof=1), rel=1e-4)
    assert lines["topk"]["excess"] == pytest.approx(0.2)
    assert "behind" not in lines["topk frozen-decoder"]
    assert next(row for row in equal_l0_tables([found])[0] if row[0] == "gated")[-2].startswith("≈ 0.0020 ±")


def test_a_line_is_monotone_between_its_points() -> None:
    saes = [
        entry(f"{a}{l0}", l0, fvu, architecture=a) for a in ("x", "y") for l0, fvu in ((8, 0.5), (16, 0.1), (64, 0.09))
    ]
    (found,) = at_equal_l0(saes)
    values = found["figures"]["fvu"]["x"]["values"]
    assert values == sorted(values, reverse=True)
    assert min(values) == pytest.approx(0.09)

"""Which differences between dictionaries are more than chance: paired over documents, over seeds, and between lines at equal L0.

Every dictionary of a store is evaluated on the same documents and on the same bootstrap samples of them, so that the difference of two
figures, sample by sample, has the spread of the difference itself, in which what makes a document hard for both cancels. P points of a line,
R bootstrap samples.
"""

import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy.interpolate import PchipInterpolator

from saebench.files import replacing

DRAWS = "bootstrap.safetensors"
FIGURES = {
    "fvu": "FVU",
    "delta_ce": "ΔCE",
    "kl": "KL",
    "loss_recovered_zero": "rec. (zero)",
    "loss_recovered_mean": "rec. (mean)",
}
"""what is compared, with its heading"""
BASELINES = {
    "pca_fvu": "PCA of rank L0",
    "linear_fvu": "best linear map",
    "untrained_fvu": "untrained SAE",
    "neurons_fvu": "model's neurons",
}
"""name in a dictionary's `baselines`, and its label"""
L0S = (16.0, 32.0, 64.0)
"""where lines are compared, as far as all of them reach"""
_WIDE = 1.959963984540054  # standard errors either way that hold 95% of a normal distribution
_APART = 0.05  # of log L0, between an end of the common range and one of L0S


def higher_is_better(figure: str) -> bool:
    """Whether more of a figure is better."""
    return figure.startswith("loss_recovered")


# ------------------------------------------------------------------------------------------- what is kept of an evaluation


def write_draws(folder: Path, draws: dict[str, Float[np.ndarray, " R"]], sample: dict[str, Any]) -> None:
    """Keep the figures of every bootstrap sample beside `evaluation.json`; `sample` is what decides the documents and their samples."""
    with replacing(folder / DRAWS) as path:
        save_file(draws, path, {"sample": json.dumps(sample, sort_keys=True)})


class Evaluated(NamedTuple):
    """A dictionary's entry in `summary.json`, and its figures on every bootstrap sample."""

    entry: dict[str, Any]
    draws: dict[str, Float[np.ndarray, " R"]]
    """none of an evaluation of before they were kept, or of a single document"""
    sample: str
    """equal where samples are the same"""


def evaluated(entry: dict[str, Any], folder: Path) -> Evaluated:
    """With what is kept in the dictionary's directory."""
    if not (folder / DRAWS).exists():
        return Evaluated(entry, {}, "")
    with safe_open(folder / DRAWS, "np") as file:
        return Evaluated(entry, {name: file.get_tensor(name) for name in file.keys()}, file.metadata()["sample"])  # noqa: SIM118


# ------------------------------------------------------------------------------------------- differences


@dataclass(frozen=True)
class Recipe:
    """Dictionaries that differ in the seed of their training alone, and what a figure of theirs is known to."""

    members: tuple[Evaluated, ...]

    @property
    def first(self) -> dict[str, Any]:
        """The entry of one of them."""
        return self.members[0].entry

    def mean(self, figure: str) -> float | None:
        """Over the seeds; None where one has none."""
        values = [one.entry.get(figure) for one in self.members]
        return None if None in values else statistics.fmean(value for value in values if value is not None)

    def spread(self, figure: str) -> float | None:
        """Standard deviation over seeds, of two or more."""
        values = [one.entry[figure] for one in self.members if one.entry.get(figure) is not None]
        return statistics.stdev(values) if len(values) > 1 else None

    def draws(self, figure: str) -> Float[np.ndarray, " R"] | None:
        """Means over the seeds, of every bootstrap sample."""
        found = [one.draws.get(figure) for one in self.members]
        if any(draws is None for draws in found) or len({one.sample for one in self.members}) > 1:
            return None
        return np.mean([draws for draws in found if draws is not None], axis=0)


def recipes(every: Iterable[Evaluated]) -> list[Recipe]:
    """Those that differ in their seed alone, together."""
    groups: dict[str, list[Evaluated]] = {}
    for one in every:
        groups.setdefault(one.entry.get("recipe") or one.entry["path"], []).append(one)
    return [Recipe(tuple(members)) for members in groups.values()]


def seed_spread(found: Sequence[Recipe], figure: str) -> float | None:
    """Standard deviation over seeds, pooled over the recipes that have several; None where none has."""
    squares = [
        (len(recipe.members) - 1, spread**2) for recipe in found if (spread := recipe.spread(figure)) is not None
    ]
    freedom = sum(n for n, _ in squares)
    return math.sqrt(sum(n * square for n, square in squares) / freedom) if freedom else None


class Difference(NamedTuple):
    """Of two figures."""

    value: float
    half: float
    """half of its 95% interval"""

    @property
    def told_apart(self) -> bool:
        """Whether 0 lies outside the interval."""
        return abs(self.value) > self.half


def difference(one: Recipe, other: Recipe, figure: str, reseeding: float | None) -> Difference | None:
    """one − other, its standard error that of the paired bootstrap and, where `reseeding` (`seed_spread`) is known, of as many seeds as there are.

    None where they were not evaluated on the same samples of the same documents, or one has no such figure.
    """
    values, draws = (one.mean(figure), other.mean(figure)), (one.draws(figure), other.draws(figure))
    if values[0] is None or values[1] is None or draws[0] is None or draws[1] is None:
        return None
    if one.members[0].sample != other.members[0].sample:
        return None
    seeds = (reseeding or 0.0) ** 2 * (1 / len(one.members) + 1 / len(other.members))
    error = math.sqrt(float(np.var(draws[0] - draws[1], ddof=1)) + seeds)
    return Difference(values[0] - values[1], _WIDE * error)


def comparable(found: Sequence[Recipe]) -> list[list[Recipe]]:
    """Recipes by what they write: no others are compared."""
    groups: dict[tuple[str, ...], list[Recipe]] = {}
    for recipe in found:
        groups.setdefault(tuple(recipe.first["writes"]), []).append(recipe)
    return list(groups.values())


def undecided(found: Sequence[Recipe], figure: str) -> set[str]:
    """Paths of those that cannot be told from the next better one that writes the same hooks."""
    unclear: set[str] = set()
    for group in comparable(found):
        ranked = [(mean, recipe) for recipe in group if (mean := recipe.mean(figure)) is not None]
        ranked.sort(key=lambda pair: pair[0], reverse=higher_is_better(figure))
        reseeding = seed_spread(group, figure)
        for (_, better), (_, worse) in itertools.pairwise(ranked):
            apart = difference(worse, better, figure, reseeding)
            if apart is not None and not apart.told_apart:
                unclear |= {one.entry["path"] for one in worse.members}
    return unclear


def least_differences(found: Sequence[Recipe]) -> dict[str, float]:
    """For each figure the smallest difference that these documents and seeds can tell from none: the median over pairs of what `Difference.half` is."""
    least: dict[str, float] = {}
    for figure in FIGURES:
        halves = [
            apart.half
            for group in comparable(found)
            for one, other in itertools.combinations(group, 2)
            if (apart := difference(one, other, figure, seed_spread(group, figure))) is not None
        ]
        if halves:
            least[figure] = statistics.median(halves)
    return least


# ------------------------------------------------------------------------------------------- lines at equal L0


class _Line(NamedTuple):
    """Figures of one architecture and kind, or of a baseline, over L0."""

    log_l0s: Float[np.ndarray, " P"]
    values: Float[np.ndarray, " P"]
    draws: Float[np.ndarray, "P R"] | None
    sample: str
    is_baseline: bool

    def through(self, do: Callable[[PchipInterpolator], Any]) -> tuple[float, Float[np.ndarray, " R"] | None]:
        """Something of the curve through the points (monotone between them), and the same of every bootstrap sample."""
        value = float(do(PchipInterpolator(self.log_l0s, self.values)))
        return value, None if self.draws is None else do(PchipInterpolator(self.log_l0s, self.draws, axis=0))


def at_equal_l0(every: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """Architectures and baselines that write the same hooks at the same width, where their L0s overlap.

    One entry for each such group: `hook`, `d_sae`, `l0s`, and `figures`: for each figure and line the `values` at these L0s with
    halves of their 95% intervals (`halves`); the `mean` over the range of log L0, which is the area under the line by its length;
    how far that is `behind` the best trained line (0 for itself), with `behind_half`; and its `excess` over the best baseline.

    Monotone cubic interpolation on log L0 (Fritsch and Carlson 1980), nothing extrapolated: a line needs two L0s, a group two lines of dictionaries, controls among them. Seeds
    are averaged first. L0 itself is taken as known: over documents it varies little.
    """
    groups: dict[tuple[str, int], list[Recipe]] = {}
    for recipe in recipes(every):
        groups.setdefault(("+".join(recipe.first["writes"]), recipe.first["d_sae"]), []).append(recipe)
    found = []
    for (hook, d_sae), group in groups.items():
        lines = {figure: _lines(group, figure) for figure in FIGURES}
        own = {line_of(recipe.first) for recipe in group} & lines["fvu"].keys()
        low = max((line.log_l0s[0] for line in lines["fvu"].values()), default=math.inf)
        high = min((line.log_l0s[-1] for line in lines["fvu"].values()), default=0.0)
        if len(own) < 2 or low >= high:
            continue
        inside = [l0 for l0 in L0S if low + _APART < math.log(l0) < high - _APART]
        l0s = [math.exp(low), *inside, math.exp(high)]
        reseeding = {figure: seed_spread(group, figure) for figure in FIGURES}
        figures = {
            figure: _compared(lines[figure], np.array([low, *np.log(inside), high]), figure, reseeding[figure])
            for figure in FIGURES
            if lines[figure]
        }
        found.append({"hook": hook, "d_sae": d_sae, "l0s": l0s, "figures": figures})
    return found


def _lines(group: Sequence[Recipe], figure: str) -> dict[str, _Line]:
    """Those that have two L0s and more; of equal L0s the best."""
    names = dict.fromkeys(line_of(recipe.first) for recipe in group)
    members = {name: [recipe for recipe in group if line_of(recipe.first) == name] for name in names}
    found = {}
    for name, own in members.items():
        points = [(recipe.mean("l0"), recipe.mean(figure), recipe) for recipe in own]
        known = [(l0, value, recipe) for l0, value, recipe in points if l0 and value is not None]
        if len(best := _best_by_l0(known, figure)) < 2:
            continue
        draws = [recipe.draws(figure) for *_, recipe in best]
        samples = {one.sample for *_, recipe in best for one in recipe.members}
        paired = (
            None if None in map(_length, draws) or len(samples) > 1 else np.stack([d for d in draws if d is not None])
        )
        log_l0s, values = np.log([l0 for l0, *_ in best]), np.array([value for _, value, _ in best])
        found[name] = _Line(log_l0s, values, paired, samples.pop(), bool(own[0].first.get("control")))
    if figure == "fvu":
        found |= _baseline_lines(group)
    return found


def _baseline_lines(group: Sequence[Recipe]) -> dict[str, _Line]:
    found = {}
    for name, label in BASELINES.items():
        for kind in dict.fromkeys(recipe.first["kind"] for recipe in group if name in recipe.first["baselines"]):
            entries = [r.first for r in group if r.first["kind"] == kind and name in r.first["baselines"]]
            points = sorted({entry["l0"]: entry["baselines"][name] for entry in entries}.items())
            if len(points) > 1:
                l0s, fvus = np.array(points).T
                found[label.replace("SAE", kind)] = _Line(np.log(l0s), fvus, None, "", True)
    return found


def _length(draws: np.ndarray | None) -> int | None:
    return None if draws is None else len(draws)


def _best_by_l0(points: list[tuple[float, float, Recipe]], figure: str) -> list[tuple[float, float, Recipe]]:
    """In the order of L0; of those whose L0 is equal to a thousandth the best alone."""
    sign = -1 if higher_is_better(figure) else 1
    best: dict[float, tuple[float, float, Recipe]] = {}
    for point in sorted(points, key=lambda point: sign * point[1]):
        best.setdefault(round(math.log(point[0]), 3), point)
    return [best[l0] for l0 in sorted(best)]


def _compared(
    lines: dict[str, _Line], log_l0s: Float[np.ndarray, " L"], figure: str, reseeding: float | None
) -> dict[str, dict[str, Any]]:
    """The entry of each line of a figure."""
    low, high = float(log_l0s[0]), float(log_l0s[-1])
    sign = 1 if higher_is_better(figure) else -1
    lines = {name: line for name, line in lines.items() if line.log_l0s[0] <= low and line.log_l0s[-1] >= high}
    means = {
        name: line.through(lambda curve: curve.integrate(low, high) / (high - low)) for name, line in lines.items()
    }
    trained = [name for name, line in lines.items() if not line.is_baseline]
    others = [name for name, line in lines.items() if line.is_baseline]
    best = max(trained, key=lambda name: sign * means[name][0], default=None)
    reference = max((sign * means[name][0] for name in others), default=None)
    found = {}
    for name, line in lines.items():
        at = [line.through(lambda curve, log_l0=log_l0: curve(log_l0)) for log_l0 in log_l0s]
        entry: dict[str, Any] = {
            "values": [value for value, _ in at],
            "halves": [None if draws is None else _WIDE * float(np.std(draws, ddof=1)) for _, draws in at],
            "mean": means[name][0],
        }
        if best is not None and name in trained:
            entry["behind"] = sign * (means[best][0] - means[name][0])
            entry["behind_half"] = _half(line, lines[best], means[name][1], means[best][1], reseeding)
            if reference is not None:
                entry["excess"] = sign * means[name][0] - reference
        found[name] = entry
    return found


def _half(
    line: _Line, best: _Line, draws: np.ndarray | None, best_draws: np.ndarray | None, reseeding: float | None
) -> float | None:
    """Half of the 95% interval of a difference of means; the seeds of the points of a line are taken to be independent."""
    if draws is None or best_draws is None or line.sample != best.sample:
        return None
    seeds = (reseeding or 0.0) ** 2 * (1 / len(line.values) + 1 / len(best.values))
    return _WIDE * math.sqrt(float(np.var(draws - best_draws, ddof=1)) + seeds)


def line_of(entry: dict[str, Any]) -> str:
    """What a line of a comparison is of: an architecture, its kind, and the constraint under which it was trained."""
    parts = [entry["architecture"], "" if entry["kind"] == "SAE" else entry["kind"], entry.get("control") or ""]
    return " ".join(part for part in parts if part)


def equal_l0_tables(comparisons: list[dict[str, Any]]) -> list[list[list[str]]]:
    """For each group and figure headings and rows, a line a row."""
    return [
        _equal_l0_table(comparison, figure) for comparison in comparisons for figure in ("fvu", "delta_ce") if figure in comparison["figures"]
    ]  # fmt: skip


def _equal_l0_table(comparison: dict[str, Any], figure: str) -> list[list[str]]:
    lines = comparison["figures"][figure]
    heading = [
        f"{FIGURES[figure]} at equal L0",
        *(f"L0 {l0:.1f}" for l0 in comparison["l0s"]),
        "mean",
        "behind the best",
    ]
    beyond = any("excess" in entry for entry in lines.values())
    rows = [heading + ["beyond baselines"] * beyond]
    for name, entry in lines.items():
        cells = [
            f"{value:.4f}" + ("" if half is None else f" ±{half:.4f}")
            for value, half in zip(entry["values"], entry["halves"], strict=True)
        ]
        rows.append(
            [name, *cells, f"{entry['mean']:.4f}", _behind(entry)]
            + [f"{entry['excess']:.4f}" if "excess" in entry else "—"] * beyond
        )
    return rows


def _behind(entry: dict[str, Any]) -> str:
    if "behind" not in entry:
        return "—"
    if entry["behind"] == 0:
        return "best"
    half = entry["behind_half"]
    unclear = "≈ " if half is not None and entry["behind"] <= half else ""
    return f"{unclear}{entry['behind']:.4f}" + ("" if half is None else f" ±{half:.4f}")


def over_seeds(found: Sequence[Recipe]) -> list[dict[str, Any]]:
    """`name`, `seeds` and, for L0 and each figure, [mean, standard deviation over seeds] of every recipe that has several."""
    return [
        {
            "name": recipe.first["name"].rsplit("-seed", 1)[0],
            "seeds": len(recipe.members),
            **{figure: [recipe.mean(figure), recipe.spread(figure)] for figure in ("l0", *FIGURES)},
        }
        for recipe in found
        if len(recipe.members) > 1
    ]


def seed_table(entries: list[dict[str, Any]]) -> list[list[str]]:
    """Of the entries of `over_seeds` headings and rows."""
    rows = [["mean ± deviation over seeds", "seeds", "L0", *FIGURES.values()]]
    for entry in entries:
        cells = [_spread(entry[figure], 1 if figure == "l0" else 4) for figure in ("l0", *FIGURES)]
        rows.append([entry["name"], str(entry["seeds"]), *cells])
    return rows


def _spread(figure: list[float | None], digits: int) -> str:
    mean, spread = figure
    return "—" if mean is None or spread is None else f"{mean:.{digits}f} ± {spread:.{digits}f}"

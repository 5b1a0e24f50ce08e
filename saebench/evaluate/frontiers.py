"""Architectures, kinds and baselines as lines over L0: where they are at equal L0, and the areas between them.

P points of a line, R bootstrap samples, L places that lines are compared at.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from saebench.evaluate.compare import (
    BASELINES,
    FIGURES,
    Evaluated,
    Recipe,
    Reseeding,
    baseline_figure,
    half_of,
    higher_is_better,
    recipes,
    seed_spread,
)

_log = logging.getLogger(__name__)

L0S = (16.0, 32.0, 64.0)
"""where lines are compared, as far as all of them reach"""
_APART = 0.05  # of log L0, between an end of the common range and one of L0S
_EQUAL = 0.001


class _Line(NamedTuple):
    """Figures of one architecture and kind, or of a baseline, over L0."""

    log_l0s: Float[np.ndarray, " P"]
    values: Float[np.ndarray, " P"]
    draws: Float[np.ndarray, "P R"] | None
    sample: str
    is_baseline: bool
    seeds: Float[np.ndarray, " P"] | None = None
    """behind each point"""
    documents: int | None = None

    def through(self, do: Callable[[Any], Any]) -> tuple[float, Float[np.ndarray, " R"] | None]:
        """Something of the curve through the points (SciPy's, monotone between them), and the same of every bootstrap sample."""
        value = float(do(_curve(self.log_l0s, self.values)))
        return value, None if self.draws is None else do(_curve(self.log_l0s, self.draws))

    def over_seeds(self, do: Callable[[Any], Any], value: float, spread: float) -> float:
        """Variance of what has this value, were each point trained with other seeds, to first order."""
        assert self.seeds is not None
        moved = self.values[:, None] + np.diag(spread / np.sqrt(self.seeds))  # a column for each point that is off
        return float(((do(_curve(self.log_l0s, moved)) - value) ** 2).sum())


def _curve(log_l0s: np.ndarray, values: np.ndarray) -> Any:
    from scipy.interpolate import PchipInterpolator  # most commands can do without its half a second

    return PchipInterpolator(log_l0s, values, axis=0)


def at_equal_l0(every: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """Architectures and baselines that write the same hooks of the same store at the same width, where their L0s overlap.

    One entry for each such group: `hook`, `d_sae`, `store`, `l0s`, and `figures`: for each figure and line the `values` at these L0s with
    halves of their 95% intervals (`halves`); the `mean` over the range of log L0, which is the area under the line by its length;
    how far that is `behind` the best trained line (0 for itself), with `behind_half`; and its `excess` over the best baseline.

    Monotone cubic interpolation on log L0 (Fritsch and Carlson 1980), nothing extrapolated: a line needs two L0s, a group two lines of dictionaries, controls among them. What was
    trained on fewer rows, or elsewhere, is a line of its own. Seeds are averaged first. L0 itself is taken as known: over documents it varies little.
    """
    groups: dict[tuple[str, int, str | None], list[Recipe]] = {}
    places = {(one.entry.get("store"), one.entry.get("evaluated_on")) for one in every}
    for recipe in recipes(every):
        first = recipe.first
        groups.setdefault(("+".join(first["writes"]), first["d_sae"], first.get("evaluated_on")), []).append(recipe)
    found = []
    for (hook, d_sae, on), group in groups.items():
        lines = {figure: _lines(group, figure) for figure in FIGURES}
        own = set(_names_of_lines(group)) & lines["fvu"].keys()
        low = max((line.log_l0s[0] for line in lines["fvu"].values()), default=math.inf)
        high = min((line.log_l0s[-1] for line in lines["fvu"].values()), default=0.0)
        if len(own) < 2:
            continue
        if low >= high:
            reach = "; ".join(f"{name} {_reach(lines['fvu'][name])}" for name in sorted(own))
            _log.warning(
                "no L0 is common to the SAEs of %s with %s latents, which are not compared at equal L0: %s",
                hook,
                f"{d_sae:,}",
                reach,
            )
            continue
        inside = [l0 for l0 in L0S if low + _APART < math.log(l0) < high - _APART]
        l0s = [math.exp(low), *inside, math.exp(high)]
        reseeding = {figure: seed_spread(group, figure) for figure in FIGURES}
        figures = {
            figure: _compared(lines[figure], np.array([low, *np.log(inside), high]), figure, reseeding[figure])
            for figure in FIGURES
            if lines[figure]
        }
        store = group[0].first.get("store")
        if sum(there == store for there, _ in places) > 1:
            store = f"{store} as of {str(on)[:8]}"  # by its hash: it has grown, or was made anew, since
        found.append({"hook": hook, "d_sae": d_sae, "store": store, "l0s": l0s, "figures": figures})
    return found


def _lines(group: Sequence[Recipe], figure: str) -> dict[str, _Line]:
    """Those that have two L0s and more; of equal L0s the best."""
    members: dict[str, list[Recipe]] = {}
    for name, recipe in zip(_names_of_lines(group), group, strict=True):
        members.setdefault(name, []).append(recipe)
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
        seeds = np.array([len(recipe.members) for *_, recipe in best], np.float64)
        documents = own[0].members[0].documents
        found[name] = _Line(log_l0s, values, paired, samples.pop(), bool(own[0].first.get("control")), seeds, documents)
    return found | _baseline_lines(group, figure)


def _baseline_lines(group: Sequence[Recipe], figure: str) -> dict[str, _Line]:
    found = {}
    for name, label in BASELINES.items():
        values = [(r.first, baseline_figure(r.first, name, figure)) for r in group if r.first["l0"]]
        known = [(entry, value) for entry, value in values if value is not None]
        for kind in dict.fromkeys(entry["kind"] for entry, _ in known):
            points = sorted({entry["l0"]: value for entry, value in known if entry["kind"] == kind}.items())
            if len(points) > 1:
                l0s, values = np.array(points).T
                found[label.replace("SAE", kind)] = _Line(np.log(l0s), values, None, "", True)
    return found


def _length(draws: np.ndarray | None) -> int | None:
    return None if draws is None else len(draws)


def _best_by_l0(points: list[tuple[float, float, Recipe]], figure: str) -> list[tuple[float, float, Recipe]]:
    """In the order of L0; of those whose L0 is equal to a thousandth the best alone."""
    better = max if higher_is_better(figure) else min
    alike: list[list[tuple[float, float, Recipe]]] = []
    for point in sorted(points, key=lambda point: point[0]):
        if alike and point[0] <= alike[-1][0][0] * (1 + _EQUAL):
            alike[-1].append(point)
        else:
            alike.append([point])
    return [better(group, key=lambda point: point[1]) for group in alike]


def _compared(
    lines: dict[str, _Line], log_l0s: Float[np.ndarray, " L"], figure: str, reseeding: Reseeding | None
) -> dict[str, dict[str, Any]]:
    """The entry of each line of a figure."""
    low, high = float(log_l0s[0]), float(log_l0s[-1])
    sign = 1 if higher_is_better(figure) else -1
    lines = {name: line for name, line in lines.items() if line.log_l0s[0] <= low and line.log_l0s[-1] >= high}

    def mean(curve: Any) -> Any:
        return curve.integrate(low, high) / (high - low)

    means = {name: line.through(mean) for name, line in lines.items()}
    trained = [name for name, line in lines.items() if not line.is_baseline]
    others = [name for name, line in lines.items() if line.is_baseline]
    best = max(trained, key=lambda name: sign * means[name][0], default=None)
    reference = max((sign * means[name][0] for name in others), default=None)
    found = {}
    for name, line in lines.items():
        at = [line.through(lambda curve, log_l0=log_l0: curve(log_l0)) for log_l0 in log_l0s]
        entry: dict[str, Any] = {
            "values": [value for value, _ in at],
            "halves": [
                None if draws is None else half_of(float(np.var(draws, ddof=1)), line.documents) for _, draws in at
            ],
            "mean": means[name][0],
        }
        if best is not None and name in trained:
            entry["behind"] = sign * (means[best][0] - means[name][0])
            entry["behind_half"] = _half(name, best, lines, means, mean, reseeding)
            if reference is not None:
                entry["excess"] = sign * means[name][0] - reference
        found[name] = entry
    return found


def _half(
    one: str,
    other: str,
    lines: Mapping[str, _Line],
    means: Mapping[str, tuple[float, Float[np.ndarray, " R"] | None]],
    mean: Callable[[Any], Any],
    reseeding: Reseeding | None,
) -> float | None:
    """Half of the 95% interval of a difference of means; the seeds of the points of a line are taken to be independent."""
    draws, other_draws = means[one][1], means[other][1]
    if draws is None or other_draws is None or lines[one].sample != lines[other].sample:
        return None
    spread, freedom = reseeding or Reseeding(0.0, 0)
    seeds = sum(lines[name].over_seeds(mean, means[name][0], spread) for name in (one, other))
    return half_of(float(np.var(draws - other_draws, ddof=1)), lines[one].documents, seeds, freedom)


def _names_of_lines(group: Sequence[Recipe]) -> list[str]:
    """Of each recipe what its line is of: an architecture, its kind, and the constraint under which it was trained; and
    on how many rows, where that is not the same for all of these."""
    names, rows = [], [recipe.first.get("tokens_trained") for recipe in group]
    for entry in (recipe.first for recipe in group):
        parts = [entry["architecture"], "" if entry["kind"] == "SAE" else entry["kind"], entry.get("control") or ""]
        names.append(" ".join(part for part in parts if part))
    trained = {name: {n for other, n in zip(names, rows, strict=True) if other == name} for name in names}
    return [
        name if len(trained[name]) == 1 else f"{name}, {'made elsewhere' if n is None else f'{n:,} rows'}"
        for name, n in zip(names, rows, strict=True)
    ]


def _reach(line: _Line) -> str:
    """From which L0 to which."""
    return " to ".join(f"{math.exp(line.log_l0s[end]):.1f}" for end in (0, -1))

"""Which differences between dictionaries are more than chance: paired over documents, and over seeds.

Every dictionary of a store is evaluated on the same documents and on the same bootstrap samples of them, so that the difference of two
figures, sample by sample, has the spread of the difference itself, in which what makes a document hard for both cancels. R bootstrap samples.
"""

import itertools
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy.special import stdtrit

from saebench.files import replacing

DRAWS = "bootstrap.safetensors"
FIGURES = {
    "fvu": "FVU",
    "delta_ce": "ΔCE",
    "kl": "KL",
    "loss_recovered_zero": "rec. (zero)",
    "loss_recovered_mean": "rec. (mean)",
}
"""what dictionaries are ranked by, with its heading"""
BESIDE = ("fvu_all", "gamma")
"""figures of documents that nothing is ranked by, of which differences are told all the same, as those of L0"""
OF_LATENTS = ("dead_fraction", "dense_fraction", "duplicate_fraction")
"""figures of a dictionary and of no documents, whose differences are told by seeds alone"""
BASELINES = {
    "pca_fvu": "PCA of rank L0",
    "linear_fvu": "best linear map",
    "untrained_fvu": "untrained SAE",
    "neurons_fvu": "model's neurons",
}
"""name in a dictionary's `baselines`, and its label"""
WIDE = 1.959963984540054  # standard errors either way that hold 95% of a normal distribution
LEAST_DOCUMENTS = 10
"""of which there is an interval: fewer do not tell how documents differ"""


def baseline_figure(entry: dict[str, Any], name: str, figure: str) -> float | None:
    """A figure of one of a dictionary's BASELINES; None where it was not measured: all but FVU only on request."""
    if figure == "fvu":
        return entry["baselines"].get(name)
    return entry.get("spliced_baselines", {}).get(name.removesuffix("_fvu"), {}).get(figure)


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
    documents: int | None = None
    """that they are samples of; None for as many as make no difference"""


def evaluated(entry: dict[str, Any], folder: Path) -> Evaluated:
    """With what is kept in the dictionary's directory."""
    if not (folder / DRAWS).exists():
        return Evaluated(entry, {}, "")
    with safe_open(folder / DRAWS, "np") as file:
        sample = file.metadata()["sample"]
        draws = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Evaluated(entry, draws, sample, json.loads(sample).get("documents"))


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
        """Means over the seeds, of every bootstrap sample; None where these differ, or one of them has no value (as of documents without a loss)."""
        found = [one.draws.get(figure) for one in self.members]
        if any(draws is None for draws in found) or len({one.sample for one in self.members}) > 1:
            return None
        draws = np.mean([draws for draws in found if draws is not None], axis=0)
        return draws if np.isfinite(draws).all() else None


def recipes(every: Iterable[Evaluated]) -> list[Recipe]:
    """Those that differ in their seed alone, together."""
    groups: dict[str, list[Evaluated]] = {}
    for one in every:
        groups.setdefault(one.entry.get("recipe") or one.entry["path"], []).append(one)
    return [Recipe(tuple(members)) for members in groups.values()]


class Reseeding(NamedTuple):
    """What another seed of training changes about a figure."""

    spread: float
    """standard deviation over seeds"""
    freedom: int
    """degrees of freedom that it was estimated with"""


def seed_spread(found: Sequence[Recipe], figure: str) -> Reseeding | None:
    """Pooled over the recipes that have several seeds; None where none has."""
    squares = [
        (len(recipe.members) - 1, spread**2) for recipe in found if (spread := recipe.spread(figure)) is not None
    ]
    freedom = sum(n for n, _ in squares)
    return Reseeding(math.sqrt(sum(n * square for n, square in squares) / freedom), freedom) if freedom else None


def half_of(resampled: float, documents: int | None, seeds: float = 0.0, freedom: int = 0) -> float:
    """Half of the 95% interval of a figure, from its variance over bootstrap samples of so many documents and that over seeds, which was estimated
    with so many degrees of freedom.

    By Student's t, with degrees of freedom after Welch and Satterthwaite. Samples of n documents vary (n − 1)/n of what n other documents would.
    """
    own = resampled if documents is None else resampled * documents / (documents - 1)
    parts = [(seeds, freedom), *([] if documents is None else [(own, documents - 1)])]
    uncertain = sum(part**2 / degrees for part, degrees in parts if part)
    quantile = float(stdtrit((own + seeds) ** 2 / uncertain, 0.975)) if uncertain else WIDE
    return quantile * math.sqrt(own + seeds)


class Difference(NamedTuple):
    """Of two figures."""

    value: float
    half: float
    """half of its 95% interval"""

    @property
    def told_apart(self) -> bool:
        """Whether 0 lies outside the interval."""
        return abs(self.value) > self.half


def difference(one: Recipe, other: Recipe, figure: str, reseeding: Reseeding | None) -> Difference | None:
    """one − other, its variance that of the paired bootstrap and, where `reseeding` (`seed_spread`) is known, of as many seeds as there are.

    None where they were not evaluated on the same samples of the same documents, or one has no such figure; of OF_LATENTS where no seeds are known.
    """
    values, draws = (one.mean(figure), other.mean(figure)), (one.draws(figure), other.draws(figure))
    if values[0] is None or values[1] is None:
        return None
    spread, freedom = reseeding or Reseeding(0.0, 0)
    seeds = spread**2 * (1 / len(one.members) + 1 / len(other.members))
    if figure in OF_LATENTS and freedom:
        return Difference(values[0] - values[1], half_of(0.0, None, seeds, freedom))
    if draws[0] is None or draws[1] is None or one.members[0].sample != other.members[0].sample:
        return None
    apart = float(np.var(draws[0] - draws[1], ddof=1))
    return Difference(values[0] - values[1], half_of(apart, one.members[0].documents, seeds, freedom))


def comparable(found: Sequence[Recipe]) -> list[list[Recipe]]:
    """Recipes by the hooks that they write and the store that they were evaluated on: no others are compared."""
    groups: dict[tuple[str | None, ...], list[Recipe]] = {}
    for recipe in found:
        groups.setdefault((recipe.first.get("evaluated_on"), *recipe.first["writes"]), []).append(recipe)
    return list(groups.values())


def undecided(found: Sequence[Recipe], figure: str) -> set[str]:
    """Paths of those that cannot be told from the next better one that is comparable."""
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
    for figure in ("l0", *FIGURES, *BESIDE, *OF_LATENTS):
        halves = [
            apart.half
            for group in comparable(found)
            for one, other in itertools.combinations(group, 2)
            if (apart := difference(one, other, figure, seed_spread(group, figure))) is not None
        ]
        if halves:
            least[figure] = statistics.median(halves)
    return least


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

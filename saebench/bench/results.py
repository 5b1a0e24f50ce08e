"""What benches find: a record for each figure, in a file that is whole after every unit of work."""

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import stdtrit  # scipy.stats takes a second to import

from saebench.evaluate.compare import LEAST_DOCUMENTS, half_of
from saebench.files import read_json, write_json

_VERSION = 1
_SEED = re.compile(r"-seed\d+$")


class Figure(NamedTuple):
    """One number, and how far it can be trusted."""

    sae: str
    """SAE, or the baseline that stands in for one"""
    of: str
    """what it is of: a task, a concept, a pair of seeds; `all` for a mean over them"""
    figure: str
    """its name, as docs/metrics.md has it"""
    at: float | None
    """where on an axis: k of a probe, L0; None where there is none"""
    value: float | None
    """None where it is undefined"""
    low: float | None = None
    """lower end of its 95% interval; None where too little is known for one"""
    high: float | None = None
    n: int = 0
    """how many documents, rows, seeds or latents it is of"""


class Results:
    """The figures of a bench so far, by unit of work (an SAE and a task, say).

    A unit is done when it is there with its identity, all that decides its figures; a rerun goes on behind those that are, and
    replaces those whose identity is another.
    """

    def __init__(self, path: Path, bench: str) -> None:
        """Raises ValueError when the file is another bench's, or of another version."""
        self.path, self.bench = path, bench
        self._units: dict[str, Any] = {}
        if path.exists():
            found = read_json(path)
            if (found.get("bench"), found.get("version")) != (bench, _VERSION):
                raise ValueError(
                    f"{path} has results of {found.get('bench')!r}, version {found.get('version')!r}; expected {bench!r}, "
                    f"version {_VERSION}: move it away"
                )
            self._units = found["units"]

    def get(self, unit: str, identity: dict[str, Any]) -> list[Figure] | None:
        """The figures of a unit that is done, else None."""
        found = self._units.get(unit)
        return None if found is None or found["identity"] != identity else [Figure(*row) for row in found["figures"]]

    def put(self, unit: str, identity: dict[str, Any], figures: list[Figure]) -> list[Figure]:
        """Keep the figures of a unit, on disk at once; returns them."""
        self._units[unit] = {"identity": identity, "figures": [list(figure) for figure in figures]}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"bench": self.bench, "version": _VERSION, "units": self._units})
        return figures

    def units(self) -> Iterator[tuple[str, dict[str, Any], list[Figure]]]:
        """(name, identity, figures) of every unit in the file, by their names."""
        for name, unit in sorted(self._units.items()):
            yield name, unit["identity"], [Figure(*row) for row in unit["figures"]]


def over_seeds(results: Results) -> list[Figure]:
    """`over_units` of units that differ in their seed alone; where others have figures of the same thing, the unit's name is put behind the SAE's."""
    settings: dict[str, list[Figure]] = {}
    units: dict[str, str] = {}
    for unit, identity, figures in results.units():
        seeded, stem = "seed" in identity, _SEED.sub("", unit)
        rest = {name: value for name, value in identity.items() if name not in ("seed", "name")}
        of = json.dumps([stem, rest] if seeded else unit)
        settings.setdefault(of, []).extend(figures)
        units.setdefault(of, stem if stem not in units.values() else unit)
    every = [(units[of], figure) for of, figures in settings.items() for figure in over_units(figures)]
    count = Counter((figure.sae, figure.of, figure.figure, figure.at) for _, figure in every)
    return [
        figure._replace(sae=f"{figure.sae} ({unit})")
        if count[figure.sae, figure.of, figure.figure, figure.at] > 1
        else figure
        for unit, figure in every
    ]


def over_units(figures: list[Figure]) -> list[Figure]:
    """Figures that several units have of one thing, as seeds do, as their mean; with three or more its interval, and n counts them."""
    groups: dict[tuple[str, str, str, float | None], list[Figure]] = {}
    for figure in figures:
        groups.setdefault((figure.sae, figure.of, figure.figure, figure.at), []).append(figure)
    return [group[0] if len(group) == 1 else _mean(group) for group in groups.values()]


def _mean(group: list[Figure]) -> Figure:
    values = [figure.value for figure in group if figure.value is not None]
    if len(values) < len(group):
        return group[0]._replace(value=None, low=None, high=None, n=len(values))
    low, high = mean_interval(values)
    return group[0]._replace(value=statistics.fmean(values), low=low, high=high, n=len(values))


def mean_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Student's 95% interval of the mean; none of fewer than three values."""
    return interval(values) if len(values) >= 3 else (None, None)


def interval(values: Sequence[float], test_per_train: float = 0.0) -> tuple[float, float]:
    """95% interval of the mean of J values, by Student's t: their standard deviation times √(1/J + test_per_train) is the mean's error.

    Values of splits of the same examples are not independent: of them `test_per_train` is test examples / training examples (Nadeau and
    Bengio 2003). With 0, as for values that are independent, intervals over splits would hold the truth two times in three.
    """
    error = np.std(values, ddof=1) * math.sqrt(1 / len(values) + test_per_train)
    reach = float(stdtrit(len(values) - 1, 0.975) * error)
    return float(np.mean(values)) - reach, float(np.mean(values)) + reach


def drawn_interval(value: float, draws_R: Float[np.ndarray, " R"], n: int) -> tuple[float | None, float | None]:
    """95% interval of a share from its bootstrap samples of n documents (`half_of`); none of fewer than LEAST_DOCUMENTS."""
    if n < LEAST_DOCUMENTS:
        return None, None
    reach = half_of(float(np.var(draws_R, ddof=1)), n)
    return as_shares(value - reach, value + reach)


def as_shares(low: float, high: float) -> tuple[float, float]:
    """The ends of an interval of what is 0 to 1 at most."""
    return max(low, 0.0), min(high, 1.0)


def as_rate(value: float, low: float | None, high: float | None, n: int) -> tuple[float | None, float | None]:
    """The ends of an interval of a share that each of n documents, or latents, has, too.

    Where all or none have it, no samples of them differ; it reaches as far as n that agree leave open (Clopper and Pearson 1934): 1 − 0.025^(1/n).
    """
    if low is None or high is None:
        return None, None
    left_open = 1 - 0.025 ** (1 / n) if value in (0.0, 1.0) else 0.0
    return as_shares(min(low, value - left_open), max(high, value + left_open))

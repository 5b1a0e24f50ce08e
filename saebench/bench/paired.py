"""What SAEs have above baselines and below the best of them, task by task: what makes a task hard is in both sides of a difference, and falls out."""

import logging
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from saebench.bench.readings import Reading
from saebench.bench.results import Figure, interval

_log = logging.getLogger(__name__)

LEAST = 5
"""tasks, or labels, behind an interval of a mean over them"""
LESS_BEST = "less_best"

Table = Mapping[str, float]
"""task -> value"""


def by_place(figures: Sequence[Figure]) -> dict[float | None, dict[str, float]]:
    """Place on the axis (k of a probe) -> task -> value, as far as it is defined."""
    table: dict[float | None, dict[str, float]] = {figure.at: {} for figure in figures}
    for figure in figures:
        if figure.value is not None:
            table[figure.at][figure.of] = figure.value
    return table


def mean_of(name: str, of: str, figure: str, at: float | None, values: Sequence[float]) -> Figure:
    """The mean over tasks, with Student's interval from five on; undefined over none."""
    ends = interval(values) if len(values) >= LEAST else (None, None)
    return Figure(name, of, figure, at, float(np.mean(values)) if values else None, *ends, n=len(values))


def differences(readings: Sequence[Reading], figures: Mapping[str, Sequence[Figure]], figure: str) -> list[Figure]:
    """Means over tasks of how far each SAE is above the best baseline (`excess`), and above the best SAE, so 0 or below as a rule (`less_best`).

    At each place only what reads the same hooks is held against each other. The best is that of the highest mean over the tasks that all
    of them have, of baselines with the SAE; a task that is undefined for either of two is left out of their difference. The best SAE itself
    has no `less_best`.
    """
    tables = {reading.name: by_place(figures[reading.name]) for reading in readings}
    found = []
    for reading in readings:
        rivals = [other.name for other in readings if other.baseline and not other.dense and other.of == reading.of]
        for at, values in tables[reading.name].items() if not reading.baseline else ():
            rows = {name: row for name in rivals if (row := tables[name].get(at))}
            if best := _best(rows, set(values)):
                found.append(mean_of(reading.name, "excess", figure, at, _apart(values, rows[best])))
    for hooks in dict.fromkeys(reading.of for reading in readings):
        saes = [reading.name for reading in readings if reading.of == hooks and not reading.baseline]
        for at in dict.fromkeys(at for name in saes for at in tables[name]):
            rows = {name: row for name in saes if (row := tables[name].get(at))}
            if best := _best(rows):
                others = {name: row for name, row in rows.items() if name != best}
                found += [mean_of(name, LESS_BEST, figure, at, _apart(row, rows[best])) for name, row in others.items()]
    return found


def _best(rows: Mapping[str, Table], tasks: set[str] | None = None) -> str | None:
    """That of the highest mean over what all have of the tasks (default: of all); None where they share none."""
    common = set.intersection(*map(set, rows.values()), *([] if tasks is None else [tasks])) if rows else set()
    return max(rows, key=lambda name: np.mean([rows[name][task] for task in sorted(common)])) if common else None


def _apart(one: Table, other: Table) -> list[float]:
    return [value - other[task] for task, value in one.items() if task in other]


def marked(figures: Sequence[Figure]) -> list[Figure]:
    """Figures for a table: `≈` where an SAE cannot be told from the best, and behind them the least difference, the median half of these intervals."""
    known = [each for each in figures if each.of == LESS_BEST and each.low is not None and each.high is not None]
    halves: dict[tuple[str, float | None], list[float]] = {}
    places: dict[str, list[float | None]] = {}
    alike: dict[str, list[float | None]] = {}
    for each in known:
        assert each.low is not None
        assert each.high is not None
        halves.setdefault((each.figure, each.at), []).append((each.high - each.low) / 2)
        places.setdefault(each.sae, []).append(each.at)
        if each.low <= 0 <= each.high:
            alike.setdefault(each.sae, []).append(each.at)
    marks = {
        sae: f"{LESS_BEST} ≈" + ("" if at == places[sae] else f" at {', '.join(f'{k:g}' for k in at if k is not None)}")
        for sae, at in alike.items()
    }
    if marks:
        _log.info("≈: cannot be told from the best SAE at 95%, paired over the same tasks")
    return [
        *(each._replace(of=marks.get(each.sae, LESS_BEST)) if each.of == LESS_BEST else each for each in figures),
        *(
            Figure("least difference", LESS_BEST, figure, at, statistics.median(some), n=len(some))
            for (figure, at), some in halves.items()
        ),
    ]

"""k-sparse probes: how well a concept is read off the k latents that tell most of it, beside what needs no SAE.

The protocol is that of sae-probes (Kantamneni et al. 2025, arXiv 2502.16681), which `benchmarks/probes_check.py` holds it to.
Suffixes: N rows, F features, D the width of what is read.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int

from saebench.bench.paired import LEAST, by_place, differences, marked, mean_of
from saebench.bench.protocol import Features, Part, aucs, part_of, split
from saebench.bench.readings import Reading, called, folders_by_store, readings_of
from saebench.bench.results import Figure, Results, interval
from saebench.bench.tasks import Reader, Task, column_tasks, text_tasks
from saebench.config import Count
from saebench.labels import labeller_of
from saebench.models import choose_device
from saebench.runlog import progress
from saebench.sae import Ends
from saebench.sae.hub import SaePath
from saebench.store import Store, open_store
from saebench.store.source import model_of

_log = logging.getLogger(__name__)

_VERSION = 1  # of the figures' definitions
_FEW = 10  # test examples of a class, or documents, below which no interval is given


@dataclass(frozen=True, kw_only=True)
class ProbesConfig:
    """What is probed for what."""

    run: Path
    """run directory: probes RUN/saes/*, and writes RUN/bench/probes.json"""
    sae: tuple[SaePath, ...] = ()
    """SAEs to probe instead of those of the run"""
    store: Path | None = None
    """activation store (default: the one each SAE was trained on)"""
    texts: tuple[Path, ...] = ()
    """labelled texts, files of csv, jsonl or parquet with the columns text and label (or prompt and target), or folders of them; a text is known by its last token"""
    labels: tuple[str, ...] = ()
    """what labellers say of tokens, by name, to probe held-out rows of the store for"""
    labeller: str | None = None
    """python, tokens, prose, spacy:PIPELINE or wordnet:DIRECTORY, whose labels these are (default: python, where the text has any, else prose)"""
    columns: Count = 16
    """labels to probe for, the most frequent, where neither labels nor texts are named"""
    rows: Count = 200_000
    """held-out rows to take labels of at most"""
    ks: tuple[int, ...] = (1, 2, 4, 16)
    """latents that a probe reads"""
    penalty: Literal["l2", "l1"] = "l2"
    """of the logistic regression"""
    seeds: Count = 5
    """splits into training and test documents"""
    seed: int = 0
    """of the first of them, and of the untrained SAE"""
    batch: Count = 16
    """texts or contexts in a forward pass"""
    device: str | None = None
    """cuda or cpu (default: cuda where it is at hand)"""
    trust_remote_code: bool = False
    """run code that comes with a hub model"""

    def __post_init__(self) -> None:
        for name in ("seeds", "columns", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"ks are {self.ks}; expected numbers of latents of 1 or more")


# ------------------------------------------------------------------------------------------ figures


class Probed(NamedTuple):
    """What is probed of a reading for a task."""

    reading: str
    task: str
    documents: int
    ks: tuple[int | None, ...]
    """None: all features"""
    parts: list[Part | None]
    """of each split; None where one of its sides would lack a class"""


def prepared(
    reading: Reading, task: Task, X_NF: Features, width: int, config: ProbesConfig, rows: Int[np.ndarray, " N"]
) -> Probed:
    """The splits of a task, and what features they have of it. `rows` of the task are those that the features are of.

    Features are multiplied by one number first, so that their rows' mean squared length in training is `width`: C means the same
    whatever the scale of the activations.
    """
    holds, documents = task.holds[rows], task.documents[rows]
    parts: list[Part | None] = []
    for seed in range(config.seed, config.seed + config.seeds):
        sides = split(holds, documents, np.random.default_rng(seed))
        parts.append(None if sides is None else part_of(X_NF, holds, *sides, width, seed))
    return Probed(reading.name, task.name, len(np.unique(documents)), (None,) if reading.dense else config.ks, parts)


def figures_of(probed: Probed, found: Sequence[Sequence[float | None]]) -> list[Figure]:
    """Of the AUCs of each split, a mean over splits for each k."""
    whole = [part for part in probed.parts if part is not None]
    few = probed.documents < _FEW or min((len(part.truth) for part in whole), default=0) < 2 * _FEW
    test_per_train = float(np.mean([len(part.truth) / len(part.holds) for part in whole])) if whole else 0.0
    figures = []
    for k, values in zip(probed.ks, zip(*found, strict=True), strict=True):
        known = [value for value in values if value is not None]
        defined = len(known) == len(values)  # by every split
        ends = interval(known, test_per_train) if defined and len(known) > 1 and not few else (None, None)
        at, mean = None if k is None else float(k), float(np.mean(known)) if defined else None
        figures.append(Figure(probed.reading, probed.task, "auc", at, mean, *ends, n=probed.documents))
    return figures


def probe(every: Sequence[Probed], penalty: str, workers: Any) -> Iterator[list[Figure]]:
    """The figures of each, in turn, as soon as the workers (`joblib.Parallel`) have them: regressions are many and small, and use one core each."""
    from joblib import delayed

    parts = ((part, each.ks) for each in every for part in each.parts if part is not None)
    found = workers([delayed(aucs)(part, ks, penalty) for part, ks in parts])
    for each in every:
        yield figures_of(each, [[None] * len(each.ks) if part is None else next(found) for part in each.parts])


def summary(readings: Sequence[Reading], figures: Mapping[str, Sequence[Figure]]) -> list[Figure]:
    """Means over tasks of what each reading has, a task that is undefined left out, and the `differences` between readings at the same k."""
    means = [
        mean_of(reading.name, "all", "auc", k, list(values.values()))
        for reading in readings
        for k, values in by_place(figures[reading.name]).items()
    ]
    return means + differences(readings, figures, "auc")


# ------------------------------------------------------------------------------------------ command


def probes(config: ProbesConfig) -> list[Figure]:
    """Probe every SAE for every task, and the baselines; each unit's figures are kept in RUN/bench/probes.json at once.

    Returns the means over tasks, as a table has them. Raises ValueError where there are no SAEs or no tasks, and without scikit-learn.
    """
    try:
        import joblib  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ValueError("probes are fitted with scikit-learn: pip install 'saebench[probes]'") from error
    results = Results(config.run / "bench/probes.json", "probes")
    found: list[Figure] = []
    stores = folders_by_store(config.run, config.sae, config.store)
    for path, (name, before) in called(stores).items():
        shown = marked(_probe_store(config, open_store(path), name, stores[path], results))
        found += [figure._replace(sae=before + figure.sae) for figure in shown]
    return found


def _probe_store(
    config: ProbesConfig, store: Store, name: str, folders: list[tuple[Path, Ends]], results: Results
) -> list[Figure]:
    from joblib import Parallel

    device = choose_device(config.device, float64=True)

    @cache
    def reader() -> Reader:
        model = model_of(store, device, trust_remote_code=config.trust_remote_code)
        return Reader(model, store.context, config.batch)

    tasks = _tasks(config, store, reader)
    readings = readings_of(store, folders, reader, config.seed, device)
    settings = {field: getattr(config, field) for field in ("penalty", "seeds", "seed")} | {"ks": list(config.ks)}
    figures: dict[str, list[Figure]] = {reading.name: [] for reading in readings}
    with progress(len(tasks) * len(readings), "probes", "unit") as bar, Parallel(-1, return_as="generator") as workers:
        for task in tasks:
            units = {
                reading.name: {
                    **reading.identity, "hooks": list(reading.of), "store": store.hash, "task": task.hash, **settings, "version": _VERSION,
                }
                for reading in readings
            }  # fmt: skip
            done = {of: results.get(f"{name} · {of} · {task.name}", identity) for of, identity in units.items()}
            todo = [_prepared(config, store, reading, task) for reading in readings if done[reading.name] is None]
            found = probe(todo, config.penalty, workers)
            for of, identity in units.items():
                figures[of] += done[of] or results.put(f"{name} · {of} · {task.name}", identity, next(found))
                bar.update()
    _say_what_is_few(config, tasks, figures)
    means = summary(readings, figures)
    of = {"readings": [reading.name for reading in readings], "tasks": [task.hash for task in tasks]}
    return results.put(f"{name} · all", of | settings | {"version": _VERSION}, means)


def _prepared(config: ProbesConfig, store: Store, reading: Reading, task: Task) -> Probed:
    vectors = task.source.vectors(task, tuple(dict.fromkeys((*reading.of, *reading.hooks))))
    usual = [vectors[hook].norm(dim=1) <= store.norms(hook).bound for hook in reading.of]
    rows = torch.stack(usual).all(0)
    X_NF = reading.encode({hook: vectors[hook][rows] for hook in reading.hooks})
    width = sum(vectors[hook].shape[1] for hook in reading.of)
    return prepared(reading, task, X_NF, width, config, np.flatnonzero(rows.numpy()))


def _tasks(config: ProbesConfig, store: Store, reader: Callable[[], Reader]) -> list[Task]:
    found = [task for path in config.texts for task in text_tasks(path, lambda texts, hooks: reader()(texts, hooks))]
    if config.labels or config.labeller or not config.texts:
        default = ("python", "tokens", "prose") if config.labels else ("python", "prose")
        labellers = [labeller_of(name) for name in ((config.labeller,) if config.labeller else default)]
        found += column_tasks(store, labellers, config.labels, config.columns, config.rows, reader)
    names = [task.name for task in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} is the name of two tasks; rename one of the files")
    return found


def _say_what_is_few(config: ProbesConfig, tasks: Sequence[Task], figures: Mapping[str, Sequence[Figure]]) -> None:
    every = [each for some in figures.values() for each in some]
    if undefined := sorted({each.of for each in every if each.value is None}):
        _log.warning("undefined, since too few documents have it, or nothing varies: %s", ", ".join(undefined))
    few = sorted({each.of for each in every if each.value is not None and each.low is None})
    if few and config.seeds > 1:
        _log.warning("too few documents or test examples (under %d) for an interval: %s", _FEW, ", ".join(few))
    if len(tasks) < LEAST:
        _log.warning("means over %d tasks have no interval; expected %d at least", len(tasks), LEAST)

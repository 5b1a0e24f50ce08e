"""k-sparse probes: how well a concept is read off the k latents that tell most of it, beside what needs no SAE.

The protocol is that of sae-probes (Kantamneni et al. 2025, arXiv 2502.16681), which `benchmarks/probes_check.py` holds it to.
Suffixes: N rows, F features, D the width of what is read.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from scipy import stats

from saebench.bench.readings import Features, Reading, readings_of
from saebench.bench.results import Figure, Results
from saebench.bench.tasks import Reader, Task, column_tasks, text_tasks
from saebench.config import Count
from saebench.evaluate.diffing import is_of_two_models
from saebench.labels import labeller_of
from saebench.models import choose_device
from saebench.runlog import progress
from saebench.sae import Ends, ends_of, read_config
from saebench.sae.hub import SaePath
from saebench.store import Store, open_store
from saebench.store.source import model_of, recorded_store

_log = logging.getLogger(__name__)

_VERSION = 1  # of the figures' definitions
_CS = np.logspace(5, -5, 10)  # of the logistic regression
_ITERATIONS = 1000
_EPSILON = 1e-6
_TRAIN, _TEST = 512, 50  # of each class: at most to train on, and wanted to test on
_DRAWS = 20  # of an order of documents, until the two sides have what is wanted
_FEW = 10  # test examples of a class, or documents, below which no interval is given
_LEAST_TASKS = 5  # behind an interval of a mean over tasks


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


# ------------------------------------------------------------------------------------------ protocol


def order_of(X_NF: Features, holds_N: Bool[np.ndarray, " N"]) -> Int[np.ndarray, " F"]:
    """Features by how far the means of the two classes are apart, in units of each one's mean |activation| where it is not 0."""
    mean_F = abs(X_NF).sum(0) / (X_NF.count_nonzero(0) + _EPSILON)
    apart_F = (X_NF[holds_N].mean(0) - X_NF[~holds_N].mean(0)) / (mean_F + _EPSILON)
    return np.argsort(-abs(np.asarray(apart_F).ravel()), kind="stable")


def auc(
    train: np.ndarray, holds: np.ndarray, test: np.ndarray, truth: np.ndarray, penalty: str = "l2", seed: int = 0
) -> float:
    """ROC AUC on `test` of a logistic regression of `train`, its C the one of ten that is best in validation."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    kind: dict[str, Any] = {"l1_ratio": 1.0, "solver": "saga"} if penalty == "l1" else {}
    train, test = train.astype(np.float64), test.astype(np.float64)

    def fitted(C: float, rows: np.ndarray) -> Any:
        model = LogisticRegression(C=C, random_state=seed, max_iter=_ITERATIONS, **kind)
        return model.fit(train[rows], holds[rows])

    def validated(C: float) -> float:
        scores = []
        for rows, others in folds:
            both = len(np.unique(holds[rows])) == 2
            score = roc_auc_score(holds[others], fitted(C, rows).predict_proba(train[others])[:, 1]) if both else 0.5
            scores.append(score)
        return float(np.mean(scores))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        folds = list(_folds(train, holds, seed))
        C = _CS[int(np.argmax([validated(C) for C in _CS]))] if folds else 1.0
        shuffled = np.random.RandomState(seed).permutation(len(train))
        return float(roc_auc_score(truth, fitted(C, shuffled).predict_proba(test)[:, 1]))


def _folds(train: np.ndarray, holds: np.ndarray, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows to fit on, rows to validate on) by how many there are; none of 3 or fewer, nor any that validates on one class."""
    from sklearn.model_selection import LeavePOut, StratifiedKFold

    n = len(train)
    if n >= 128:
        stop = n - min(n // 5, 100)
        folds: Any = [(np.arange(stop), np.arange(stop, n))]
    elif n <= 3:
        return
    else:
        folds = (LeavePOut(2) if n <= 12 else StratifiedKFold(6, shuffle=True, random_state=seed)).split(train, holds)
    yield from (fold for fold in folds if len(np.unique(holds[fold[1]])) == 2)


def split(
    holds: Bool[np.ndarray, " n"], documents: Int[np.ndarray, " n"], generator: np.random.Generator
) -> tuple[Int[np.ndarray, " t"], Int[np.ndarray, " u"]] | None:
    """(training rows, test rows), as many of either class in each and no document in both; None where either side would lack a class.

    Documents in a random order fill the training rows first, up to 512 of each class, as far as 50 of each are left to test on.
    """
    lesser = min(int(holds.sum()), int((~holds).sum()))
    train = min(_TRAIN, max(lesser - _TEST, lesser // 2))
    test = min(_TEST, lesser - train)
    names, number = np.unique(documents, return_inverse=True)
    counts = np.stack([np.bincount(number[holds == side], minlength=len(names)) for side in (True, False)])
    best, found = 0.0, None
    for _ in range(_DRAWS if train else 0):
        order = generator.permutation(len(names))
        before = counts[:, order].cumsum(1).min(0)
        after = (counts.sum(1, keepdims=True) - counts[:, order].cumsum(1)).min(0)
        worth = np.minimum(1, np.minimum(before / train, after / test))
        if worth.max() > best:
            best, found = float(worth.max()), (order, int(worth.argmax()))
        if best == 1:
            break
    if found is None:
        return None
    place = np.empty(len(names), np.int64)
    place[found[0]] = np.arange(len(names))
    early = place[number] <= found[1]
    return _balanced(np.flatnonzero(early), holds, generator), _balanced(np.flatnonzero(~early), holds, generator)


def _balanced(rows: np.ndarray, holds: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """As many of some rows of either class, 512 at most, in a random order."""
    sides = [generator.permutation(rows[holds[rows] == side]) for side in (True, False)]
    each = min(_TRAIN, *map(len, sides))
    return generator.permutation(np.concatenate([side[:each] for side in sides]))


# ------------------------------------------------------------------------------------------ figures


def interval(values: Sequence[float], test_per_train: float = 0.0) -> tuple[float, float]:
    """95% interval of the mean of J values, by Student's t: their standard deviation times √(1/J + test_per_train) is the mean's error.

    Values of splits of the same examples are not independent: of them `test_per_train` is test examples / training examples (Nadeau and
    Bengio 2003). With 0, as for values that are independent, intervals over splits would hold the truth two times in three.
    """
    error = np.std(values, ddof=1) * math.sqrt(1 / len(values) + test_per_train)
    reach = float(stats.t.ppf(0.975, len(values) - 1) * error)
    return float(np.mean(values)) - reach, float(np.mean(values)) + reach


def probe(
    reading: Reading, task: Task, X_NF: Features, width: int, config: ProbesConfig, rows: Int[np.ndarray, " N"]
) -> list[Figure]:
    """The figures of a task, a mean over splits for each k. `rows` of the task are those that the features are of.

    Features are multiplied by one number first, so that their rows' mean squared length in training is `width`: C means the same
    whatever the scale of the activations.
    """
    holds, documents = task.holds[rows], task.documents[rows]
    ks: tuple[int | None, ...] = (None,) if reading.dense else config.ks
    splits = {
        seed: split(holds, documents, np.random.default_rng(seed))
        for seed in range(config.seed, config.seed + config.seeds)
    }
    found = [
        [None] * len(ks) if parts is None else _aucs(X_NF, holds, parts, ks, width, config.penalty, seed)
        for seed, parts in splits.items()
    ]
    whole = [parts for parts in splits.values() if parts is not None]
    n = len(np.unique(documents))
    few = n < _FEW or min((len(test) for _, test in whole), default=0) < 2 * _FEW
    test_per_train = float(np.mean([len(test) / len(train) for train, test in whole])) if whole else 0.0
    figures = []
    for k, values in zip(ks, zip(*found, strict=True), strict=True):
        known = [value for value in values if value is not None]
        defined = len(known) == len(values)  # by every split
        ends = interval(known, test_per_train) if defined and len(known) > 1 and not few else (None, None)
        at, mean = None if k is None else float(k), float(np.mean(known)) if defined else None
        figures.append(Figure(reading.name, task.name, "auc", at, mean, *ends, n=n))
    return figures


def _aucs(
    X_NF: Features,
    holds_N: Bool[np.ndarray, " N"],
    parts: tuple[np.ndarray, np.ndarray],
    ks: Sequence[int | None],
    width: int,
    penalty: str,
    seed: int,
) -> list[float | None]:
    """The AUC of a split for each k; None where no feature chosen varies in training."""
    train, test = parts
    square = float(X_NF[train].power(2).sum()) / len(train)
    scale = math.sqrt(width / square) if square else 1.0
    X_train, X_test = X_NF[train] * scale, X_NF[test] * scale
    order, found = order_of(X_train, holds_N[train]), []
    for k in ks:
        some = X_train[:, order[:k]].toarray()
        varies = bool((some != some[:1]).any())
        found.append(
            auc(some, holds_N[train], X_test[:, order[:k]].toarray(), holds_N[test], penalty, seed) if varies else None
        )
    return found


def summary(readings: Sequence[Reading], figures: Mapping[str, Sequence[Figure]]) -> list[Figure]:
    """Means over tasks of what each reading has, and of how far each SAE's are above the best baseline's at the same k.

    A task that is undefined for either is left out of a mean. The best baseline of a k is the one of the highest mean.
    """
    tables = {name: _by_k(each) for name, each in figures.items()}
    found = [
        _mean(reading.name, "all", k, list(values.values()))
        for reading in readings
        for k, values in tables[reading.name].items()
    ]
    for reading in readings:
        rivals = [other for other in readings if other.baseline and not other.dense and other.of == reading.of]
        for k, values in tables[reading.name].items() if not reading.baseline else ():
            means = {
                other.name: np.mean(list(tables[other.name][k].values()))
                for other in rivals
                if tables[other.name].get(k)
            }
            if means:
                best = tables[max(means, key=lambda name: means[name])][k]
                apart = [value - best[task] for task, value in values.items() if task in best]
                found.append(_mean(reading.name, "excess", k, apart))
    return found


def _by_k(figures: Sequence[Figure]) -> dict[float | None, dict[str, float]]:
    """k -> task -> value, as far as it is defined."""
    table: dict[float | None, dict[str, float]] = {figure.at: {} for figure in figures}
    for figure in figures:
        if figure.value is not None:
            table[figure.at][figure.of] = figure.value
    return table


def _mean(name: str, of: str, at: float | None, values: list[float]) -> Figure:
    ends = interval(values) if len(values) >= _LEAST_TASKS else (None, None)
    return Figure(name, of, "auc", at, float(np.mean(values)) if values else None, *ends, n=len(values))


# ------------------------------------------------------------------------------------------ command


def probes(config: ProbesConfig) -> list[Figure]:
    """Probe every SAE for every task, and the baselines; each unit's figures are kept in RUN/bench/probes.json at once.

    Returns the means over tasks. Raises ValueError where there are no SAEs or no tasks, and without scikit-learn.
    """
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ValueError("probes are fitted with scikit-learn: pip install 'saebench[probes]'") from error
    results = Results(config.run / "bench/probes.json", "probes")
    found: list[Figure] = []
    for path, folders in folders_by_store(config.run, config.sae, config.store).items():
        found += _probe_store(config, open_store(path), folders, results)
    return found


def folders_by_store(run: Path, saes: Sequence[Path], store: Path | None) -> dict[Path, list[tuple[Path, Ends]]]:
    """The directories of SAEs given, or of a run, by the store each was trained on, or all on `store`; those of two models are left out.

    Raises ValueError where there are none, or one does not say its store.
    """
    folders = list(saes) or [path.parent for path in sorted((run / "saes").glob("*/cfg.json"))]
    found: dict[Path, list[tuple[Path, Ends]]] = {}
    for folder in folders:
        ends, its_store = ends_of(folder, read_config(folder)), store or recorded_store(folder)
        if is_of_two_models(ends):
            _log.warning("%s is of two models, and is left out: what is read here are the vectors of one", folder)
            continue
        if its_store is None:
            raise ValueError(f"{folder} does not say what it was trained on; give a store of its hook with --store")
        found.setdefault(Path(its_store), []).append((folder, ends))
    if not found:
        raise ValueError(f"{run} has no SAEs in saes/ that can be read here; train some, or give --sae")
    return found


def _probe_store(
    config: ProbesConfig, store: Store, folders: list[tuple[Path, Ends]], results: Results
) -> list[Figure]:
    device = choose_device(config.device, float64=True)

    @cache
    def reader() -> Reader:
        model = model_of(store, device, trust_remote_code=config.trust_remote_code)
        return Reader(model, store.context, config.batch)

    tasks = _tasks(config, store, reader)
    readings = readings_of(store, folders, reader, config.seed, device)
    settings = {name: getattr(config, name) for name in ("penalty", "seeds", "seed")} | {"ks": list(config.ks)}
    figures: dict[str, list[Figure]] = {reading.name: [] for reading in readings}
    with progress(len(tasks) * len(readings), "probes", "unit") as bar:
        for task in tasks:
            for reading in readings:
                unit = f"{store.folder.name} · {reading.name} · {task.name}"
                identity = {
                    **reading.identity, "hooks": list(reading.of), "store": store.hash, "task": task.hash, **settings, "version": _VERSION,
                }  # fmt: skip
                done = results.get(unit, identity)
                figures[reading.name] += done or results.put(unit, identity, _unit(config, store, reading, task))
                bar.update()
    _say_what_is_few(config, tasks, figures)
    means = summary(readings, figures)
    names = {"readings": [reading.name for reading in readings], "tasks": [task.hash for task in tasks]}
    return results.put(f"{store.folder.name} · all", names | settings | {"version": _VERSION}, means)


def _unit(config: ProbesConfig, store: Store, reading: Reading, task: Task) -> list[Figure]:
    vectors = task.source.vectors(task, tuple(dict.fromkeys((*reading.of, *reading.hooks))))
    usual = [vectors[hook].norm(dim=1) <= store.norms(hook).bound for hook in reading.of]
    rows = torch.stack(usual).all(0)
    X_NF = reading.encode({hook: vectors[hook][rows] for hook in reading.hooks})
    width = sum(vectors[hook].shape[1] for hook in reading.of)
    return probe(reading, task, X_NF, width, config, np.flatnonzero(rows.numpy()))


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
    if len(tasks) < _LEAST_TASKS:
        _log.warning("means over %d tasks have no interval; expected %d at least", len(tasks), _LEAST_TASKS)

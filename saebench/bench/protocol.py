"""The protocol of k-sparse probes: which features, which rows, which regression, and how far its AUC can be trusted.

That of sae-probes (Kantamneni et al. 2025, arXiv 2502.16681), which `benchmarks/probes_check.py` holds it to. Suffixes: N rows, F features.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

Features = Any
"""`[N, F]`, `scipy.sparse.csr_array`"""

_CS = np.logspace(5, -5, 10)  # of the logistic regression
_ITERATIONS = 1000
_EPSILON = 1e-6
_TRAIN, _TEST = 512, 50  # of each class: at most to train on, and wanted to test on
_DRAWS = 20  # of an order of documents, until the two sides have what is wanted


def order_of(X_NF: Features, holds_N: Bool[np.ndarray, " N"]) -> Int[np.ndarray, " F"]:
    """Features by how far the means of the two classes are apart, in units of each one's mean |activation| where it is not 0."""
    mean_F = abs(X_NF).sum(0) / (X_NF.count_nonzero(0) + _EPSILON)
    apart_F = (X_NF[holds_N].mean(0) - X_NF[~holds_N].mean(0)) / (mean_F + _EPSILON)
    return np.argsort(-abs(np.asarray(apart_F).ravel()), kind="stable")


class Part(NamedTuple):
    """A split of a task: the features of either side, and which of its rows hold."""

    train: Features
    holds: Bool[np.ndarray, " t"]
    test: Features
    truth: Bool[np.ndarray, " u"]
    seed: int


def part_of(
    X_NF: Features, holds_N: Bool[np.ndarray, " N"], train: np.ndarray, test: np.ndarray, width: int, seed: int
) -> Part:
    """Of the rows of either side, features multiplied so that those to train on have a mean squared length of `width`."""
    square = float(X_NF[train].power(2).sum()) / len(train)
    scale = math.sqrt(width / square) if square else 1.0
    return Part(X_NF[train] * scale, holds_N[train], X_NF[test] * scale, holds_N[test], seed)


def aucs(part: Part, ks: Sequence[int | None], penalty: str = "l2") -> list[float | None]:
    """The AUC of the k features that tell most, for each k (None: of all); None where no feature chosen varies in training."""
    order, found = order_of(part.train, part.holds), []
    for k in ks:
        some = part.train[:, order[:k]].toarray()
        varies = bool((some != some[:1]).any())
        test = part.test[:, order[:k]].toarray()
        found.append(auc(some, part.holds, test, part.truth, penalty, part.seed) if varies else None)
    return found


def auc(
    train: np.ndarray, holds: np.ndarray, test: np.ndarray, truth: np.ndarray, penalty: str = "l2", seed: int = 0
) -> float:
    """ROC AUC on `test` of a logistic regression of `train`, its C the one of ten that is best in validation."""
    from sklearn import config_context
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

    # Checks of arguments are a fifth of so small a regression.
    with warnings.catch_warnings(), config_context(skip_parameter_validation=True, assume_finite=True):
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

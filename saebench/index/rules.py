"""What a latent fires on, as a rule: literals of which one must hold, one that must hold beside it, and some that must not.

Two candidates for its name are made of literals on training rows (`grow.py`): a rule, and a list of tokens. Both are scored here, on held-out documents.
Legend: R rows, F latents, M literals, T distinct tokens, W windows.
"""

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from saebench.index.evidence import hashed
from saebench.runlog import progress

WINDOW = 32  # consecutive rows of a context that are one window
MINIMUM = 10
"""firing rows below which nothing is fitted or scored, and windows of either kind below which none is detected"""
ALTERNATIVES, EXCEPTIONS, LISTED = 14, 2, 8
"""of a rule, and tokens of a list"""

RULE = np.dtype(
    [
        ("any", "<i4", (ALTERNATIVES,)),  # literals of which one must hold; -1 beyond them, and where there is no rule
        ("only", "<i4"),  # a literal that must hold as well; -1 for none
        ("but", "<i4", (EXCEPTIONS,)),  # literals that must not hold
        ("fit_rows", "<i4"),  # rows of the fit on which the latent fires
        ("fit_f1", "<f4"),
    ]
)
SCORE = np.dtype(
    [
        ("first_f1", "<f4"),  # per token, on the first half of the held-out documents: candidates are compared by it
        ("score_rows", "<i4"),  # rows of the second half on which the latent fires; all that follows is of that half
        ("f1", "<f4"),
        ("precision", "<f4"),
        ("recall", "<f4"),
        ("detection", "<f4"),  # balanced accuracy in telling windows in which the latent fires
        ("null", "<f4"),  # the same for activations that were rotated within their documents
        ("hard_negative", "<f4"),  # balanced accuracy in telling firing rows from silent rows of the same tokens
    ]
)

Matrix = Any  # scipy.sparse arrays, which type checkers know too little of


class Rows(NamedTuple):
    """What fires and what holds on R kept rows.

    `firing` `[R, F]` and `literals` `[R, M]` are CSC; only where their entries are counts. `position` in the context tells windows,
    `doc_id` documents: rows that are scored come whole contexts at a time, rows of a fit may be any.
    """

    firing: Matrix
    literals: Matrix
    tokens: Int[np.ndarray, " R"]
    position: Int[np.ndarray, " R"]
    doc_id: Int[np.ndarray, " R"]

    def check(self) -> None:
        """Raises ValueError where they are not of the same rows."""
        lengths = [self.firing.shape[0], self.literals.shape[0], len(self.tokens), len(self.position), len(self.doc_id)]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"firing, literals, tokens, position and doc_id have {lengths} rows; expected the same of each"
            )


def score_rules(rules: np.ndarray, score: Rows, seed: int = 0, workers: int | None = None) -> np.ndarray:
    """Scores `SCORE` `[F]` of rules, or of lists, on held-out rows; NaN where firing rows, or windows of either kind, are too few.

    `seed` rotates the activations of the null.
    """
    score.check()
    held_out = _HeldOut(score, seed)
    scores = np.zeros(len(rules), SCORE)
    for name in SCORE.names or ():
        scores[name] = 0 if name == "score_rows" else np.nan
    each_latent(
        len(rules),
        lambda latent: held_out.score(latent, rules[latent], scores[latent : latent + 1]),
        "score rules",
        workers,
    )
    return scores


def each_latent(n: int, work: Callable[[int], None], what: str, workers: int | None) -> None:
    """Do something for each latent, in threads: most of it is numpy's, which lets others run meanwhile."""
    with progress(n, what, "latent", delay=1.0) as bar, ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for _ in pool.map(work, range(n)):
            bar.update()


_FORM = re.compile(
    r"(?P<head>.*? )(?P<value>b?[\"'].*[\"'])(?P<tail> in any case)?|(?P<kind>.*?: )(?P<one>.*)", re.DOTALL
)


def describe(rule: np.void, names: Sequence[str]) -> str:
    """A rule in words, as `token " bad" or " worse"; class: number; only after word "the"; not position < 4`; empty where there is none."""
    groups: dict[tuple[str, str], list[str]] = {}
    for number in rule["any"][rule["any"] >= 0].tolist():
        name = names[int(number)]
        form = _FORM.fullmatch(name)
        if form is None:
            groups.setdefault((name, ""), []).append("")
        elif form["kind"] is not None:
            groups.setdefault((form["kind"], ""), []).append(form["one"])
        else:
            groups.setdefault((form["head"], form["tail"] or ""), []).append(form["value"])
    parts = [head + " or ".join(values) + tail for (head, tail), values in groups.items()]
    if rule["only"] >= 0:
        parts.append(f"only {names[rule['only']]}")
    parts += [f"not {names[number]}" for number in rule["but"] if number >= 0]
    return "; ".join(parts)


_STRING = r"b'(?:[^'\\]|\\.)*'|b?\"(?:[^\"\\]|\\.)*\""
_STRINGS, _LITERALS = re.compile(_STRING, re.DOTALL), re.compile(rf"(?:{_STRING}|[^;])+", re.DOTALL)


def named_by(text: str) -> str:
    """What a rule in words names, without the words that it names it with: `" bad" " worse" number "the" position < 4` of the example of `describe`."""
    found: list[str] = []
    for literal in _LITERALS.findall(text):
        bare = re.sub(r"^ ?(?:only |not )?(?:[^:]*: )?", "", literal)
        found += _STRINGS.findall(literal) or [bare]
    return " ".join(found)


# ---------------------------------------------------------------------------------------- scoring


class _HeldOut:
    """The rows that rules are scored on, by literal and by latent."""

    def __init__(self, score: Rows, seed: int) -> None:
        self.firing, self.literals = score.firing.tocsc(), score.literals.tocsc()
        self.second = halves(score.doc_id)
        self.window = windows(score.position)
        begins = np.concatenate([[True], np.diff(self.window) != 0])[: len(self.window)]
        self.window_second = self.second[begins]
        self.rotated = _rotated(score.doc_id, np.random.default_rng(seed))
        _, self.tokens = np.unique(score.tokens, return_inverse=True)
        self.count = self._per_token(np.flatnonzero(self.second))

    def score(self, latent: int, rule: np.void, scores: np.ndarray) -> None:
        """Fill in the scores of one rule, a structured array of length 1."""
        fires = rows_in(self.firing, latent)
        later = self.second[fires]
        scores["score_rows"] = later.sum()
        if rule["any"][0] < 0:
            return
        holds = holding(self.literals, rule)
        claimed, hits = np.flatnonzero(holds), holds[fires]
        claimed_later = self.second[claimed]
        n_first, n_second = len(fires) - int(later.sum()), int(later.sum())
        if n_first >= MINIMUM:
            scores["first_f1"] = 2 * (hits & ~later).sum() / (n_first + (~claimed_later).sum())
        if n_second < MINIMUM:
            return
        true, said = int((hits & later).sum()), int(claimed_later.sum())
        scores["precision"] = true / said if said else 0.0
        scores["recall"] = true / n_second
        scores["f1"] = 2 * true / (said + n_second)
        claimed, fires = claimed[claimed_later], fires[later]
        scores["detection"] = self._detection(claimed, fires)
        scores["null"] = self._detection(claimed, self.rotated[fires])
        scores["hard_negative"] = self._hard_negative(claimed, fires, fires[holds[fires]])

    def _per_token(self, rows: np.ndarray) -> Int[np.ndarray, " T"]:
        return np.bincount(self.tokens[rows], minlength=int(self.tokens.max(initial=-1)) + 1)

    def _detection(self, claimed: np.ndarray, fires: np.ndarray) -> float:
        """Balanced accuracy over the windows of the second half: one is claimed, or active, when any of its rows is."""
        said, active = np.zeros(len(self.window_second), bool), np.zeros(len(self.window_second), bool)
        said[self.window[claimed]] = True
        active[self.window[fires]] = True
        n_active, n = int((active & self.window_second).sum()), int(self.window_second.sum())
        if min(n_active, n - n_active) < MINIMUM:
            return np.nan
        true, false = (int((said & which & self.window_second).sum()) for which in (active, ~active))
        return (true / n_active + 1 - false / (n - n_active)) / 2

    def _hard_negative(self, claimed: np.ndarray, fires: np.ndarray, hits: np.ndarray) -> float:
        """Mean of recall and specificity, tokens weighted by the rows on which the latent fires.

        Tokens on which it always fires have no negatives and are left out.
        """
        fires_T, claimed_T, hits_T = (self._per_token(rows) for rows in (fires, claimed, hits))
        silent_T = self.count - fires_T
        mixed = (fires_T > 0) & (silent_T > 0)
        weight = fires_T[mixed]
        if weight.sum() < MINIMUM:
            return np.nan
        false = (claimed_T - hits_T)[mixed] / silent_T[mixed]
        return float((hits_T[mixed].sum() + (weight * (1 - false)).sum()) / (2 * weight.sum()))


def holding(literals: Matrix, rule: np.void) -> Bool[np.ndarray, " R"]:
    """Where a rule holds, of literals `[R, M]` in CSC."""
    holds = np.zeros(literals.shape[0], dtype=bool)
    for literal in rule["any"][rule["any"] >= 0].tolist():
        holds[rows_in(literals, literal)] = True
    if rule["only"] >= 0:
        within = np.zeros_like(holds)
        within[rows_in(literals, int(rule["only"]))] = True
        holds &= within
    for literal in rule["but"][rule["but"] >= 0].tolist():
        holds[rows_in(literals, literal)] = False
    return holds


def rows_in(matrix: Matrix, number: int) -> Int[np.ndarray, " n"]:
    """Rows of the entries in a column of a CSC matrix."""
    return matrix.indices[matrix.indptr[number] : matrix.indptr[number + 1]]


def halves(doc_id: Int[np.ndarray, " R"]) -> Bool[np.ndarray, " R"]:
    """Which of some held-out rows are of the second half: candidates for a name are compared on the first, and figures shown are of the second.

    Whole documents, in an order that has nothing to do with their numbers, until half of the rows are taken.
    """
    documents, inverse, rows = np.unique(doc_id, return_inverse=True, return_counts=True)
    order = np.argsort(hashed(documents), kind="stable")
    first = np.zeros(len(documents), bool)
    first[order] = rows[order].cumsum() - rows[order] // 2 <= len(doc_id) / 2
    return ~first[inverse]


def _rotated(doc_id: Int[np.ndarray, " R"], rng: np.random.Generator) -> Int[np.ndarray, " R"]:
    """The row that each is moved to when every stretch of a document is rotated by a chance number of rows.

    What fires in runs still does, and as often in each document: what a rule owes to telling documents apart alone, the null has too.
    """
    borders = np.concatenate([[0], np.flatnonzero(np.diff(doc_id)) + 1, [len(doc_id)]])
    lengths = np.diff(borders)
    start, length = np.repeat(borders[:-1], lengths), np.repeat(lengths, lengths)
    shift = np.repeat(rng.integers(0, np.maximum(lengths, 1)), lengths)
    return start + (np.arange(len(doc_id)) - start + shift) % np.maximum(length, 1)


def windows(position: Int[np.ndarray, " R"]) -> Int[np.ndarray, " R"]:
    """The number of each row's window: contexts are cut at multiples of `WINDOW`."""
    begins = (np.diff(position // WINDOW) != 0) | (np.diff(position) <= 0)
    return np.concatenate([[0], np.cumsum(begins)]) if len(position) else np.empty(0, np.int64)

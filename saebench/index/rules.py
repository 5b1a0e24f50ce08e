"""What a latent fires on, as a rule: literals of which one must hold, one that must hold beside it, and some that must not.

Two candidates for its name are made of literals: a rule, grown one literal at a time by F1 on training rows (FOIL's way to learn a clause by
what it gains, Quinlan 1990, turned to F1), and a list of tokens, the best of its length. Both are scored on held-out documents.
Legend: R rows, F latents, M literals, S literals of a shortlist, T distinct tokens, W windows.
"""

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from saebench.index.evidence import hashed
from saebench.runlog import progress

WINDOW = 32  # consecutive rows of a context that are one window
MINIMUM = 10
"""firing rows below which nothing is fitted or scored, and windows of either kind below which none is detected"""
ALTERNATIVES, EXCEPTIONS, LISTED = 12, 2, 8
"""of a rule, and tokens of a list"""
GAIN = 0.005
"""of F1 on training rows, for which a rule takes another literal"""
_SHORTLIST = 64  # alternatives that are tried
_LEAST_HITS = 2  # of an alternative
_LOOKED_AT = 2**14  # rows by which it is told what holds on some, evenly among them where they are more

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


def fit_rules(fit: Rows, lists_of: Bool[np.ndarray, " M"], workers: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(rules, lists) of F latents, two arrays `RULE` `[F]`; lists are of literals in `lists_of`, no two of which hold on one row.

    Without literals where a latent fires on fewer than `MINIMUM` rows, or nothing holds twice where it fires.
    """
    fit.check()
    grower = _Grower(fit.literals, np.flatnonzero(lists_of))
    firing = fit.firing.tocsc()
    rules, lists = _none(firing.shape[1]), _none(firing.shape[1])

    def fit_one(latent: int) -> None:
        fires = _column(firing, latent)
        rules["fit_rows"][latent] = lists["fit_rows"][latent] = len(fires)
        if len(fires) >= MINIMUM:
            grower.fit(fires, rules[latent : latent + 1], lists[latent : latent + 1])

    _each(len(rules), fit_one, "fit rules", workers)
    return rules, lists


def score_rules(rules: np.ndarray, score: Rows, seed: int = 0, workers: int | None = None) -> np.ndarray:
    """Scores `SCORE` `[F]` of rules, or of lists, on held-out rows; NaN where firing rows, or windows of either kind, are too few.

    `seed` rotates the activations of the null.
    """
    score.check()
    held_out = _HeldOut(score, seed)
    scores = np.zeros(len(rules), SCORE)
    for name in SCORE.names or ():
        scores[name] = 0 if name == "score_rows" else np.nan
    _each(
        len(rules),
        lambda latent: held_out.score(latent, rules[latent], scores[latent : latent + 1]),
        "score rules",
        workers,
    )
    return scores


def _each(n: int, work: Callable[[int], None], what: str, workers: int | None) -> None:
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


def _none(n: int) -> np.ndarray:
    rules = np.zeros(n, RULE)
    for name in ("any", "only", "but"):
        rules[name] = -1
    rules["fit_f1"] = np.nan
    return rules


# ---------------------------------------------------------------------------------------- fitting


class _Grower:
    """The rows of a fit by literal, and the literals by row."""

    def __init__(self, literals: Matrix, listed: Int[np.ndarray, " m"]) -> None:
        self.by_literal, self.by_row = literals.tocsc(), literals.tocsr()
        self.n_rows, self.n_literals = literals.shape
        self.counts = np.diff(self.by_literal.indptr)
        self.listed = listed

    def fit(self, fires: Int[np.ndarray, " n"], rule: np.ndarray, listed: np.ndarray) -> None:
        """Fill in the rule and the list of a latent, structured arrays of length 1, from the rows on which it fires."""
        some = _some(fires)
        hits = self.holding_on(some) * (len(fires) / len(some))
        self._list(hits, len(fires), listed)
        self._grow(hits, fires, rule)

    def holding_on(self, rows: np.ndarray) -> Int[np.ndarray, " M"]:
        """On how many of some rows each literal holds."""
        starts, stops = self.by_row.indptr[rows], self.by_row.indptr[rows + 1]
        lengths = stops - starts
        within = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
        return np.bincount(self.by_row.indices[np.repeat(starts, lengths) + within], minlength=self.n_literals)

    def _list(self, hits: np.ndarray, fires: int, rule: np.ndarray) -> None:
        """The list of highest F1: of disjoint literals it is those that gain most at the share that the list itself ends at (Dinkelbach 1967)."""
        there = self.listed[hits[self.listed] >= _LEAST_HITS]
        if not len(there):
            return
        hit, count = hits[there], self.counts[there]
        f1 = float((2 * hit / (count + fires)).max())
        while True:
            gain = hit - f1 / 2 * count
            chosen = np.argsort(-gain, kind="stable")[:LISTED]
            chosen = chosen[gain[chosen] > 0]
            better = 2 * hit[chosen].sum() / (count[chosen].sum() + fires)
            if better <= f1 + 1e-9:
                break
            f1 = float(better)
        if not len(chosen):
            chosen = np.array([(2 * hit / (count + fires)).argmax()])
        rule["any"][0, : len(chosen)] = there[chosen[np.argsort(-hit[chosen], kind="stable")]]
        rule["fit_f1"] = f1

    def _grow(self, hits: np.ndarray, fires: np.ndarray, rule: np.ndarray) -> None:
        short = self._shortlist(hits, len(fires))
        if not len(short):
            return
        state = _Growing(self, short, fires)
        while state.widen() or state.narrow():
            pass
        state.prune()
        rule["any"][0, : len(state.any)] = state.any
        rule["only"] = state.only
        rule["but"][0, : len(state.but)] = state.but
        rule["fit_f1"] = state.f1

    def _shortlist(self, hits: np.ndarray, fires: int) -> Int[np.ndarray, " S"]:
        """Literals that may be alternatives, ascending: the best alone, and those whose hits are worth their other rows in a rule as good as that."""
        there = np.flatnonzero(hits >= _LEAST_HITS)
        if not len(there):
            return there
        hit, count = hits[there], self.counts[there]
        f1 = 2 * hit / (count + fires)
        gain = hit - f1.max() / 2 * count
        size = min(_SHORTLIST, len(there))
        chosen = np.concatenate([np.argpartition(-gain, size - 1)[:size], [f1.argmax()]])
        precise = (
            hit[chosen] / count[chosen] >= 0.3 * f1.max()
        )  # with less it takes in more than it brings, whatever it overlaps with
        return np.unique(there[np.append(chosen[precise], f1.argmax())])


class _Growing:
    """A rule as it grows: what it holds on, and what another literal would change."""

    def __init__(self, grower: _Grower, short: Int[np.ndarray, " S"], fires: Int[np.ndarray, " n"]) -> None:
        self.grower, self.short, self.n_fires = grower, short, len(fires)
        self.any: list[int] = []
        self.but: list[int] = []
        self.only, self.f1 = -1, 0.0
        self.fires = np.zeros(grower.n_rows, bool)
        self.fires[fires] = True
        self.times = np.zeros(grower.n_rows, np.int8)  # how many alternatives hold
        self.allowed = np.ones(grower.n_rows, bool)
        columns = [_column(grower.by_literal, literal) for literal in short.tolist()]
        self.starts = np.cumsum([0, *(len(column) for column in columns)])
        self.rows = np.concatenate(columns)
        self.hit = self.fires[self.rows]
        self.true, self.claimed = 0, 0  # rows on which the rule holds: where the latent fires, and all

    def _f1(self, true: Any, claimed: Any) -> Any:
        return 2 * true / (claimed + self.n_fires)

    def _rows_of(self, literal: int) -> np.ndarray:
        return _column(self.grower.by_literal, literal)

    def widen(self) -> bool:
        """Take the alternative that brings most."""
        if len(self.any) == ALTERNATIVES:
            return False
        new = (self.times[self.rows] == 0) & self.allowed[self.rows]
        claimed = self.claimed + np.add.reduceat(new, self.starts[:-1], dtype=np.int64)
        true = self.true + np.add.reduceat(new & self.hit, self.starts[:-1], dtype=np.int64)
        f1 = self._f1(true, claimed)
        best = int(f1.argmax())
        if f1[best] < self.f1 + GAIN and self.any:
            return False
        self.any.append(int(self.short[best]))
        self.times[self._rows_of(self.any[-1])] += 1
        self.f1, self.true, self.claimed = float(f1[best]), int(true[best]), int(claimed[best])
        return True

    def narrow(self) -> bool:
        """Take the exception that rids it of most, or the literal that must hold as well."""
        held = (self.times > 0) & self.allowed
        rows = _some(np.flatnonzero(held))
        there_M, true_M = self.grower.holding_on(rows), self.grower.holding_on(rows[self.fires[rows]])
        part = len(rows) / self.claimed  # of what it holds on
        moves = []
        if len(self.but) < EXCEPTIONS:
            moves += [
                (False, literal) for literal in _top(self._f1(self.true - true_M / part, self.claimed - there_M / part))
            ]
        if self.only < 0:
            moves += [(True, literal) for literal in _top(self._f1(true_M / part, there_M / part))]
        best, counted = float(np.nextafter(self.f1 + GAIN, 0)), None
        for within, literal in moves:
            inside = int(true_M[literal]), int(there_M[literal])
            if part < 1:
                here = self._rows_of(literal)
                here = here[held[here]]
                inside = int(self.fires[here].sum()), len(here)
            true, claimed = inside if within else (self.true - inside[0], self.claimed - inside[1])
            if (f1 := self._f1(true, claimed)) > best:
                best, counted = f1, (within, literal, true, claimed)
        if counted is None:
            return False
        within, literal, self.true, self.claimed = counted
        self.f1 = float(best)
        if within:
            self.only = literal
            outside = np.ones(len(self.allowed), bool)
            outside[self._rows_of(literal)] = False
            self.allowed[outside] = False
        else:
            self.but.append(literal)
            self.allowed[self._rows_of(literal)] = False
        return True

    def prune(self) -> None:
        """Drop alternatives that later ones have made useless."""
        for literal in list(self.any):
            rows = self._rows_of(literal)
            lost = rows[(self.times[rows] == 1) & self.allowed[rows]]
            true, claimed = self.true - int(self.fires[lost].sum()), self.claimed - len(lost)
            if len(self.any) > 1 and self._f1(true, claimed) >= self.f1:
                self.any.remove(literal)
                self.times[rows] -= 1
                self.true, self.claimed, self.f1 = true, claimed, float(self._f1(true, claimed))


def _some(rows: Int[np.ndarray, " n"]) -> Int[np.ndarray, " m"]:
    """All of some rows, or at most `_LOOKED_AT` evenly among them."""
    return rows[:: max(1, -(-len(rows) // _LOOKED_AT))]


def _top(f1: Float[np.ndarray, " M"], k: int = 4) -> list[int]:
    """The literals of highest F1, of equal ones the first."""
    best = np.argpartition(-f1, min(k, len(f1) - 1))[:k]
    return best[np.lexsort((best, -f1[best]))].tolist()


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
        fires = _column(self.firing, latent)
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
        holds[_column(literals, literal)] = True
    if rule["only"] >= 0:
        within = np.zeros_like(holds)
        within[_column(literals, int(rule["only"]))] = True
        holds &= within
    for literal in rule["but"][rule["but"] >= 0].tolist():
        holds[_column(literals, literal)] = False
    return holds


def _column(matrix: Matrix, number: int) -> Int[np.ndarray, " n"]:
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

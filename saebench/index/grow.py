"""Rules grown, and lists of tokens chosen, on the rows of a fit.

A rule is grown one literal at a time by F1 (FOIL's way to learn a clause by what it gains, Quinlan 1990, turned to F1), a list of tokens is the best of its length.
Legend: R rows, F latents, M literals, S literals of a shortlist, n rows.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from saebench.index.rules import ALTERNATIVES, EXCEPTIONS, LISTED, MINIMUM, RULE, Matrix, Rows, each_latent, rows_in

GAIN = 0.003
"""of F1 on training rows, for which a rule takes another literal"""
_SHORTLIST = 128  # alternatives that are tried
_LEAST_HITS = 2  # of an alternative
_LOOKED_AT = 2**14  # rows by which it is told what holds on some, evenly among them where they are more


def fit_rules(fit: Rows, lists_of: Bool[np.ndarray, " M"], workers: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(rules, lists) of F latents, two arrays `RULE` `[F]`; lists are of literals in `lists_of`, no two of which hold on one row.

    Without literals where a latent fires on fewer than `MINIMUM` rows, or nothing holds twice where it fires.
    """
    fit.check()
    grower = _Grower(fit.literals, np.flatnonzero(lists_of))
    firing = fit.firing.tocsc()
    rules, lists = _none(firing.shape[1]), _none(firing.shape[1])

    def fit_one(latent: int) -> None:
        fires = rows_in(firing, latent)
        rules["fit_rows"][latent] = lists["fit_rows"][latent] = len(fires)
        if len(fires) >= MINIMUM:
            grower.fit(fires, rules[latent : latent + 1], lists[latent : latent + 1])

    each_latent(len(rules), fit_one, "fit rules", workers)
    return rules, lists


def _none(n: int) -> np.ndarray:
    rules = np.zeros(n, RULE)
    for name in ("any", "only", "but"):
        rules[name] = -1
    rules["fit_f1"] = np.nan
    return rules


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
        while state.widen() or state.narrow() or state.swap():
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
        columns = [rows_in(grower.by_literal, literal) for literal in short.tolist()]
        self.starts = np.cumsum([0, *(len(column) for column in columns)])
        self.rows = np.concatenate(columns)
        self.hit = self.fires[self.rows]
        self.true, self.claimed = 0, 0  # rows on which the rule holds: where the latent fires, and all

    def _f1(self, true: Any, claimed: Any) -> Any:
        return 2 * true / (claimed + self.n_fires)

    def _rows_of(self, literal: int) -> np.ndarray:
        return rows_in(self.grower.by_literal, literal)

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

    def swap(self) -> bool:
        """Take another alternative in the place of the one that later literals have made worth least, where that is better by a third of GAIN."""
        if len(self.any) < 2:
            return False
        before = list(self.any), self.times.copy(), self.f1, self.true, self.claimed
        self._drop(max(self.any, key=lambda literal: self._f1(*self._without(literal))))
        if self.widen() and self.f1 > before[2] + GAIN / 3:
            return True
        self.any, self.times, self.f1, self.true, self.claimed = before
        return False

    def prune(self) -> None:
        """Drop alternatives that later ones have made useless."""
        for literal in list(self.any):
            if len(self.any) > 1 and self._f1(*self._without(literal)) >= self.f1:
                self._drop(literal)

    def _without(self, literal: int) -> tuple[int, int]:
        """`true` and `claimed` of the rule without one of its alternatives."""
        rows = self._rows_of(literal)
        lost = rows[(self.times[rows] == 1) & self.allowed[rows]]
        return self.true - int(self.fires[lost].sum()), self.claimed - len(lost)

    def _drop(self, literal: int) -> None:
        self.true, self.claimed = self._without(literal)
        self.f1 = float(self._f1(self.true, self.claimed))
        self.times[self._rows_of(literal)] -= 1
        self.any.remove(literal)


def _some(rows: Int[np.ndarray, " n"]) -> Int[np.ndarray, " m"]:
    """All of some rows, or at most `_LOOKED_AT` evenly among them."""
    return rows[:: max(1, -(-len(rows) // _LOOKED_AT))]


def _top(f1: Float[np.ndarray, " M"], k: int = 4) -> list[int]:
    """The literals of highest F1, of equal ones the first."""
    best = np.argpartition(-f1, min(k, len(f1) - 1))[:k]
    return best[np.lexsort((best, -f1[best]))].tolist()

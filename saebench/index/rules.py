"""A rule of at most two literals for each latent: fitted on rows of some documents, scored on rows of others.

A rule is `A`, `A and B`, `A and not B` or `A or B`; it is the one whose F1 on the rows of the fit is best
among a shortlist of literals, and a second literal must earn its place. Of rules that are equally good the
first in the order of operators and then of literals is taken, so that the same rows give the same rules.
Legend: R rows, F latents, M literals, S shortlisted literals, T distinct tokens, W windows.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from saebench.index.evidence import hashed
from saebench.runlog import progress

WINDOW = 32  # consecutive rows of a context that are one window
MINIMUM = (
    10  # firing rows below which nothing is fitted or scored, and windows of either kind below which none is detected
)
GAIN = 0.02  # by how much F1 a second literal must improve on the best single one
OPERATORS = ("", "and", "and not", "or")

RULE = np.dtype(
    [
        ("first", "<i4"),  # literal A; -1 where there is no rule
        ("operator", "i1"),  # index into OPERATORS
        ("second", "<i4"),  # literal B; -1 where there is none
        ("fit_rows", "<i4"),  # rows of the fit on which the latent fires
        ("score_rows", "<i4"),  # held-out rows on which it fires
        ("fit_f1", "<f4"),
        ("precision", "<f4"),  # per token, on held-out rows, as all that follows
        ("recall", "<f4"),
        ("f1", "<f4"),
        ("token_f1", "<f4"),  # F1 of the best set of tokens, also fitted on the fit's rows
        ("by_token", "?"),  # token identity alone does as well as the rule, to within GAIN
        ("detection", "<f4"),  # balanced accuracy in telling windows in which the latent fires
        ("null", "<f4"),  # the same after the held-out activations are permuted across rows: chance is 0.5
        ("hard_negative", "<f4"),  # balanced accuracy in telling firing rows from silent rows of the same tokens
    ]
)
_LEADS = 8  # literals taken into the shortlist for each of two scores of their own
_PARTNERS = 8  # and, for each operator, as the second of a pair
_BLOCK = 2**19  # pairs of latent and literal worked on at once: what stays in a core's cache


Matrix = Any  # scipy.sparse.csr_array, which type checkers know too little of


class Rows(NamedTuple):
    """What fires and what holds on R kept rows.

    `firing` `[R, F]` is CSC or CSR and `literals` `[R, M]` CSR; only where their entries are counts (a `SparseCode` is
    `csr_array((ones, code.latents, code.offsets))`). `position` in the context tells windows: rows that are
    scored come whole contexts at a time, rows of a fit may be any.
    """

    firing: Matrix
    literals: Matrix
    tokens: Int[np.ndarray, " R"]
    position: Int[np.ndarray, " R"]


def fit_rules(fit: Rows, score: Rows | Callable[[], Rows], seed: int = 0) -> np.ndarray:
    """Rules of F latents and their scores, a structured array `RULE` `[F]`; `score`, or what gives it once rules are fitted.

    NaN, and -1 for a literal, where a latent fires on fewer than `MINIMUM` rows (`detection` and `null`: in, or
    outside of, fewer than `MINIMUM` windows). `seed` permutes the rows of the null. Raises ValueError where
    the two sets of rows have not the same latents and literals.
    """
    if not callable(score):
        _check(fit, score)
    rules = np.zeros(fit.firing.shape[1], dtype=RULE)
    for name in RULE.names or ():
        rules[name] = -1 if name in ("first", "second") else np.nan if RULE[name].kind == "f" else 0
    _search(fit, rules)
    if callable(score):
        score = score()
        _check(fit, score)
    held_out = _HeldOut(fit, score, seed)
    with progress(len(rules), "score rules", "latent", delay=1.0) as bar:
        for latent in range(len(rules)):
            held_out.score(latent, rules[latent : latent + 1])
            bar.update()
    return rules


def describe(rule: np.void, names: Sequence[str]) -> str:
    """A rule in words, e.g. `role: parameter and not inside lambda`."""
    if rule["first"] < 0:
        return f"no rule: fires on {rule['fit_rows']} rows of the fit, fewer than {MINIMUM}"
    if rule["second"] < 0:
        return str(names[rule["first"]])
    return f"{names[rule['first']]} {OPERATORS[rule['operator']]} {names[rule['second']]}"


def _check(fit: Rows, score: Rows) -> None:
    for what in ("firing", "literals"):
        ours, theirs = getattr(fit, what).shape[1], getattr(score, what).shape[1]
        if ours != theirs:
            raise ValueError(
                f"{what} of the fit has {ours} columns and {what} of the scoring {theirs}; encode and label both with the "
                "same SAE and the same vocabulary"
            )
    for rows in (fit, score):
        lengths = [rows.firing.shape[0], rows.literals.shape[0], len(rows.tokens), len(rows.position)]
        if len(set(lengths)) > 1:
            raise ValueError(f"firing, literals, tokens and position have {lengths} rows; expected the same of each")


# ---------------------------------------------------------------------------------------- fitting


def _search(fit: Rows, rules: np.ndarray) -> None:
    """Fill in the rule, `fit_rows` and `fit_f1` of every latent."""
    literals = _counted(fit.literals)
    firing = fit.firing.tocsc()
    rules["fit_rows"] = np.diff(firing.indptr)
    step = max(1, _BLOCK // literals.shape[1])
    both_MM = _together(literals, step)
    bar = progress(len(rules), "fit rules", "latent", delay=1.0)
    for start in range(0, len(rules), step):
        block = firing[:, start : start + step]
        hits_FM = (_counted(block.T) @ literals).toarray()
        shortlists = _shortlists(hits_FM, np.diff(block.indptr), both_MM, literals.shape[0])
        for latent, short in enumerate(shortlists, start):
            rows = _column(firing, latent)
            if len(rows) < MINIMUM:
                continue
            short = np.unique(short)
            held = literals[rows][:, short]
            hits_SS = (held.T @ held).toarray()
            f1, operator, first, second = _best_rule(hits_SS, both_MM[np.ix_(short, short)], len(rows))
            chosen = rules[latent]
            chosen["first"], chosen["operator"], chosen["fit_f1"] = short[first], operator, f1
            chosen["second"] = short[second] if operator else -1
        bar.update(len(shortlists))
    bar.close()


def _together(literals: Matrix, step: int) -> Float[np.ndarray, "M M"]:
    """On how many rows two literals hold, computed for `step` of them at once: a sparse product is larger than a dense one."""
    by_literal = literals.T.tocsr()
    both_MM = np.empty((literals.shape[1],) * 2, np.float32)
    for start in range(0, len(both_MM), step):
        both_MM[start : start + step] = (by_literal[start : start + step] @ literals).toarray()
    return both_MM


def _counted(matrix: Matrix) -> Matrix:
    """A CSR matrix whose products count, exactly up to 2^24 rows."""
    return sparse.csr_array((np.ones(matrix.nnz, np.float32), matrix.indices, matrix.indptr), shape=matrix.shape)


def _shortlists(
    hits_FM: Float[np.ndarray, "F M"], fires_F: Int[np.ndarray, " F"], both_MM: Float[np.ndarray, "M M"], n_rows: int
) -> Int[np.ndarray, "F S"]:
    """Literals worth trying for each latent: the best alone, and the best partners of those.

    Alone they are ranked by F1, and by recall less false positive rate, which finds the broad halves of a
    conjunction. Of a pair the rows on which both hold and the latent fires are estimated, as if independent given that it
    fires, within the bounds of the known counts: exact for every rule that holds just where the latent fires.
    """
    fires_F1 = np.maximum(fires_F, 1)[:, None].astype(np.float32)
    holds_M = both_MM.diagonal()
    f1 = 2 * hits_FM / (holds_M + fires_F1)
    youden = hits_FM / fires_F1 - (holds_M - hits_FM) / np.maximum(n_rows - fires_F1, 1)
    leads = np.concatenate([_top(f1, _LEADS), _top(youden, _LEADS)], axis=1)
    best = [np.zeros_like(f1) for _ in range(3)]
    for lead in leads.T:
        lead_hits, lead_holds, both = (
            np.take_along_axis(hits_FM, lead[:, None], 1),
            holds_M[lead][:, None],
            both_MM[lead],
        )
        shared = np.clip(lead_hits * hits_FM / fires_F1, lead_hits + hits_FM - fires_F1, both)
        pairs = (
            (shared, both),
            (lead_hits - shared, lead_holds - both),
            (lead_hits + hits_FM - shared, lead_holds + holds_M - both),
        )
        for score, (true, predicted) in zip(best, pairs, strict=True):
            np.maximum(score, 2 * true / (predicted + fires_F1), out=score)
    return np.concatenate([leads, *(_top(score, _PARTNERS) for score in best)], axis=1)


def _top(scores_FM: Float[np.ndarray, "F M"], k: int) -> Int[np.ndarray, "F K"]:
    """The k largest of each row to six digits, of equal ones the first."""
    n = scores_FM.shape[1]
    keys = np.rint(scores_FM * 2**20).astype(np.int64) * n + np.arange(n)[::-1]
    k = min(k, n)
    return np.argpartition(keys, n - k, axis=1)[:, n - k :]


def _best_rule(
    hits_SS: Float[np.ndarray, "S S"], both_SS: Float[np.ndarray, "S S"], fires: int
) -> tuple[float, int, int, int]:
    """(F1, operator, first, second) from the rows on which two literals hold and the latent fires, and all on which they hold."""
    hits, both = hits_SS.astype(np.float64), both_SS.astype(np.float64)
    true, holds = hits.diagonal(), both.diagonal()
    single = 2 * true / (holds + fires)
    first = int(single.argmax())
    pairs = np.stack(
        [
            2 * hits / (both + fires),
            2 * (true[:, None] - hits) / (holds[:, None] - both + fires),
            2 * (true[:, None] + true - hits) / (holds[:, None] + holds - both + fires),
        ]
    )
    operator, a, b = np.unravel_index(
        pairs.argmax(), pairs.shape
    )  # the first of equals, so A before B where they may change places
    if pairs[operator, a, b] < single[first] + GAIN:
        return float(single[first]), 0, first, -1
    return float(pairs[operator, a, b]), int(operator) + 1, int(a), int(b)


# ---------------------------------------------------------------------------------------- scoring


class _HeldOut:
    """The rows that rules are scored on, by literal and by latent."""

    def __init__(self, fit: Rows, score: Rows, seed: int) -> None:
        self.n_rows = len(score.tokens)
        self.firing, self.literals, self.fitted = score.firing.tocsc(), score.literals.tocsc(), fit.firing.tocsc()
        self.permutation = np.random.default_rng(seed).permutation(self.n_rows)
        self.window = _windows(score.position)
        self.n_windows = int(self.window[-1]) + 1 if self.n_rows else 0
        n_fit = len(fit.tokens)
        self.distinct, tokens = np.unique(np.concatenate([fit.tokens, score.tokens]), return_inverse=True)
        self.fit_tokens, self.tokens = tokens[:n_fit], tokens[n_fit:]
        self.fit_count, self.count = self._per_token(self.fit_tokens), self._per_token(self.tokens)

    def score(self, latent: int, rule: np.ndarray) -> None:
        """Fill in the scores of one rule, a structured array of length 1."""
        fires = _column(self.firing, latent)
        rule["score_rows"] = len(fires)
        if rule["first"][0] < 0 or len(fires) < MINIMUM:
            return
        holds = holding(self.literals, int(rule["first"][0]), OPERATORS[rule["operator"][0]], int(rule["second"][0]))
        claimed = np.flatnonzero(holds)
        hits = fires[holds[fires]]
        rule["precision"] = len(hits) / len(claimed) if len(claimed) else 0.0
        rule["recall"] = len(hits) / len(fires)
        rule["f1"] = 2 * len(hits) / (len(claimed) + len(fires))
        fires_T = self._per_token(self.tokens[fires])
        rule["token_f1"] = self._token_f1(_column(self.fitted, latent), fires_T)
        rule["by_token"] = rule["token_f1"] >= rule["f1"] - GAIN
        rule["detection"] = self._detection(claimed, fires)
        rule["null"] = self._detection(claimed, self.permutation[fires])
        rule["hard_negative"] = self._hard_negative(
            fires_T, self._per_token(self.tokens[claimed]), self._per_token(self.tokens[hits])
        )

    def _per_token(self, tokens: np.ndarray) -> Int[np.ndarray, " T"]:
        return np.bincount(tokens, minlength=len(self.distinct))

    def _detection(self, claimed: np.ndarray, fires: np.ndarray) -> float:
        """Balanced accuracy over windows: one is claimed, or active, when any of its rows is."""
        said, active = np.zeros(self.n_windows, dtype=bool), np.zeros(self.n_windows, dtype=bool)
        said[self.window[claimed]] = True
        active[self.window[fires]] = True
        n_active = int(active.sum())
        if min(n_active, self.n_windows - n_active) < MINIMUM:
            return np.nan
        true, false = int((said & active).sum()), int((said & ~active).sum())
        return (true / n_active + 1 - false / (self.n_windows - n_active)) / 2

    def _token_f1(self, fitted: Int[np.ndarray, " n"], fires_T: Int[np.ndarray, " T"]) -> float:
        """F1 of the set of tokens that is best on the fit: those on which the latent fires most often, down to some share."""
        fit_T = self._per_token(self.fit_tokens[fitted])
        tokens = np.flatnonzero(fit_T)
        tokens = tokens[np.argsort(-fit_T[tokens] / self.fit_count[tokens], kind="stable")]
        f1 = 2 * fit_T[tokens].cumsum() / (self.fit_count[tokens].cumsum() + len(fitted))
        chosen = tokens[: f1.argmax() + 1]
        return 2 * fires_T[chosen].sum() / (self.count[chosen].sum() + fires_T.sum())

    def _hard_negative(self, fires_T: np.ndarray, claimed_T: np.ndarray, hits_T: np.ndarray) -> float:
        """Mean of recall and specificity, tokens weighted by the rows on which the latent fires.

        Tokens on which it always fires have no negatives and are left out.
        """
        silent_T = self.count - fires_T
        mixed = (fires_T > 0) & (silent_T > 0)
        weight = fires_T[mixed]
        if weight.sum() < MINIMUM:
            return np.nan
        false = (claimed_T - hits_T)[mixed] / silent_T[mixed]
        return float((hits_T[mixed].sum() + (weight * (1 - false)).sum()) / (2 * weight.sum()))


def holding(literals: Matrix, first: int, operator: str, second: int) -> Bool[np.ndarray, " R"]:
    """Where a rule holds, of literals `[R, M]` in CSC."""
    holds = np.zeros(literals.shape[0], dtype=bool)
    holds[_column(literals, first)] = True
    other = _column(literals, second) if operator else np.empty(0, np.int64)
    if operator == "and":
        both = other[holds[other]]
        holds[:] = False
        holds[both] = True
    else:
        holds[other] = operator == "or"
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


def _windows(position: Int[np.ndarray, " R"]) -> Int[np.ndarray, " R"]:
    """The number of each row's window: contexts are cut at multiples of `WINDOW`."""
    begins = (np.diff(position // WINDOW) != 0) | (np.diff(position) <= 0)
    return np.concatenate([[0], np.cumsum(begins)]) if len(position) else np.empty(0, np.int64)

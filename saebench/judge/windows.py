"""What a judge sees of a latent: examples of several strengths from training rows, and windows of held-out ones.

Legend: R sampled held-out rows, W windows, n tokens of a window.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from saebench.index import FeatureIndex
from saebench.index.derive import firing
from saebench.index.examples import show_all
from saebench.index.explanations import FEWEST
from saebench.index.reader import Context, Example, Latent
from saebench.index.rules import WINDOW, halves
from saebench.sae import SAE

AROUND = WINDOW // 2
"""tokens on either side of an example's peak"""
_TOKENS = 8  # of a token list

Kind = Literal["active", "hard", "random"]


class Passage(NamedTuple):
    """Training tokens around a firing."""

    pieces: list[str]
    """the text of each token; none of a special one, which would be more than text to a judge"""
    fires: Bool[np.ndarray, " n"]
    strength: int
    """of the firing in the middle, in tenths of the strongest example's, rounded up"""


class Window(NamedTuple):
    """Consecutive held-out tokens."""

    kind: Kind
    """whether the latent fires in it, and if not whether a token is there on which it often does"""
    pieces: list[str]
    fires: Bool[np.ndarray, " n"]
    decoy: Bool[np.ndarray, " n"]
    """as many tokens on which it is silent, to be marked wrongly"""
    by_rule: bool | None
    """whether the latent's rule holds anywhere in it; None where there is no rule to apply"""
    by_tokens: bool | None
    """whether a token of its list is in it; None where there is no list"""


def token_list(index: FeatureIndex, latent: int) -> Int[np.ndarray, " k"]:
    """The tokens on which a latent fires most often: windows that hold one of them though it is silent are the hard ones."""
    tokens = index.top_tokens[latent][:_TOKENS]
    return tokens[tokens >= 0].astype(np.int64)


class HeldOut:
    """The held-out rows of an index, in windows of `WINDOW` rows that lie in one half of the documents."""

    def __init__(self, index: FeatureIndex) -> None:
        sample = index.sample("validation")
        if not len(sample.rows):
            raise ValueError(
                f"{index.store.folder} has no held-out rows to score explanations on; harvest with --validation-tokens"
            )
        self._index, self._rows = index, sample.rows.astype(np.int64)
        self._tokens, doc_id = self._columns()
        in_context, per_context = self._rows % index.context, -(-index.context // WINDOW)
        number = self._rows // index.context * per_context + in_context // WINDOW
        _, self._first, self._window = np.unique(number, return_index=True, return_inverse=True)
        of_second = halves(doc_id)
        second = np.bincount(self._window, of_second) / np.bincount(self._window)
        self.half = np.where((second > 0) & (second < 1), -1, second).astype(np.int64)
        """`[W]` the half that a window lies in, -1 where in both"""
        self._firing = firing(sample, index.d_sae).tocsc()
        self._special = _special(index)

    def _columns(self) -> tuple[Int[np.ndarray, " R"], Int[np.ndarray, " R"]]:
        """(tokens, documents) of the sampled rows."""
        tokens, documents, first = [], [], 0
        for shard in self._index.store.shards:
            mine = self._rows[slice(*np.searchsorted(self._rows, [first, first + shard.n_rows]))] - first
            first += shard.n_rows
            if len(mine):
                tokens.append(shard.column("tokens")[mine].astype(np.int64))
                documents.append(shard.column("doc_id")[mine].astype(np.int64))
        return np.concatenate(tokens), np.concatenate(documents)

    def active(self, latent: int) -> Int[np.ndarray, " w"]:
        """The windows in which a latent fires."""
        return np.unique(self._window[self._places(latent)])

    def often(self, latent: int) -> bool:
        """Whether a latent fires in enough windows of each half for scores."""
        counts = np.bincount(self.half[self.active(latent)] + 1, minlength=3)
        return bool(counts[1:].min() >= FEWEST)

    def _places(self, latent: int) -> Int[np.ndarray, " r"]:
        return self._firing.indices[self._firing.indptr[latent] : self._firing.indptr[latent + 1]]

    def draw(self, latent: int, n: int, seed: int) -> tuple[list[Window], list[Window]]:
        """Of each half up to `n` windows in which the latent fires and as many in which it is silent, half of these hard; in random order."""
        random = np.random.default_rng([seed, latent])
        listed = np.isin(self._tokens, token_list(self._index, latent))
        kinds = np.zeros(len(self.half), np.int64)  # random, hard, active
        kinds[self._window[listed]] = 1
        kinds[self.active(latent)] = 2
        drawn: list[np.ndarray] = []
        for half in (0, 1):
            silent, hard, active = (
                random.permutation(np.flatnonzero((kinds == kind) & (self.half == half))) for kind in range(3)
            )
            n_hard = min(len(hard), max(n // 2, n - len(silent)))
            drawn.append(random.permutation(np.concatenate([active[:n], hard[:n_hard], silent[: n - n_hard]])))
        shown = self._shown(latent, np.concatenate(drawn), kinds, random)
        return shown[: len(drawn[0])], shown[len(drawn[0]) :]

    def _shown(self, latent: int, windows: np.ndarray, kinds: np.ndarray, random: np.random.Generator) -> list[Window]:
        """Those windows, with what the rule says of them where it is applied to their whole contexts."""
        contexts = [self._index.context_of(int(self._rows[self._first[window]])) for window in windows]
        texts = [context.tokens for context in contexts]
        held, held_list = self._index.holds(latent, texts), self._index.holds(latent, texts, "lists")
        fires = self._places(latent)
        shown = []
        for number, (window, context) in enumerate(zip(windows.tolist(), contexts, strict=True)):
            start = context.peak // WINDOW * WINDOW
            cut = slice(start, start + WINDOW)
            counted = self._rows[self._window == window] - context.rows.start - start
            firing_rows = self._rows[fires[self._window[fires] == window]] - context.rows.start - start
            pieces = _pieces(context, self._special)[cut]
            marks, decoy = np.zeros(len(pieces), bool), np.zeros(len(pieces), bool)
            marks[firing_rows] = True
            silent = np.setdiff1d(counted, firing_rows)
            decoy[random.permutation(silent)[: len(firing_rows)]] = True
            kind: Kind = ("random", "hard", "active")[kinds[window]]
            by_rule = None if held is None else bool(held[number][cut][counted].any())
            by_tokens = None if held_list is None else bool(held_list[number][cut][counted].any())
            shown.append(Window(kind, pieces, marks, decoy, by_rule, by_tokens))
        return shown


def examples(index: FeatureIndex, sae: SAE, latents: Sequence[int], n: int) -> list[list[Passage]]:
    """About `n` passages of each latent, the strongest first: a quarter of its very strongest, the rest from all strengths alike."""
    chosen = [_chosen(index[latent], n) for latent in latents]
    asked = [(latent, example) for latent, mine in zip(latents, chosen, strict=True) for example in mine]
    shown, special = iter(show_all(index, sae, asked, AROUND)), _special(index)
    return [
        [
            Passage(_pieces(each.context, special), each.values > 0, math.ceil(10 * example.value / mine[0].value))
            for example, each in zip(mine, shown, strict=False)
        ]
        for mine in chosen
    ]


def _chosen(latent: Latent, n: int) -> list[Example]:
    chosen = {example.row: example for example in latent.top[: max(1, n // 4)]}
    left = [[*interval.examples] for interval in reversed(latent.intervals)]
    while len(chosen) < n and any(left):
        for group in left:
            if group and len(chosen) < n:
                example = group.pop(0)
                chosen.setdefault(example.row, example)
    return sorted(chosen.values(), key=lambda example: -example.value)


def _special(index: FeatureIndex) -> list[int]:
    tokenizer = index.store.tokenizer()
    return [] if tokenizer is None else tokenizer.all_special_ids


def _pieces(context: Context, special: list[int]) -> list[str]:
    return ["" if token in special else piece for token, piece in zip(context.tokens, context.pieces, strict=True)]

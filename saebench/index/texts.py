"""Which latents' examples hold a piece of text: the tokens around their strongest firings, searched as bytes.

Legend: E different rows of examples, T tokens around them, F latents, N examples of each.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from saebench.index.reader import FeatureIndex
from saebench.pieces import TokenBytes

AROUND = 16  # tokens on either side of a firing that are its text, as examples are shown
_APART = b"\xff"  # in no text: UTF-8 has no such byte


class Matches(NamedTuple):
    """The latents with examples that hold a text: those that fire in it most often first, then those that have it most often."""

    latents: np.ndarray
    """`[M]`"""
    within: np.ndarray
    """`[M]` how many of the strongest examples hold it"""
    firing: np.ndarray
    """`[M]` in how many of these the latent fires most on a token of it"""
    rows: np.ndarray
    """`[M]` the row of the strongest of these, or else of those"""


class ExampleTexts:
    """The texts of an index's strongest examples, read once. Raises ValueError where the store is gone."""

    def __init__(self, index: FeatureIndex) -> None:
        self._rows_FN = index.top_rows  # -1 for none
        self._rows_E, example = np.unique(self._rows_FN, return_inverse=True)
        self._example_FN = example.reshape(self._rows_FN.shape)
        self._size = index.context
        rows, contexts, tokens = zip(*self._around(index), strict=True)
        self._rows_T, self._contexts_T = np.concatenate(rows), np.concatenate(contexts)
        pieces = list(map(TokenBytes(index.store.tokenizer()).__getitem__, np.concatenate(tokens).tolist()))
        # What does not follow in its context stands apart, so that no text is found across the gap.
        for end in np.flatnonzero((np.diff(self._rows_T) != 1) | (np.diff(self._contexts_T) != 0)).tolist():
            pieces[end] += _APART
        self._text = b"".join(pieces).lower()
        self._starts_T = np.cumsum([0, *map(len, pieces)])[:-1]

    def _around(self, index: FeatureIndex) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of each shard the rows around examples, the first rows of their contexts, and their tokens."""
        first = 0
        for shard in index.store.shards:
            here = self._rows_E[(self._rows_E >= first) & (self._rows_E < first + shard.n_rows)] - first
            begin = here // self._size * self._size
            edges = np.zeros(shard.n_rows + 1, np.int64)
            np.add.at(edges, np.maximum(here - AROUND, begin), 1)
            np.add.at(edges, np.minimum(here + AROUND + 1, np.minimum(begin + self._size, shard.n_rows)), -1)
            rows = np.flatnonzero(edges.cumsum()[:-1])
            yield rows + first, rows // self._size * self._size + first, shard.column("tokens")[rows]
            first += shard.n_rows

    def search(self, text: str) -> Matches:
        """Examples that hold `text`, whatever the case of its letters. Raises ValueError for an empty one."""
        if not text.strip():
            raise ValueError(f"the text is {text!r}; expected at least one character that is no space")
        within_E, firing_E = np.zeros(len(self._rows_E) + 1, np.int64), np.zeros(len(self._rows_E) + 1, np.int64)
        for wanted in {form.encode().lower() for form in (text, text.lower(), text.upper(), text.capitalize())}:
            found = self._found(wanted)
            place = np.searchsorted(self._starts_T, found, "right") - 1
            last = self._rows_T[np.searchsorted(self._starts_T, found + len(wanted) - 1, "right") - 1]
            first, context = self._rows_T[place], self._contexts_T[place]
            for marks_E, low, high in (
                (within_E, np.maximum(last - AROUND, context), np.minimum(first + AROUND, context + self._size - 1)),
                (firing_E, first, last),
            ):
                np.add.at(marks_E, np.searchsorted(self._rows_E, low, "left"), 1)
                high = np.maximum(high, low - 1)  # no example holds what is longer than its text
                np.add.at(marks_E, np.searchsorted(self._rows_E, high, "right"), -1)
        within_FN, firing_FN = (marks_E.cumsum()[:-1][self._example_FN] > 0 for marks_E in (within_E, firing_E))
        within_F, firing_F = within_FN.sum(1), (firing_FN & within_FN).sum(1)
        best_F = np.where(firing_F > 0, (firing_FN & within_FN).argmax(1), within_FN.argmax(1))
        order = np.lexsort((-within_F, -firing_F))
        order = order[within_F[order] > 0]
        return Matches(order, within_F[order], firing_F[order], self._rows_FN[order, best_F[order]])

    def _found(self, wanted: bytes) -> np.ndarray:
        """Places in the text."""
        places, place = [], self._text.find(wanted)
        while place >= 0:
            places.append(place)
            place = self._text.find(wanted, place + 1)
        return np.array(places, np.int64)

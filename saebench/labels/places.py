"""Literals of several tokens before one: `token ":" and "def" at −5 and class: word at −4`.

No labeller gives them all, there are too many: they are asked about one by one. R rows, W places, V vocabulary.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from saebench.labels.stretch import Stretch
from saebench.labels.tokens import CLASS_NAMES, Vocabulary, vocabulary_of

REACH = 32
"""tokens before one that are looked at"""


class Member(NamedTuple):
    """A fact of one token, and where that is."""

    what: int
    """a token, or V + the number of a class"""
    place: int | None
    """so many tokens before, 0 for the token itself; None: any of the `REACH` before"""


Conjunction = tuple[Member, ...]
"""Facts that all hold; those of the token itself come first, then from the furthest to the nearest."""


class Places:
    """Tokens, and those before each, and what holds of them."""

    def __init__(self, texts: list[bytes], stretches: Iterable[Stretch] = ()) -> None:
        """`texts` are the bytes of every token; without stretches there are no rows, and what is known of tokens alone."""
        self._known: Vocabulary = vocabulary_of(tuple(texts))
        self._size = len(texts)
        parts = [np.stack([_at(stretch, place) for place in range(REACH + 1)]) for stretch in stretches]
        self._tokens_WR: Int[np.ndarray, "W R"] = np.concatenate([np.zeros((REACH + 1, 0), np.int32), *parts], 1)
        self._held: dict[Member, Bool[np.ndarray, " R"]] = {}

    def facts(self, token: int, place: int) -> list[Member]:
        """What can be said of a token so many before another, the most particular first."""
        if not 0 <= token < self._size:
            return []
        same = int(self._known.same[token])
        classes = [Member(self._size + int(number), place) for number in np.flatnonzero(self._known.classes[token])]
        return [Member(same, place), *([Member(same, None)] if place else []), *classes]

    def holds(self, conjunction: Conjunction) -> Bool[np.ndarray, " R"]:
        """Where all of it holds."""
        return np.logical_and.reduce([self._holds(member) for member in conjunction])

    def forget(self) -> None:
        """Drop what was kept of members that were asked about."""
        self._held.clear()

    def _holds(self, member: Member) -> Bool[np.ndarray, " R"]:
        if member not in self._held:
            there_WR = self._tokens_WR[1:] if member.place is None else self._tokens_WR[member.place][None]
            is_it = (
                self._known.same == member.what
                if member.what < self._size
                else self._known.classes[:, member.what - self._size]
            )
            self._held[member] = np.asarray(is_it[there_WR].any(0))
        return self._held[member]

    def particular(self, member: Member) -> int:
        """How much a fact says: 3 of a token in its place, 2 of one in any, 1 of a class."""
        return 1 if member.what >= self._size else 2 if member.place is None else 3

    def said(self, conjunction: Conjunction) -> str:
        """A conjunction in words."""
        return " and ".join(self._said(member) for member in conjunction)

    def _said(self, member: Member) -> str:
        is_class = member.what >= self._size
        what = f"class: {CLASS_NAMES[member.what - self._size]}" if is_class else self._known.names[member.what]
        if member.place == 0:
            return what if is_class else f"token {what}"
        return f"{what} before" if member.place is None else f"{what} at −{member.place}"


def _at(stretch: Stretch, place: int) -> Int[np.ndarray, " R"]:
    rows = stretch.before(place)
    return np.where(rows >= 0, stretch.tokens[rows], len(stretch.texts)).astype(np.int32)

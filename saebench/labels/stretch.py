"""What a labeller is given: a stretch of a token stream, the rows of it that are to be labelled, and the texts around them.

Legend: n rows of a stream, r of them that are labelled, V vocabulary, k entries of a block.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

_WHITE = np.frombuffer(b" \t\n\r\f\v", dtype=np.uint8)


class Stream(NamedTuple):
    """Rows of one split as a store has them: whole contexts in order, none left out between.

    `keep` is False at special tokens, which have no text and no literal.
    """

    tokens: Int[np.ndarray, " n"]
    doc_id: Int[np.ndarray, " n"]
    position: Int[np.ndarray, " n"]
    keep: Bool[np.ndarray, " n"]


class Block(NamedTuple):
    """Some literals and where they hold: `names[codes[i]]` on the `places[i]`-th of the rows that are labelled."""

    names: Sequence[str]
    codes: Int[np.ndarray, " k"]
    places: Int[np.ndarray, " k"]


def values_block(values: np.ndarray, names: Mapping[int, str] | list[str]) -> Block:
    """One literal a row, by the number of its name; none where the number is negative."""
    places = np.flatnonzero(values >= 0)
    there, codes = np.unique(values[places], return_inverse=True)
    return Block([names[value] for value in there.tolist()], codes, places)


def flags_block(flags: Bool[np.ndarray, "r m"], names: Sequence[str]) -> Block:
    """The literals of a table of yes and no."""
    places, codes = np.nonzero(flags)
    return Block(names, codes, places)


class Pieces(NamedTuple):
    """A document's bytes, and its tokens as spans `[start, end)` of them, in order.

    A token lies where its `anchor` is, its first byte that is not white space (`start` where all are).
    """

    source: bytes
    start: Int[np.ndarray, " n"]
    end: Int[np.ndarray, " n"]
    anchor: Int[np.ndarray, " n"]


class Passage(NamedTuple):
    """What a stretch has of a document."""

    name: str
    """of the document, empty where it has none"""
    pieces: Pieces
    rows: Int[np.ndarray, " n"]
    """of its tokens in the stream"""
    places: Int[np.ndarray, " n"]
    """of its tokens among the rows that are labelled, -1 where they are not"""


@dataclass(frozen=True, eq=False)
class Stretch:
    """Rows of a stream of which some are labelled."""

    stream: Stream
    texts: Sequence[bytes]
    """the bytes of every token of the tokenizer, `[V]` (`TokenBytes.all`)"""
    documents: Mapping[int, str]
    """names of documents"""
    rows: Int[np.ndarray, " r"]
    """those that are labelled, ascending"""

    @cached_property
    def keep(self) -> Bool[np.ndarray, " r"]:
        return self.stream.keep[self.rows]

    @cached_property
    def tokens(self) -> Int[np.ndarray, " n"]:
        """Of the stream, V where they have no text: special ones, and ids beyond the tokenizer's, as padded embeddings have."""
        tokens, size = self.stream.tokens.astype(np.int64), len(self.texts)
        return np.where(self.stream.keep & (tokens < size), tokens, size)

    def before(self, distance: int) -> Int[np.ndarray, " r"]:
        """The stream's row that lies a distance before each, -1 where that is no text which the model has seen with it.

        What it has seen ends at special tokens and where a context begins.
        """
        found = self._reach[self.rows] >= distance
        return np.where(found, self.rows - distance, -1)

    @cached_property
    def _reach(self) -> Int[np.ndarray, " n"]:
        """How many rows of text before each of the stream belong to the same document and context; 0 at special tokens."""
        stream = self.stream
        joined = (np.diff(stream.doc_id) == 0) & (np.diff(stream.position) == 1) & stream.keep[1:] & stream.keep[:-1]
        row = np.arange(len(stream.tokens))
        begins = np.where(np.concatenate([[True], ~joined])[: len(row)], row, 0)
        return row - np.maximum.accumulate(begins) if len(row) else row

    @cached_property
    def passages(self) -> list[Passage]:
        """The documents that any of the rows is of, with text, each as far as it lies in the stream, across its contexts."""
        place = np.full(len(self.stream.tokens), -1)
        place[self.rows] = np.arange(len(self.rows))
        return list(self._passages(place))

    def _passages(self, place: np.ndarray) -> Iterator[Passage]:
        kept, texts = np.flatnonzero(self.stream.keep), [*self.texts, b""]
        for rows in np.split(kept, np.flatnonzero(np.diff(self.stream.doc_id[kept])) + 1):
            if (place[rows] < 0).all():
                continue
            parts = [texts[token] for token in self.tokens[rows].tolist()]
            end = np.cumsum([len(part) for part in parts])
            if end[-1] == 0:
                continue
            source = b"".join(parts)
            start = np.concatenate([[0], end[:-1]])
            solid = np.flatnonzero(~np.isin(np.frombuffer(source, np.uint8), _WHITE))
            next_solid = np.append(solid, len(source))[np.searchsorted(solid, start)]
            pieces = Pieces(source, start, end, np.where(next_solid < end, next_solid, start))
            yield Passage(self.documents.get(int(self.stream.doc_id[rows[0]]), ""), pieces, rows, place[rows])

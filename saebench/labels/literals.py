"""Boolean literals of tokens: which there are, and the rows of a token stream on which each holds.

Legend: n rows of a stream, r of them that are labelled, V vocabulary, M literals.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from scipy import sparse

from saebench.labels import syntax

_WHITE = np.frombuffer(b" \t\n\r\f\v", dtype=np.uint8)
_POSITIONS = (2, 4, 8, 16, 32, 64, 128)
_INDENTS = (0, 4, 8, 12, 16)  # columns; a tab counts as four
# Of a token's text, from its first to its last character.
_CLASSES = {
    "white space": r"\s+",
    "line break": r"[^\S\n]*\n\s*",
    "line break and indent": r"\s*\n[ \t]+",
    "starts with space": r" [\s\S]*",
    "number": r" ?\d+",
    "word": r" ?[^\W\d_]+",
    "identifier-like": r" ?[^\W\d]\w*",
    "one letter": r" ?[^\W\d_]",
    "lower case": r" ?[a-z]+",
    "capitalised": r" ?[A-Z][a-z]+",
    "all capitals": r" ?[A-Z][A-Z]+",
    "not ASCII": r"[\s\S]*[^\x00-\x7f][\s\S]*",
    "punctuation": r" ?[^\w\s]+",
    "has underscore": r"[\s\S]*_[\s\S]*",
    "opens bracket": r" ?[^\w\s]*[(\[{]",
    "closes bracket": r" ?[)\]}][^\w\s]*",
    "quotation mark": r" ?[^\w\s]*['\"][^\w\s]*",
    "ends with comma": r"[^\w\s]*,",
    "ends with colon": r"[^\w\s]*:",
    "comparison or assignment": r" ?[-+*/%&|^<>=!:]?=|//=|\*\*=| ?[<>]",
    "arithmetic": r" ?(?:[-+*/%@&|^~]|//|\*\*|<<|>>)",
}
_BROKEN = "not whole characters"
_LINE = ("first of line", "continues a word", *(f"position < {limit}" for limit in _POSITIONS))
_LINE += (*(f"line indent <= {limit}" for limit in _INDENTS),)


class Stream(NamedTuple):
    """Rows of one split as a store has them: whole contexts in order, none left out between.

    `keep` is False at special tokens, which have no text and no literal.
    """

    tokens: Int[np.ndarray, " n"]
    doc_id: Int[np.ndarray, " n"]
    position: Int[np.ndarray, " n"]
    keep: Bool[np.ndarray, " n"]


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The literals that a corpus is described with; every stream labelled with it has the same M columns."""

    texts: Sequence[bytes]
    """the bytes of every token of the tokenizer, `[V]` (`TokenBytes.all`)"""
    tokens: Int[np.ndarray, " T"]
    """token ids whose identity is a literal, ascending"""
    previous: Int[np.ndarray, " P"]
    """token ids whose identity is a literal of the token after, ascending"""
    bigrams: Int[np.ndarray, "G 2"]
    """pairs of token ids that, right before a token, are a literal of it, in lexical order"""

    @cached_property
    def names(self) -> list[str]:
        """What each of the M literals says, in the order of the columns."""
        return [
            *(f"token is {_quoted(self.texts[token])}" for token in self.tokens),
            *(f"class: {name}" for name in (*_CLASSES, _BROKEN)),
            *(f"previous token is {_quoted(self.texts[token])}" for token in self.previous),
            *(f"after {_quoted(self.texts[a])} {_quoted(self.texts[b])}" for a, b in self.bigrams),
            *_LINE,
            *syntax.NAMES,
        ]

    @cached_property
    def by_token(self) -> Any:
        """Literals that are of a token alone, `[V + 1, T + classes]`; the last row is of what has no text."""
        flags = _vocabulary_flags(self.texts)
        return sparse.hstack([_one_hot(np.arange(len(self.texts) + 1), self.tokens), flags], format="csr")

    @cached_property
    def word_edges(self) -> tuple[np.ndarray, np.ndarray]:
        """`[V + 1]` whether each token begins, and ends, inside a word."""
        return _word_edges(self.texts)


def choose_literals(
    stream: Stream, texts: Sequence[bytes], tokens: int = 1500, previous: int = 600, bigrams: int = 600, least: int = 20
) -> Vocabulary:
    """The most frequent tokens, preceding tokens and preceding pairs of a stream, each at least `least` times in it."""
    current, before, pair = _with_previous(stream, len(texts))
    identity = _frequent(current, len(texts), tokens, least)
    preceding = _frequent(before, len(texts), previous, least)
    keys = _frequent(pair, len(texts) ** 2, bigrams, least)
    return Vocabulary(texts, identity, preceding, np.stack(np.divmod(keys, len(texts)), axis=1))


def _frequent(values: np.ndarray, limit: int, most: int, least: int) -> np.ndarray:
    """Of values below `limit` the `most` frequent, ascending; of equally frequent ones the smaller."""
    found, counts = np.unique(values[values < limit], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    return np.sort(found[order[counts[order] >= least]])


def _with_previous(stream: Stream, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each row's token, the one before it, and the two before it as `first * size + second`; beyond where there is none.

    What is before is what the model has seen: it ends at special tokens and where a context begins.
    """
    current = np.where(stream.keep, stream.tokens, size).astype(np.int64)
    joined = (np.diff(stream.doc_id) == 0) & (np.diff(stream.position) == 1)
    before = np.full_like(current, size)
    before[1:][joined] = current[:-1][joined]
    earlier = np.full_like(current, size)
    earlier[1:][joined] = before[:-1][joined]
    pair = np.where((before < size) & (earlier < size), earlier * size + before, size * size)
    for values, none in ((before, size), (pair, size * size)):
        values[~stream.keep] = none
    return current, before, pair


def label(
    stream: Stream, vocabulary: Vocabulary, documents: Mapping[int, str], rows: Int[np.ndarray, " r"] | None = None
) -> sparse.csr_array:
    """Which literals hold on which rows, `[r, M]` bool, of all rows or of those given (ascending); about 20 of them on a row of Python source.

    `documents` names the documents: what ends in .py is read as Python, and so is what parses as it. Labels of
    lines and syntax come from a document's whole text in the stream, also where a context begins within it.
    """
    size, n = len(vocabulary.texts), len(stream.tokens)
    rows = np.arange(n) if rows is None else rows
    current, before, pair = (values[rows] for values in _with_previous(stream, size))
    keys = vocabulary.bigrams @ np.array([size, 1])
    starts_word, ends_word = vocabulary.word_edges
    line = np.zeros((len(rows), len(_LINE)), dtype=bool)
    line[:, 1] = starts_word[current] & ends_word[before]
    line[:, 2 : 2 + len(_POSITIONS)] = stream.position[rows, None] < np.array(_POSITIONS)
    found = [(np.empty(0, np.int32), np.empty(0, np.int32))]
    place = np.full(n, -1, np.int32)
    place[rows] = np.arange(len(rows))
    for places, pieces in _documents(stream, vocabulary.texts, place):
        wanted = places >= 0
        first, indent = _line_facts(pieces)
        line[places[wanted], 0] = first[wanted]
        line[places[wanted], 2 + len(_POSITIONS) :] = indent[wanted, None] <= np.array(_INDENTS)
        name = documents.get(int(stream.doc_id[rows[places[wanted][0]]]), "")
        tokens, ids = syntax.label_source(pieces, name.endswith(".py"), wanted)
        found.append((places[tokens], ids.astype(np.int32)))
    line[~stream.keep[rows]] = False
    places, ids = (np.concatenate(part) for part in zip(*found, strict=True))
    in_source = sparse.coo_array((np.ones(len(places), bool), (places, ids)), shape=(len(rows), len(syntax.NAMES)))
    parts = [
        vocabulary.by_token[current],
        _one_hot(before, vocabulary.previous),
        _one_hot(pair, keys),
        sparse.csr_array(line),
    ]
    found_rM: Any = sparse.hstack([*parts, in_source.tocsr()], format="csr")
    offsets = found_rM.indices.astype(np.int32), found_rM.indptr.astype(np.int32)  # half of what scipy has made of them
    return sparse.csr_array((found_rM.data, *offsets), shape=found_rM.shape)


def _one_hot(values: np.ndarray, chosen: np.ndarray) -> sparse.csr_array:
    """Row r is true in the column of `chosen` (ascending) that equals `values[r]`, if any does."""
    column = np.searchsorted(chosen, values)
    held = np.append(chosen, -1)[column] == values
    offsets = np.concatenate([[0], np.cumsum(held)])
    return sparse.csr_array((np.ones(offsets[-1], bool), column[held], offsets), shape=(len(values), len(chosen)))


def _vocabulary_flags(texts: Sequence[bytes]) -> sparse.csr_array:
    """The classes of every token, and a last row of none for what is no text, `[V + 1, classes]`."""
    flags = np.zeros((len(texts) + 1, len(_CLASSES) + 1), dtype=bool)
    patterns = [re.compile(pattern) for pattern in _CLASSES.values()]
    for token, text in enumerate(texts):
        try:
            decoded = text.decode()
        except UnicodeDecodeError:
            flags[token, -1] = True
            continue
        flags[token, :-1] = [pattern.fullmatch(decoded) is not None for pattern in patterns]
    return sparse.csr_array(flags)


def _word_edges(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Whether each token starts and ends with a character of a word, `[V + 1]` each."""
    decoded = [text.decode(errors="replace") for text in texts]
    starts = [re.match(r"\w", text) is not None for text in decoded]
    ends = [re.search(r"\w\Z", text) is not None for text in decoded]
    return np.array([*starts, False]), np.array([*ends, False])


def _documents(
    stream: Stream, texts: Sequence[bytes], place: Int[np.ndarray, " n"]
) -> Iterator[tuple[np.ndarray, syntax.Pieces]]:
    """(`place` of the rows with text, the text and where they lie in it) of each document with any `place` that is not -1."""
    kept = np.flatnonzero(stream.keep)
    for rows in np.split(kept, np.flatnonzero(np.diff(stream.doc_id[kept])) + 1):
        if (place[rows] < 0).all():
            continue
        parts = [texts[token] for token in stream.tokens[rows].tolist()]
        end = np.cumsum([len(part) for part in parts])
        if end[-1] == 0:
            continue
        source = b"".join(parts)
        start = np.concatenate([[0], end[:-1]])
        solid = np.flatnonzero(~np.isin(np.frombuffer(source, np.uint8), _WHITE))
        next_solid = np.append(solid, len(source))[np.searchsorted(solid, start)]
        yield place[rows], syntax.Pieces(source, start, end, np.where(next_solid < end, next_solid, start))


def _line_facts(pieces: syntax.Pieces) -> tuple[Bool[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """(whether a token is the first of its line that is not white space, columns its line is indented by).

    A token's line is the one where it ends: a line break with the indent after it belongs to the line it opens.
    """
    data = np.frombuffer(pieces.source, np.uint8)
    lines = np.concatenate([[0], np.flatnonzero(data == ord("\n")) + 1])
    blank = (data == ord(" ")) | (data == ord("\t"))
    filled = np.append(np.flatnonzero(~blank), len(data))
    text = filled[np.searchsorted(filled, lines)]  # where the text of each line begins
    width = np.concatenate([[0], np.cumsum(np.where(data == ord("\t"), 4, 1))])
    of_line = (width[text] - width[lines])[np.searchsorted(lines, pieces.end, side="right") - 1]
    first = np.isin(pieces.anchor, text) & ~np.isin(data[np.minimum(pieces.anchor, len(data) - 1)], _WHITE)
    return first, of_line


def _quoted(text: bytes) -> str:
    try:
        return json.dumps(text.decode(), ensure_ascii=False)
    except UnicodeDecodeError:
        return repr(text)

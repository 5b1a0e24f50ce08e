"""Labels of any text: the token itself, those before it, its class, its position and its line."""

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Int

from saebench.labels.stretch import Block, Pieces, Stretch, flags_block, values_block

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
CLASS_NAMES = (*_CLASSES, "not whole characters")
"""of tokens, by their text alone"""
_LETTERS = (1, 2, 3)  # of the beginnings and ends of tokens that are literals
_LINE = ("first of line", *(f"line indent <= {limit}" for limit in _INDENTS))


class Vocabulary:
    """What is known of each token by its bytes alone; the last row, V, is of what has no text."""

    def __init__(self, texts: Sequence[bytes]) -> None:
        size = len(texts)
        known: dict[bytes, int] = {}
        self.same = np.array([known.setdefault(text, token) for token, text in enumerate(texts)] + [-1])
        """the first token of the same bytes"""
        decoded = [text.decode(errors="replace") for text in texts]
        folded = ["" if "\ufffd" in text else text.strip().lower() for text in decoded]
        groups: dict[str, int] = {}
        self.folded = np.array(
            [groups.setdefault(text, token) if text else -1 for token, text in enumerate(folded)] + [-1]
        )
        """the first token that reads the same but for case and white space, -1 where nothing is to be read"""
        size_of = np.bincount(self.folded[self.folded >= 0], minlength=size + 1)
        self.several = size_of > 1
        self.names = [quoted(text) for text in texts]
        self.folded_names = [json.dumps(text, ensure_ascii=False) for text in folded]
        self.affixes = [
            (*_numbered([cut(text) if len(text) > n else "" for text in folded]), form)
            for n in _LETTERS
            for form, cut in (("starts with", lambda text, n=n: text[:n]), ("ends with", lambda text, n=n: text[-n:]))
        ]
        """for beginnings and ends: the number of each token's, -1 for none; what they are; and which of the two"""
        self.classes = np.zeros((size + 1, len(CLASS_NAMES)), dtype=bool)
        patterns = [re.compile(pattern) for pattern in _CLASSES.values()]
        for token, text in enumerate(texts):
            try:
                own = text.decode()
            except UnicodeDecodeError:
                self.classes[token, -1] = True
                continue
            self.classes[token, :-1] = [pattern.fullmatch(own) is not None for pattern in patterns]

    def in_any_case(self, tokens: np.ndarray) -> np.ndarray:
        """The group of each token that has others beside it, -1 for the rest: those are told by the token itself."""
        folded = self.folded[tokens]
        return np.where(self.several[folded], folded, -1)


def _numbered(parts: list[str]) -> tuple[np.ndarray, list[str]]:
    numbers: dict[str, int] = {}
    of = np.array([numbers.setdefault(part, len(numbers)) if part else -1 for part in parts] + [-1])
    return of, [json.dumps(part, ensure_ascii=False) for part in numbers]


@lru_cache(maxsize=2)
def vocabulary_of(texts: tuple[bytes, ...]) -> Vocabulary:
    return Vocabulary(texts)


def label(stretch: Stretch) -> Iterator[Block]:
    """Literals of tokens alone, in the order of how much each says."""
    size = len(stretch.texts)
    vocabulary = vocabulary_of(tuple(stretch.texts))
    current = stretch.tokens[stretch.rows]
    before, earlier = (
        np.where(rows >= 0, stretch.tokens[rows], size) for rows in (stretch.before(1), stretch.before(2))
    )
    names, folded = vocabulary.names, vocabulary.folded_names
    yield values_block(vocabulary.same[current], _Named("token {}", names))
    yield values_block(vocabulary.in_any_case(current), _Named("token {} in any case", folded))
    yield flags_block(vocabulary.classes[current], [f"class: {name}" for name in CLASS_NAMES])
    for part, pieces, form in vocabulary.affixes:
        yield values_block(part[current], {number: f"token {form} {piece}" for number, piece in enumerate(pieces)})
    yield _pairs("tokens {} {}", vocabulary.same[before], vocabulary.same[current], names)
    yield values_block(vocabulary.same[before], _Named("after token {}", names))
    yield values_block(vocabulary.in_any_case(before), _Named("after token {} in any case", folded))
    yield _pairs("after tokens {} {}", vocabulary.folded[earlier], vocabulary.folded[before], folded)
    yield flags_block(vocabulary.classes[before], [f"after class: {name}" for name in CLASS_NAMES])
    position = stretch.stream.position[stretch.rows]
    early = (position[:, None] < np.array(_POSITIONS)) & stretch.keep[:, None]
    yield flags_block(early, [f"position < {limit}" for limit in _POSITIONS])
    for passage in stretch.passages:
        wanted = np.flatnonzero(passage.places >= 0)
        first, indent = _line_facts(passage.pieces)
        facts = np.column_stack([first, indent[:, None] <= np.array(_INDENTS)])[wanted]
        tokens_of, codes = np.nonzero(facts)
        yield Block(_LINE, codes, passage.places[wanted[tokens_of]])


class _Named(dict[int, str]):
    """Number of a token -> what the literal says, made for those that are asked for."""

    def __init__(self, form: str, names: Sequence[str]) -> None:
        super().__init__()
        self._form, self._names = form, names

    def __missing__(self, token: int) -> str:
        return self._form.format(self._names[token])


def _pairs(form: str, first: np.ndarray, second: np.ndarray, names: Sequence[str]) -> Block:
    """Two tokens that follow each other, by the numbers of their names; none where either is negative."""
    places = np.flatnonzero((first >= 0) & (second >= 0))
    pairs, codes = np.unique(first[places] * len(names) + second[places], return_inverse=True)
    both = (
        (names[a], names[b]) for a, b in zip(*(part.tolist() for part in np.divmod(pairs, len(names))), strict=True)
    )
    return Block([form.format(a, b) for a, b in both], codes, places)


def _line_facts(pieces: Pieces) -> tuple[Bool[np.ndarray, " n"], Int[np.ndarray, " n"]]:
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


def is_token(literal: str) -> bool:
    """Whether a literal names one token, and no more."""
    return re.fullmatch(r"token (\".*\"|b['\"].*['\"])", literal, re.DOTALL) is not None


def quoted(text: bytes) -> str:
    """A token as a literal names it: JSON of its text, or its bytes where they are no whole characters."""
    try:
        return json.dumps(text.decode(), ensure_ascii=False)
    except UnicodeDecodeError:
        return repr(text)

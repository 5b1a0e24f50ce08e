"""Labels of writing: words across their tokens, sentences, paragraphs, marks of layout, names and dates, and the language.

Words are runs of letters and digits, whole and case-folded, whatever their tokens are: also of identifiers in source.
"""

import json
import re
from collections.abc import Callable, Iterator

import numpy as np

from saebench.labels.stretch import Block, Passage, Stretch, flags_block, values_block

NEAR = 16
"""tokens before one among which a word is near"""
_STARTS, _ENDS = (3, 4), (2, 3, 4)  # letters of the beginnings and ends of words that are literals
_NEAR_LETTERS = 4  # of a word for it to be near: shorter ones are near everywhere
_SIGNS = rb"\xc2|\xc3[\x97\xb7]|\xe2[\x80-\xaf]|\xe3\x80|\xef\xbc[\x81-\x8f\x9a-\xa0]|\xf0\x9f"  # what no letter beyond ASCII begins with
_LETTER = rb"(?:[A-Za-z0-9_]|(?!" + _SIGNS + rb")[\xc3-\xf4][\x80-\xbf]+)"
_APOSTROPHE, _OPENING, _CLOSING = (
    rb"(?:'|\xe2\x80\x99)",
    rb"(?:[\"'(\[]|\xe2\x80[\x98\x9c])",
    rb"(?:[\"')\]]|\xe2\x80[\x99\x9d])",
)
_WORD = re.compile(_LETTER + rb"+(?:" + _APOSTROPHE + rb"[A-Za-z]+)?")
_PARAGRAPH = re.compile(rb"\n[ \t\r]*\n\s*")
_SENTENCE = re.compile(
    rb"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\b[A-Z])[.!?]"
    + _CLOSING
    + rb"*\s+(?="
    + _OPENING
    + rb"?[A-Z0-9\xc3-\xf4])|"
    + _PARAGRAPH.pattern
    + rb"|\xe3\x80\x82"
)
_MONTH = rb"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sep(?:tember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)"
_SPANS = {
    "heading": rb"(?m)^(?:#{1,6} [^\r\n]+|[^\r\n]+(?=\r?\n[=-]{3,}\r?$)|(?=[^\n]*[A-Z]{2})[A-Z0-9][A-Z0-9 ,.:'&-]{3,60}(?=\r?$))",
    "list item": rb"(?m)^[ \t]*(?:[-*+]|\xe2\x80\xa2|\(?(?:\d{1,3}|[a-zA-Z])[.)])[ \t]+[^\r\n]*",
    "markup": rb"</?[a-zA-Z][^<>\n]{0,200}>|&[a-zA-Z]{2,8};|\[[^\]\n]{1,80}\]\([^)\s]{1,200}\)|`[^`\n]+`|\*\*[^*\n]+\*\*",
    "address": rb"(?:https?://|www\.)[^\s<>\"]+|(?<![\w.+-])[\w.+-]+@[\w-]+\.[\w.-]+",
    "in brackets": rb"\([^()\n]{0,400}\)|\[[^\[\]\n]{0,400}\]",
    "in quotes": rb"\"[^\"\n]{1,400}\"|\xe2\x80\x9c[^\n]{1,400}?\xe2\x80\x9d|(?<![A-Za-z0-9])'[^'\n]{2,200}'(?![A-Za-z0-9])",
    "date": rb"(?i)\b(?:\d{1,2}(?:st|nd|rd|th)? )?" + _MONTH + rb"\.? \d{1,4}(?:, \d{4})?\b|\b\d{4}-\d\d-\d\d\b|\b\d{1,2}/\d{1,2}/\d{2,4}\b",
    "year": rb"\b1[0-9]{3}\b|\b20[0-9]{2}\b",
    "number": rb"\b\d[\d.,]*\b",
    "number in words": rb"(?i)\b(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty|fifty|hundred|thousand|million|billion|first|second|third)\b",
    "roman numeral": rb"\b[IVXLC]{2,}\b",
    "abbreviation": rb"\b(?:[A-Za-z]\.){2,}|\b[A-Z][a-z]{0,4}\.(?= [a-z\d(])",
}  # fmt: skip
_PATTERNS = {name: re.compile(pattern) for name, pattern in _SPANS.items()}
_AT = (2, 4, 8)  # words of a sentence
_WORD_FLAGS = (
    "first piece of a long word", "inside a word", "last piece of a long word", "capitalised name",
    "first word of a sentence", *(f"among the first {n} words of a sentence" for n in _AT),
    "first sentence of a paragraph", "after a word", *_SPANS,
)  # fmt: skip


def label(stretch: Stretch) -> Iterator[Block]:
    """Literals of words and of where they stand."""
    numbers: dict[str, int] = {}
    of_row = np.full(len(stretch.stream.tokens), -1)  # the word that each token is in
    previous = np.full(len(stretch.rows), -1)
    flags = np.zeros((len(stretch.rows), len(_WORD_FLAGS)), bool)
    for passage in stretch.passages:
        here = Words(passage, numbers)
        of_row[passage.rows] = np.where(here.inside, here.word, -1)
        wanted = np.flatnonzero(passage.places >= 0)
        previous[passage.places[wanted]] = here.previous[wanted]
        flags[passage.places[wanted]] = _flags(passage, here)[wanted]
    names = list(numbers)
    current = of_row[stretch.rows]
    yield values_block(current, [f"word {_shown(word)}" for word in names])
    for n in _STARTS:
        yield _part(current, names, lambda word, n=n: word[:n] if len(word) > n else "", "word starts with {}")
    for n in _ENDS:
        yield _part(current, names, lambda word, n=n: word[-n:] if len(word) > n else "", "word ends with {}")
    yield values_block(previous, [f"after word {_shown(word)}" for word in names])
    yield flags_block(flags, _WORD_FLAGS)
    yield _near(stretch, of_row, names)
    yield from _languages(stretch)


def _shown(word: str) -> str:
    return json.dumps(word, ensure_ascii=False)


def _part(current: np.ndarray, names: list[str], part: Callable[[str], str], form: str) -> Block:
    """A literal for each part of words, for those that have one."""
    parts: dict[str, int] = {}
    of_word = np.array([parts.setdefault(cut, len(parts)) if (cut := part(word)) else -1 for word in names] + [-1])
    return values_block(of_word[current], [form.format(_shown(cut)) for cut in parts])


class Words:
    """The words of a passage, by token: the word it is in, or last came to its end before it, and the one before that."""

    def __init__(self, passage: Passage, numbers: dict[str, int]) -> None:
        """`numbers` has the number of every word so far, and gets those that are new."""
        pieces = passage.pieces
        found = list(_WORD.finditer(pieces.source))
        end = len(pieces.source)
        self.spans = np.array([match.span() for match in found] or [(end, end)])
        known = [numbers.setdefault(match.group().decode(errors="replace").lower(), len(numbers)) for match in found]
        self.at = np.searchsorted(self.spans[:, 0], pieces.anchor, side="right") - 1
        self.inside = (self.at >= 0) & (pieces.anchor < self.spans[self.at, 1])
        padded = np.array([-1, -1, *known] if known else [-1, -1, -1])
        self.word = padded[self.at + 2]
        self.previous = np.where(self.inside, padded[self.at + 1], padded[self.at + 2])
        self.first = self.inside & (self.spans[self.at, 0] >= pieces.start)
        self.last = self.inside & (self.spans[self.at, 1] <= pieces.end)


def _flags(passage: Passage, here: Words) -> np.ndarray:
    """`_WORD_FLAGS` of a passage's tokens."""
    source, anchor = passage.pieces.source, passage.pieces.anchor
    breaks = np.array([0, *(match.end() for match in _SENTENCE.finditer(source))])
    paragraphs = np.array([0, *(match.end() for match in _PARAGRAPH.finditer(source))])
    sentence = np.searchsorted(breaks, anchor, side="right") - 1
    first_word = np.searchsorted(here.spans[:, 0], breaks)  # of each sentence
    order = here.at - first_word[sentence]  # of the word in its sentence
    data = np.frombuffer(source, np.uint8)
    letter = data[np.minimum(here.spans[:, 0], len(data) - 1)]
    long = np.diff(here.spans).ravel() > 1  # "I" and "A" name nobody
    capital = (long & (letter >= ord("A")) & (letter <= ord("Z")))[here.at]
    flags = [
        here.first & ~here.last, here.inside & ~here.first & ~here.last, here.last & ~here.first,
        here.inside & capital & (order > 0), here.inside & (order == 0), *(here.inside & (order < n) & (order >= 0) for n in _AT),
        np.isin(breaks[sentence], paragraphs), ~here.inside & (here.at >= 0),
        *(_within(pattern, source, anchor) for pattern in _PATTERNS.values()),
    ]  # fmt: skip
    return np.column_stack(flags)


def _within(pattern: re.Pattern[bytes], source: bytes, anchor: np.ndarray) -> np.ndarray:
    """Which tokens lie in a match."""
    spans = np.array([match.span() for match in pattern.finditer(source)] or [(len(source), len(source))])
    at = np.searchsorted(spans[:, 0], anchor, side="right") - 1
    return (at >= 0) & (anchor < spans[at, 1])


def _near(stretch: Stretch, word_of: np.ndarray, names: list[str]) -> Block:
    """The longer words among the `NEAR` tokens before, as far as the model has seen them."""
    long = np.array([len(word) >= _NEAR_LETTERS for word in names] + [False])
    found = []
    for distance in range(1, NEAR + 1):
        rows = stretch.before(distance)
        word = np.where(rows >= 0, word_of[rows], -1)
        places = np.flatnonzero(long[word])
        found.append(places * len(names) + word[places])
    cells = np.unique(np.concatenate(found))
    places, codes = np.divmod(cells, max(len(names), 1))
    used, codes = np.unique(codes, return_inverse=True)
    return Block([f"near word {_shown(names[word])}" for word in used.tolist()], codes, places)


# ------------------------------------------------------------------------------------------- language

_READ = 600  # bytes of text that a language is told of: less is not enough, and most of it is of one
_LEAST_LETTERS = 40


def _languages(stretch: Stretch) -> Iterator[Block]:
    """The language of the text around each token; of source, and of what has hardly any letters, none is told."""
    for passage in stretch.passages:
        if passage.name.endswith(".py"):
            continue
        part = passage.pieces.anchor // _READ
        wanted = np.flatnonzero(passage.places >= 0)
        there, codes = np.unique(part[wanted], return_inverse=True)
        told = [_language(passage.pieces.source[number * _READ : (number + 1) * _READ]) for number in there.tolist()]
        known = np.array([bool(name) for name in told])[codes]
        yield Block([f"language: {name}" for name in told], codes[known], passage.places[wanted[known]])


def _language(source: bytes) -> str:
    from py3langid import classify

    text = source.decode(errors="ignore")
    return classify(text)[0] if sum(map(str.isalpha, text)) >= _LEAST_LETTERS else ""

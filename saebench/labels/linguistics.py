"""Labels by what others know of language: parts of speech, dependencies and entities by spaCy, supersenses by WordNet.

Both are what a user names: a spaCy pipeline, and a directory with WordNet's database files (wndb(5WN)).
"""

import hashlib
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from saebench.labels.prose import Words
from saebench.labels.stretch import Block, Passage, Stretch, values_block

_AT_ONCE = 20_000  # bytes that spaCy is given at once, to the next end of a paragraph, a line or a word
_KINDS = {"part of speech": "pos_", "tag": "tag_", "dependency": "dep_", "entity": "ent_type_", "lemma": "lemma_"}

_PARTS = ("noun", "verb", "adj", "adv")
_LEXICOGRAPHER_FILES = [
    "adj.all",
    "adj.pert",
    "adv.all",
    "noun.Tops",
    "noun.act",
    "noun.animal",
    "noun.artifact",
    "noun.attribute",
    "noun.body",
    "noun.cognition",
    "noun.communication",
    "noun.event",
    "noun.feeling",
    "noun.food",
    "noun.group",
    "noun.location",
    "noun.motive",
    "noun.object",
    "noun.person",
    "noun.phenomenon",
    "noun.plant",
    "noun.possession",
    "noun.process",
    "noun.quantity",
    "noun.relation",
    "noun.shape",
    "noun.state",
    "noun.substance",
    "noun.time",
    "verb.body",
    "verb.change",
    "verb.cognition",
    "verb.communication",
    "verb.competition",
    "verb.consumption",
    "verb.contact",
    "verb.creation",
    "verb.emotion",
    "verb.motion",
    "verb.perception",
    "verb.possession",
    "verb.social",
    "verb.stative",
    "verb.weather",
    "adj.ppl",
]  # lexnames(5WN), by number
_ENDINGS = {  # morphy(7WN)
    "noun": (("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"), ("ies", "y")),
    "verb": (("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")),
    "adj": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "adv": (),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ spaCy


@lru_cache(maxsize=1)
def pipeline(name: str) -> Any:
    """A spaCy pipeline. Raises ValueError where spaCy, or the pipeline, is not there."""
    try:
        import spacy  # type: ignore[import-not-found]
    except ImportError as error:
        raise ValueError(f"spaCy labels {name!r} with: pip install 'saebench[prose]'") from error
    try:
        return spacy.load(name)
    except OSError as error:
        raise ValueError(f"{name!r} is no pipeline that spaCy finds; install one, or give its directory") from error


def pipeline_version(name: str) -> str:
    """What decides its labels beside its name."""
    meta = pipeline(name).meta
    return f"1 {meta['lang']}_{meta['name']} {meta['version']}"


def label_by_pipeline(name: str, stretch: Stretch) -> Iterator[Block]:
    """Literals of the spaCy token that each token lies in."""
    nlp = pipeline(name)
    for passage in stretch.passages:
        wanted = np.flatnonzero(passage.places >= 0)
        anchor = passage.pieces.anchor[wanted]
        for start, stop in _portions(passage):
            here = (anchor >= start) & (anchor < stop)
            if not here.any():
                continue
            text, offsets = _readable(passage.pieces.source[start:stop])
            document = nlp(text)
            first = offsets[[token.idx for token in document]] + start
            last = offsets[[token.idx + len(token) for token in document]] + start
            at = np.searchsorted(first, anchor[here], side="right") - 1
            inside = (at >= 0) & (anchor[here] < last[at])
            places = passage.places[wanted[here][inside]]
            there, codes = np.unique(at[inside], return_inverse=True)
            for kind, attribute in _KINDS.items():
                values = [getattr(document[number], attribute).strip() for number in there.tolist()]
                known = np.array([bool(value) for value in values], bool)[codes]
                yield Block([f"{kind}: {value}" for value in values], codes[known], places[known])


def _portions(passage: Passage) -> Iterator[tuple[int, int]]:
    source, start = passage.pieces.source, 0
    while start < len(source):
        least, most = start + _AT_ONCE, start + 2 * _AT_ONCE
        ends = (at + len(end) for end in (b"\n\n", b"\n", b" ") if (at := source.find(end, least, most)) >= 0)
        stop = next(ends, most) if most < len(source) else len(source)
        yield start, stop
        start = stop


def _readable(source: bytes) -> tuple[str, np.ndarray]:
    """(text in which a byte of no character is a question mark, the byte where each character begins, and where the last ends)."""
    text = source.decode("utf-8", "surrogateescape")
    broken = ["\udc80" <= letter <= "\udcff" for letter in text]
    lengths = [1 if bad else len(letter.encode()) for letter, bad in zip(text, broken, strict=True)]
    return "".join("?" if bad else letter for letter, bad in zip(text, broken, strict=True)), np.cumsum([0, *lengths])


# ------------------------------------------------------------------------------------------------ WordNet


class _WordNet:
    """The supersense of the first sense of each lemma, by part of speech, and whether its sense was ever met in text."""

    def __init__(self, folder: Path) -> None:
        self.senses: dict[str, dict[str, tuple[str, bool]]] = {}
        self.exceptions: dict[str, dict[str, str]] = {}
        digest = hashlib.sha256()
        try:
            for part in _PARTS:
                index, data, exceptions = (
                    (folder / name).read_bytes() for name in (f"index.{part}", f"data.{part}", f"{part}.exc")
                )
                digest.update(index + data + exceptions)
                files = {int(line[:8]): int(line[9:11]) for line in data.splitlines() if line[:1].isdigit()}
                self.senses[part] = {
                    fields[0]: (_LEXICOGRAPHER_FILES[files[int(fields[-int(fields[2])])]], fields[-int(fields[2]) - 1] != "0")
                    for fields in (line.split() for line in index.decode().splitlines() if line[:1] != " ")
                }  # fmt: skip
                pairs = (line.split() for line in exceptions.decode().splitlines())
                self.exceptions[part] = {pair[0]: pair[1] for pair in pairs if len(pair) > 1}
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise ValueError(
                f"{folder} is no directory of WordNet's database files (index.noun, data.noun, noun.exc and those of verb, adj and adv): "
                f"{type(error).__name__} {error}"
            ) from error
        self.version = digest.hexdigest()[:12]

    def supersenses(self, word: str) -> list[str]:
        """Of a word in any inflection, one for each part of speech that it may be; of those that text has it as, where it has any.

        Else "was" would be a place (WA), too.
        """
        word = re.split("['’]", word)[0]
        found = []
        for part, senses in self.senses.items():
            forms = [
                word,
                self.exceptions[part].get(word, ""),
                *(word[: -len(end)] + to for end, to in _ENDINGS[part] if word.endswith(end)),
            ]
            there = [senses[form] for form in forms if form in senses]
            found += [sense for sense in there if sense[1]][:1] or there[:1]
        met = [name for name, in_text in found if in_text]
        return met or [name for name, _ in found]


@lru_cache(maxsize=1)
def _wordnet(folder: Path) -> _WordNet:
    return _WordNet(folder)


def wordnet_version(folder: str) -> str:
    """What decides its labels. Raises ValueError for a folder that has no WordNet."""
    return f"1 {_wordnet(Path(folder)).version}"


def label_by_wordnet(folder: str, stretch: Stretch) -> Iterator[Block]:
    """The supersense of the word that each token lies in, of its commonest sense as each part of speech."""
    wordnet = _wordnet(Path(folder))
    numbers: dict[str, int] = {}
    word = np.full(len(stretch.rows), -1)
    for passage in stretch.passages:
        here, wanted = Words(passage, numbers), np.flatnonzero(passage.places >= 0)
        word[passage.places[wanted]] = np.where(here.inside, here.word, -1)[wanted]
    senses = [wordnet.supersenses(name) for name in numbers]
    for number in range(max(map(len, senses), default=0)):
        names = [f"supersense: {own[number]}" if number < len(own) else "" for own in senses]
        there = np.array([bool(name) for name in names] + [False])
        yield values_block(np.where(there[word], word, -1), names)

"""Where concepts hold and the vectors there: first letters of words, and what labellers say. For absorption, which needs both.

Legend: R rows of a store, N examples, C concepts, K children of concepts, D what is read, E what is written, V vocabulary.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saebench.files import read_json
from saebench.index.evidence import hashed
from saebench.index.explain import streams
from saebench.labels import Labeller, Stretch, label
from saebench.models import LanguageModel, capture
from saebench.pieces import TokenBytes
from saebench.runlog import progress
from saebench.sae import Ends
from saebench.store import Store

log = logging.getLogger(__name__)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
HELD_OUT = 3
"""a word in so many is held out: probes are fitted on the others"""
PROMPT = "The word is"
"""before each word, where a model is run over words"""
PARENTS: dict[str, tuple[str, dict[str, list[str]]]] = {
    "python": (
        "python",
        {
            "control flow": [f"keyword: {word}" for word in ("if", "elif", "else", "for", "while", "try", "with")],
            "statement keyword": [
                f"keyword: {word}" for word in ("return", "import", "from", "raise", "def", "class", "yield", "assert")
            ],
            "constant": [f"keyword: {word}" for word in ("None", "True", "False")],
            "logic": [f"keyword: {word}" for word in ("and", "or", "not", "in", "is")],
            "opening bracket": [f"operator: {sign}" for sign in "([{"],
            "comparison": [f"operator: {sign}" for sign in ("==", "!=", "<", ">", "<=", ">=")],
            "defined name": [f"role: {role}" for role in ("function name", "class name", "parameter", "assigned name")],
        },
    ),
    "supersenses": (
        "",
        {
            "living thing": [f"supersense: noun.{kind}" for kind in ("person", "animal", "plant")],
            "physical thing": [
                f"supersense: noun.{kind}" for kind in ("artifact", "food", "object", "substance", "body")
            ],
            "mind": [f"supersense: noun.{kind}" for kind in ("cognition", "feeling", "motive", "communication")],
            "happening": [f"supersense: noun.{kind}" for kind in ("act", "event", "process", "phenomenon")],
            "measure": [f"supersense: noun.{kind}" for kind in ("quantity", "time", "shape")],
            "doing": [f"supersense: verb.{kind}" for kind in ("motion", "contact", "creation", "change")],
        },
    ),
}
"""name -> (labeller, parent -> literals of its children)"""
_WORD = re.compile(rb" [A-Za-z]{2,}")
_GOES_ON = re.compile(rb"[A-Za-z0-9_\x80-\xff]")
_AT_ONCE = 8192  # rows of a store, and tokens of words' prompts, read at once


class Examples(NamedTuple):
    """Vectors, and which concepts hold of each."""

    read: Float[Tensor, "N D"]
    written: Float[Tensor, "N E"]
    """the same as `read` of an SAE"""
    holds: Bool[np.ndarray, "N C"]
    children: Bool[np.ndarray, "N K"]
    cluster: Int[np.ndarray, " N"]
    """the token of a word, the document of a label: what is drawn anew in a bootstrap"""


class Concepts(NamedTuple):
    """What is asked, and where the answer is known."""

    names: list[str]
    """`[C]`"""
    children: list[tuple[int, str]]
    """`[K]` (number of its parent, name)"""
    train: Examples
    test: Examples


def letters(store: Store, ends: Ends, per_word: int) -> Concepts:
    """First letters of words that are one token, a space before them, and end there: up to `per_word` rows of each in a store.

    Probes are fitted on training rows of two words in three, chosen by hash, and tried on held-out rows of the others.
    Raises ValueError for a store without a tokenizer.
    """
    texts = _texts(store)
    letter_V, sides = _letters_of(texts), []
    for split, held_out in (("train", False), ("validation", True)):
        rows, tokens = _words(store, split, letter_V, texts, per_word, held_out)
        sides.append(_examples(store, ends, rows, letter_V[tokens][:, None] == np.arange(26), None, tokens))
    return Concepts(list(LETTERS), [], *sides)


def prompted(model: LanguageModel, ends: Ends, words: int, batch: int = 64) -> Concepts:
    """The same of up to `words` words of a tokenizer, each once, behind `PROMPT`: for stores with too few of them."""
    letter_V = _letters_of(model.pieces.all())
    tokens = np.flatnonzero(letter_V[: model.n_vocab] >= 0)
    tokens = np.sort(tokens[np.argsort(hashed(tokens), kind="stable")[:words]])
    opening = model.encoder.opened(model.encoder.encode([PROMPT])[0])
    parts: dict[str, list[Tensor]] = {hook: [] for hook in ends.hooks}
    with progress(len(tokens), "run words", "word", delay=1.0) as bar:
        for some in np.split(tokens, range(batch, len(tokens), batch)):
            ids = torch.tensor([[*opening, token] for token in some.tolist()], device=model.device)
            for hook, value in capture(model, ids, ends.hooks).items():
                parts[hook].append(value[:, -1].float().cpu())
            bar.update(len(some))
    vectors = {hook: torch.cat(values) for hook, values in parts.items()}
    sides = []
    for side in (~_held_out(tokens), _held_out(tokens)):
        read, written = (torch.cat([vectors[hook][side] for hook in hooks], dim=1) for hooks in ends)
        holds = letter_V[tokens[side]][:, None] == np.arange(26)
        sides.append(Examples(read, written, holds, holds[:, :0], tokens[side]))
    return Concepts(list(LETTERS), [], *sides)


def labelled(store: Store, ends: Ends, labeller: Labeller, parents: Mapping[str, Sequence[str]], rows: int) -> Concepts:
    """Parents that hold where any of their children, literals of a labeller, does: on about `rows` training and `rows` held-out rows.

    A child that holds on none of the training rows is told of. Raises ValueError for a store without a tokenizer.
    """
    texts, documents, sides = _texts(store), store.document_names(), []
    literals = list(dict.fromkeys(child for children in parents.values() for child in children))
    for split in ("train", "validation"):
        wanted, of = _spread(store, split, rows), []

        def stretches(split: str = split, wanted: np.ndarray = wanted, of: list = of) -> Iterator[Stretch]:
            with progress(len(wanted), f"label {split} rows", "row", delay=1.0) as bar:
                for places, stream in streams(store, split, wanted):
                    of.append(stream.doc_id[places])
                    yield Stretch(stream, texts, documents, places)
                    bar.update(len(places))

        found = label(stretches(), [labeller], only=literals)
        for place in np.flatnonzero(np.diff(found.holds.indptr) == 0) if split == "train" else ():
            log.warning("%r holds on none of %d training rows of %s", found.names[place], len(wanted), store.folder)
        whole = found.holds.toarray()
        number = {name: place for place, name in enumerate(found.names)}
        columns = [[number[child] for child in children] for children in parents.values()]
        holds = np.stack([whole[:, children].any(1) for children in columns], axis=1)
        children = whole[:, [place for places in columns for place in places]]
        sides.append(_examples(store, ends, wanted, holds, children, np.concatenate(of)))
    named = [(place, child) for place, children in enumerate(parents.values()) for child in children]
    return Concepts(list(parents), named, *sides)


def parents_of(concepts: str) -> tuple[str, dict[str, list[str]]]:
    """(labeller, empty where it is the user's to name; parent -> its children) of a name of `PARENTS`, or of a JSON file.

    Raises ValueError where it is neither, or the file is not an object of lists of literals.
    """
    if concepts in PARENTS:
        return PARENTS[concepts]
    if not Path(concepts).is_file():
        raise ValueError(
            f"concepts is {concepts!r}; expected letters, {', '.join(PARENTS)}, or a JSON file {{parent: [literals of its children]}}"
        )
    found = read_json(Path(concepts))
    well = (
        isinstance(found, dict)
        and found
        and all(
            isinstance(each, list) and each and all(isinstance(child, str) for child in each) for each in found.values()
        )
    )
    if not well:
        raise ValueError(f"{concepts} is not an object of lists; expected {{parent: [literals of its children]}}")
    return "", found


def _texts(store: Store) -> list[bytes]:
    tokenizer = store.tokenizer()
    if tokenizer is None:
        raise ValueError(
            f"{store.folder} came without a tokenizer, so that nothing is known of its tokens; use a store that has one"
        )
    return TokenBytes(tokenizer).all()


def _letters_of(texts: Sequence[bytes]) -> Int[np.ndarray, " V"]:
    """The number of each token's first letter, where it is a word with a space before it; else -1."""
    return np.array([LETTERS.index(chr(text[1]).lower()) if _WORD.fullmatch(text) else -1 for text in texts])


def _held_out(tokens: np.ndarray) -> Bool[np.ndarray, " N"]:
    return hashed(tokens, 1) % np.uint64(HELD_OUT) == 0


def _words(
    store: Store, split: str, letter_V: np.ndarray, texts: Sequence[bytes], per_word: int, held_out: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(rows of a store, their tokens): the `per_word` of lowest hash of each word of a side, where no letter follows in the context."""
    goes_on_V = np.array([_GOES_ON.match(text) is not None for text in texts])
    rows, tokens, first = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for shard in store.shards:
        if shard.split == split:
            ids, keep = shard.column("tokens").astype(np.int64), shard.column("keep")
            known = keep & (ids < len(texts))
            ids = np.where(known, ids, 0)
            ends = ~(known[1:] & goes_on_V[ids[1:]]) & (np.diff(shard.column("position").astype(np.int64)) > 0)
            here = np.flatnonzero(known[:-1] & (letter_V[ids[:-1]] >= 0) & (_held_out(ids[:-1]) == held_out) & ends)
            rows.append(here + first)
            tokens.append(ids[here])
        first += shard.n_rows
    row_R, token_R = np.concatenate(rows), np.concatenate(tokens)
    order = np.lexsort((hashed(row_R), token_R))
    starts = np.flatnonzero(np.concatenate([[True], np.diff(token_R[order]) != 0])[: len(order)])
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    chosen = np.sort(order[rank < per_word])
    return row_R[chosen], token_R[chosen]


def _spread(store: Store, split: str, limit: int) -> Int[np.ndarray, " R"]:
    """About so many kept rows from all over a split, in stretches."""
    first, firsts = 0, {}
    for shard in store.shards:
        firsts[shard.path] = first
        first += shard.n_rows
    parts = [
        firsts[shard.path] + start + np.flatnonzero(shard.column("keep", start, stop))
        for shard, start, stop in store.spread(split, limit)
    ]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _examples(
    store: Store, ends: Ends, rows: np.ndarray, holds: np.ndarray, children: np.ndarray | None, cluster: np.ndarray
) -> Examples:
    """The vectors of rows, ascending, and what holds there; without massive ones."""
    parts: dict[str, list[Tensor]] = {hook: [torch.zeros(0, store.d_in(hook))] for hook in ends.hooks}
    first = 0
    with progress(len(rows), f"read {ends}", "row", delay=1.0) as bar:
        for shard in store.shards:
            for start in range(0, shard.n_rows, _AT_ONCE):
                stop = min(start + _AT_ONCE, shard.n_rows)
                mine = rows[slice(*np.searchsorted(rows, [first + start, first + stop]))] - first - start
                if len(mine):
                    for hook, values in parts.items():
                        values.append(shard.rows(hook, start, stop)[torch.from_numpy(mine)].float())
                    bar.update(len(mine))
            first += shard.n_rows
    vectors = {hook: torch.cat(values) for hook, values in parts.items()}
    usual = torch.stack([some.norm(dim=1) <= store.norms(hook).bound for hook, some in vectors.items()]).all(0)
    read, written = (torch.cat([vectors[hook][usual] for hook in hooks], dim=1) for hooks in ends)
    kept = usual.numpy()
    return Examples(
        read,
        written,
        holds[kept],
        holds[kept][:, :0] if children is None else children[kept],
        cluster[kept].astype(np.int64),
    )

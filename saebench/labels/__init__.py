"""Facts of tokens that are true or false, by labellers: each a name, a version and a function from a stretch of text to literals.

Legend: r rows that are labelled, M literals.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from saebench.labels import linguistics, prose, syntax, tokens
from saebench.labels.stretch import Block, Stream, Stretch


class Labeller(NamedTuple):
    """What gives literals."""

    name: str
    version: str
    """another one's literals of the same name may hold elsewhere"""
    label: Callable[[Stretch], Iterator[Block]]


LABELLERS = (
    Labeller("python", "4", syntax.label),
    Labeller("tokens", "6", tokens.label),
    Labeller("prose", "2", prose.label),
)
"""In the order of how much their literals say: of rules that are equally good the first is taken."""


SPACY, WORDNET = "spacy:", "wordnet:"
"""what the names of labellers begin with that are made of what a user has"""


def labeller_of(name: str) -> Labeller:
    """The labeller of a name: one of `LABELLERS`, `spacy:PIPELINE` or `wordnet:DIRECTORY`.

    Raises ValueError where there is none, or what it is made of is not there.
    """
    for own in LABELLERS:
        if own.name == name:
            return own
    if name.startswith(SPACY):
        what = name.removeprefix(SPACY)
        return Labeller(name, linguistics.pipeline_version(what), partial(linguistics.label_by_pipeline, what))
    if name.startswith(WORDNET):
        what = name.removeprefix(WORDNET)
        return Labeller(name, linguistics.wordnet_version(what), partial(linguistics.label_by_wordnet, what))
    raise ValueError(
        f"{name!r} is no labeller; there are {', '.join(own.name for own in LABELLERS)}, {SPACY}PIPELINE and {WORDNET}DIRECTORY"
    )


class Literals(NamedTuple):
    """What holds where."""

    names: list[str]
    """`[M]`"""
    of: np.ndarray
    """`[M]` the number of each one's labeller"""
    holds: Any
    """`[r, M]` bool, `scipy.sparse.csc_array`"""


def label(
    stretches: Iterable[Stretch],
    labellers: Sequence[Labeller] = LABELLERS,
    *,
    only: Sequence[str] | None = None,
    least: int = 1,
) -> Literals:
    """The literals that hold on at least `least` rows of some stretches, taken together; or `only` some, by their names.

    A literal that never holds has an empty column if it was asked for, and none else; its labeller is -1.
    Raises ValueError where two labellers call a literal the same.
    """
    numbers = {name: number for number, name in enumerate(only or ())}
    of: dict[int, int] = {}
    rows, columns, n_rows = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)], 0
    for stretch in stretches:
        for place, labeller in enumerate(labellers):
            for names, codes, places in labeller.label(stretch):
                if only is None:
                    for name in names:
                        numbers.setdefault(name, len(numbers))
                known = np.array([numbers.get(name, -1) for name in names], np.int32)
                for name, number in zip(names, known.tolist(), strict=True):
                    if number >= 0 and of.setdefault(number, place) != place:
                        both = " and ".join(repr(labellers[which].name) for which in (of[number], place))
                        raise ValueError(f"{name!r} is a literal of {both}; expected names of their own")
                wanted = known[codes] >= 0
                rows.append((places[wanted] + n_rows).astype(np.int32))
                columns.append(known[codes[wanted]])
        n_rows += len(stretch.rows)
    row, column = np.concatenate(rows), np.concatenate(columns)
    names, labelled_by = list(numbers), np.array([of.get(number, -1) for number in range(len(numbers))], np.int64)
    holds: Any = sparse.coo_array((np.ones(len(row), bool), (row, column)), shape=(n_rows, len(names))).tocsc()
    holds.sum_duplicates()
    if only is None:
        order = np.argsort(labelled_by, kind="stable")
        order = order[np.diff(holds.indptr)[order] >= max(least, 1)]
        names, labelled_by, holds = [names[number] for number in order], labelled_by[order], holds[:, order]
    return Literals(names, labelled_by, holds)


__all__ = ["LABELLERS", "Block", "Labeller", "Literals", "Stream", "Stretch", "label", "labeller_of"]

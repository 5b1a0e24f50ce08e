"""What probes are asked: texts that a user has labelled, and tokens of a store by what labellers say of them.

Legend: N examples of a source, n of a task, D the width of a hook, B texts or contexts of a batch, L positions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saebench.index.evidence import hashed
from saebench.index.explain import streams
from saebench.labels import Labeller, Literals, Stretch, label
from saebench.models import LanguageModel, capture, check_hook, hook_name, parse_hook, widths_of
from saebench.pieces import TokenBytes
from saebench.runlog import progress
from saebench.store import Store
from saebench.text.rows import CSV, ROW_SUFFIXES, rows_of, suffix_of

POOL = 1024
"""examples of each class that a task has at most"""
COLUMNS = (("text", "label"), ("prompt", "target"))
"""of labelled texts; the second are those of sae-probes"""
_CLASSES = 50  # labels of a file beyond which they look like numbers
_LEAST = 100  # rows of each class of a column that is chosen for its frequency
_AT_ONCE = 8192  # rows of a store read at once

Vectors = Mapping[str, Float[Tensor, "N D"]]
"""those of some examples, by hook"""
Hooks = tuple[str, ...]


class Task(NamedTuple):
    """A question with the answer yes or no of some examples."""

    name: str
    holds: Bool[np.ndarray, " n"]
    documents: Int[np.ndarray, " n"]
    """the document that each is of, none of which is both trained and tested on"""
    source: "Source"
    rows: Int[np.ndarray, " n"]
    """which examples of the source they are"""

    @property
    def hash(self) -> str:
        """Of all that it asks, and of what."""
        parts = (self.holds, self.documents, self.source.ids[self.rows])
        return xxhash.xxh3_128_hexdigest(b"".join(np.ascontiguousarray(part).tobytes() for part in parts))


class Source:
    """Examples that tasks are made of, and how their vectors are come by."""

    def __init__(self, ids: Int[np.ndarray, " N"], read: Callable[[np.ndarray, Hooks], dict[str, Tensor]]) -> None:
        """`ids` say what each example is; `read` gives the vectors of some of them at some hooks."""
        self.ids, self._read = ids, read
        self._vectors: dict[str, Tensor] = {}
        self._place = np.full(len(ids), -1)
        self._used = np.zeros(len(ids), bool)

    def tasks(self, asked: Mapping[str, Bool[np.ndarray, " N"]], documents: Int[np.ndarray, " N"]) -> list[Task]:
        """A task for each name, of at most `POOL` examples of each class, those whose ids have the lowest hashes."""
        found = []
        for name, holds in asked.items():
            rows = np.concatenate([self._some(np.flatnonzero(holds == side)) for side in (True, False)])
            rows = rows[np.argsort(self.ids[rows], kind="stable")]  # whatever the order of a file
            self._used[rows] = True
            found.append(Task(name, holds[rows], documents[rows], self, rows))
        return found

    def _some(self, rows: np.ndarray) -> np.ndarray:
        return rows[np.argsort(hashed(self.ids[rows]), kind="stable")[:POOL]]

    def vectors(self, task: Task, hooks: Hooks) -> dict[str, Tensor]:
        """Those of a task's examples. Those of all tasks are read at once, when the first are wanted at a hook."""
        if missing := tuple(hook for hook in hooks if hook not in self._vectors):
            used = np.flatnonzero(self._used)
            self._place[used] = np.arange(len(used))
            self._vectors |= self._read(used, missing)
        wanted = torch.from_numpy(self._place[task.rows])
        return {hook: self._vectors[hook][wanted] for hook in hooks}


# ---------------------------------------------------------------------------------- labelled texts


def text_tasks(path: Path, read: Callable[[list[str], Hooks], dict[str, Tensor]]) -> list[Task]:
    """The tasks of a file of labelled texts, or of every file of a folder; `read` runs a model over texts.

    Two labels are one task, whose positives have the one that sorts last; more are a task each. Of a folder, files with more than two
    labels are left out, as by sae-probes. Raises ValueError naming the file that has not the columns, or the label of one example.
    """
    files = sorted(file for file in path.iterdir() if _is_read(file)) if path.is_dir() else [path]
    if not path.exists() or not all(map(_is_read, files)) or not files:
        raise ValueError(
            f"{path} has no labelled texts; expected a file of {' or '.join(_suffixes())}, or a folder of them"
        )
    found: list[Task] = []
    for file in files:
        texts, labels = _labelled(file)
        names = sorted(set(labels), key=_sorted_as)
        if path.is_dir() and len(names) > 2:
            continue
        _check_labels(file, labels, names)
        asked = {
            file.name.split(".")[0] if len(names) == 2 else f"{file.name.split('.')[0]}: {name}": np.array(
                [label == name for label in labels]
            )
            for name in (names[1:] if len(names) == 2 else names)
        }
        ids = np.array([xxhash.xxh3_64_intdigest(text.encode()) >> 1 for text in texts])
        source = Source(ids, partial(_of_texts, texts, read))
        found += source.tasks(asked, np.unique(ids, return_inverse=True)[1])  # equal texts are one document
    return found


def _suffixes() -> list[str]:
    return sorted({*ROW_SUFFIXES, CSV})


def _is_read(file: Path) -> bool:
    return suffix_of(file) in _suffixes()


def _of_texts(texts: list[str], read: Callable[[list[str], Hooks], dict[str, Tensor]], rows: np.ndarray, hooks: Hooks):
    return read([texts[row] for row in rows.tolist()], hooks)


def _labelled(file: Path) -> tuple[list[str], list[str]]:
    """(texts, labels) of a file. Raises ValueError where a row lacks either."""
    texts: list[str] = []
    labels: list[str] = []
    for number, row in enumerate(rows_of(file, [name for pair in COLUMNS for name in pair], "strict")):
        there = list(row) if isinstance(row, dict) else []
        pair = next((pair for pair in COLUMNS if set(pair) <= set(there)), None)
        if pair is None:
            raise ValueError(
                f"row {number} of {file} has {', '.join(map(str, there)) or 'no columns'}; expected text and label, or prompt and target"
            )
        text, said = (row[name] for name in pair)
        if not isinstance(text, str) or not text or said is None:
            raise ValueError(f"row {number} of {file} has {pair[0]} {text!r} and {pair[1]} {said!r}; expected both")
        texts.append(text)
        labels.append(str(said))
    return texts, labels


def _sorted_as(label: str) -> tuple[bool, float, str]:
    """Numbers by their value, before what is none."""
    try:
        return False, float(label), label
    except ValueError:
        return True, 0.0, label


def _check_labels(file: Path, labels: list[str], names: list[str]) -> None:
    if not 2 <= len(names) <= _CLASSES:
        raise ValueError(f"{file} has {len(names)} labels in {len(labels)} rows; expected 2 to {_CLASSES}")
    for name in names:
        if labels.count(name) < 2:
            raise ValueError(
                f"label {name!r} of {file} has one example; expected 2 at least: add some, or leave it out"
            )


class Reader:
    """A model's vectors at the last tokens of texts, and of MLPs' neurons anywhere."""

    def __init__(self, model: LanguageModel, context: int, batch: int) -> None:
        """`context` tokens of a text are read at most, its last ones, behind BOS."""
        self.model, self._context, self._batch = model, context, batch

    def __call__(self, texts: list[str], hooks: Hooks) -> dict[str, Tensor]:
        """`[N, D]` of each hook, float32: texts of about one length at a time, filled up behind their ends."""
        encoder = self.model.encoder
        ids = [encoder.opened(tokens[-self._context + 1 :]) for tokens in encoder.encode(texts)]
        made = {hook: torch.zeros(len(ids), width) for hook, width in widths_of(self.model, hooks).items()}
        order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
        with progress(len(ids), "read labelled texts", "text", delay=1.0) as bar:
            for start in range(0, len(order), self._batch):
                some = order[start : start + self._batch]
                tokens = torch.full((len(some), len(ids[some[-1]])), encoder.opening)
                for place, number in enumerate(some):
                    tokens[place, : len(ids[number])] = torch.tensor(ids[number])
                last = torch.tensor([len(ids[number]) - 1 for number in some])
                for hook, value in self.capture(tokens, hooks).items():
                    made[hook][some] = value[torch.arange(len(some)), last].float().cpu()
                bar.update(len(some))
        return made

    def capture(self, tokens_BL: Int[Tensor, "B L"], hooks: Hooks) -> dict[str, Float[Tensor, "B L D"]]:
        """The vectors at hooks."""
        return capture(self.model, tokens_BL.to(self.model.device), hooks)

    def has(self, hook: str) -> bool:
        """Whether the model has a hook of that name, and it is what its name says."""
        try:
            check_hook(self.model, hook)
        except ValueError:
            return False
        return True


def neurons_hook(hook: str) -> str | None:
    """Where the neurons of the MLP are that a hook is the input or output of; None of any other hook."""
    layer, kind = parse_hook(hook)
    return hook_name(layer, "mlp_post") if kind in ("mlp_in", "mlp_out") else None


def _is_of_neurons(hook: str) -> bool:
    return parse_hook(hook)[1] == "mlp_post"


# ---------------------------------------------------------------------------------- rows of a store


def column_tasks(
    store: Store,
    labellers: Sequence[Labeller],
    names: Sequence[str],
    most: int,
    limit: int,
    reader: Callable[[], Reader],
) -> list[Task]:
    """Tasks of the first `limit` held-out rows of a store: the literals `names`, or else the `most` frequent of the first labeller that has any.

    Frequency is the lesser of how often a literal holds and how often not. Raises ValueError for a name that holds, or does not, in less than
    two documents, and where no literal does either often enough.
    """
    rows, literals, documents_of = labelled(store, labellers, names or None, limit, 1 if names else _LEAST)
    chosen = np.arange(len(names)) if names else _most_frequent(literals, documents_of, most)
    for number in chosen.tolist() if names else ():
        _check_column(literals, number, documents_of, store)
    if not len(chosen):
        raise ValueError(
            f"nothing that {', '.join(each.name for each in labellers)} says holds, and does not, on {_LEAST} of {len(rows)} held-out rows "
            f"of {store.folder}, in two documents: choose another --labeller, or harvest more tokens"
        )
    source = Source(rows, partial(vectors_of, store, reader, rows))
    return source.tasks({literals.names[number]: _column(literals, number) for number in chosen.tolist()}, documents_of)


def labelled(
    store: Store, labellers: Sequence[Labeller], names: Sequence[str] | None, limit: int, least: int
) -> tuple[Int[np.ndarray, " N"], Literals, Int[np.ndarray, " N"]]:
    """(the first `limit` held-out rows of a store but for special tokens, what labellers say of them as `label` has it, their documents).

    Raises ValueError for a store without a tokenizer, or without such rows.
    """
    tokenizer = store.tokenizer()
    if tokenizer is None:
        raise ValueError(
            f"{store.folder} came without a tokenizer, so that nothing is known of its tokens; give --texts"
        )
    rows = _held_out(store, limit)
    texts, documents, of = TokenBytes(tokenizer).all(), store.document_names(), []

    def stretches() -> Iterator[Stretch]:
        with progress(len(rows), "label held-out rows", "row", delay=1.0) as bar:
            for wanted, stream in streams(store, "validation", rows):
                of.append(stream.doc_id[wanted])
                yield Stretch(stream, texts, documents, wanted)
                bar.update(len(wanted))

    literals = label(stretches(), labellers, only=names, least=least)
    return rows, literals, np.concatenate(of)


def _column(literals: Literals, number: int) -> Bool[np.ndarray, " N"]:
    return literals.holds[:, [number]].toarray().ravel()


def _lesser(holds: np.ndarray, documents: np.ndarray) -> tuple[int, int]:
    """(rows, documents) that have something, or that have it not, whichever are fewer."""
    sides = [documents[holds == side] for side in (True, False)]
    return min(map(len, sides)), min(len(np.unique(side)) for side in sides)


def _most_frequent(literals: Literals, documents: np.ndarray, most: int) -> Int[np.ndarray, " m"]:
    """The numbers of some literals, all of the first labeller that has any that can be split by documents."""
    counts = np.diff(literals.holds.indptr)
    lesser = np.minimum(counts, len(documents) - counts)
    found: list[int] = []
    for number in np.lexsort((-lesser, literals.of))[: len(counts)].tolist():
        if len(found) == most or (found and literals.of[number] > literals.of[found[0]]):
            break
        if lesser[number] >= _LEAST and _lesser(_column(literals, number), documents)[1] >= 2:
            found.append(number)
    return np.array(found, np.int64)


def _check_column(literals: Literals, number: int, documents: np.ndarray, store: Store) -> None:
    holds = _column(literals, number)
    rows, of = _lesser(holds, documents)
    if min(rows, of) < 2:
        raise ValueError(
            f"{literals.names[number]!r} holds on {holds.sum()} of {len(holds)} held-out rows of {store.folder}, in "
            f"{len(np.unique(documents[holds]))} of {len(np.unique(documents))} documents; expected rows of 2 documents at least, and as many "
            "where it does not: choose another of --labels, or more --rows"
        )


def _held_out(store: Store, limit: int) -> Int[np.ndarray, " N"]:
    """The first rows of the validation split, as the store numbers them, special tokens left out."""
    found, first, left = [], 0, limit
    for shard in store.shards:
        if shard.split == "validation":
            some = min(shard.n_rows, left)
            found.append(first + np.flatnonzero(shard.column("keep", 0, some)))
            left -= some
        first += shard.n_rows
    rows = np.concatenate([np.zeros(0, np.int64), *found])
    if not len(rows):
        raise ValueError(f"{store.folder} has no held-out rows; harvest more tokens, or give --texts")
    return rows


def vectors_of(
    store: Store, reader: Callable[[], Reader], rows: np.ndarray, wanted: np.ndarray, hooks: Hooks
) -> dict[str, Tensor]:
    """The vectors of some of the `rows` of a store: its own, and those of neurons by running its contexts."""
    taken: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
    neurons = tuple(filter(_is_of_neurons, set(hooks) - set(store.hooks)))
    size = max(1, (2048 if neurons else _AT_ONCE) // store.context) * store.context
    first, rows = 0, rows[wanted]
    bar = progress(len(rows), f"read {', '.join(hooks)}", "row", delay=1.0)
    for shard in store.shards:
        for start in range(0, shard.n_rows, size):
            stop = min(start + size, shard.n_rows)
            mine = rows[slice(*np.searchsorted(rows, [first + start, first + stop]))] - first - start
            if not len(mine):
                continue
            here = torch.from_numpy(mine)
            for hook in set(hooks) - set(neurons):
                taken[hook].append(shard.rows(hook, start, stop)[here].float())
            if neurons:
                tokens = torch.from_numpy(shard.column("tokens", start, stop).astype(np.int64)).view(-1, store.context)
                for hook, value in reader().capture(tokens, neurons).items():
                    taken[hook].append(value.flatten(0, 1)[here.to(value.device)].float().cpu())
            bar.update(len(mine))
        first += shard.n_rows
    bar.close()
    return {hook: torch.cat(parts) for hook, parts in taken.items()}

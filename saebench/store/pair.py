"""Two models' stores of the same tokens, read as one: the hooks of both, rows in step.

A hook of the second, of the model that was tuned, has `tuned:` before its name, which is no hook of a model. Everything else,
provenance, documents, tokenizer, what a store is known by, is the first's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saebench.pieces import TokenBytes, show_bytes
from saebench.store.reader import Store, open_store
from saebench.store.schema import activations_path
from saebench.store.shard import Shard

TUNED = "tuned:"
_THEIRS = activations_path(TUNED)
_REMEDY = "harvest both models on the same text with the same --tokens, --validation-tokens, --context, --dtype and --shard-contexts"


def open_pair(folder: Path, beside: Path | None) -> Store:
    """Open a store, with another one beside it where one is given. Raises ValueError where their rows are not of the same tokens."""
    return open_store(folder) if beside is None else PairedStore(open_store(folder), open_store(beside))


class PairedStore(Store):
    """The first store, with the hooks of the second as `tuned:HOOK`. Raises ValueError naming the first thing that their rows do not share."""

    def __init__(self, first: Store, second: Store) -> None:
        _check_shape(first, second)
        theirs = {TUNED + hook: facts for hook, facts in second.manifest["hooks"].items()}
        super().__init__(first.folder, {**first.manifest, "hooks": first.manifest["hooks"] | theirs}, first.hash)
        self.beside = second
        paired = [PairedShard(first, second, number) for number in range(len(first.shards))]
        _check_vocabularies(first, second)
        _check_tokens(first, second, paired)
        self.shards: list[Shard] = list(paired)

    def norm_histogram(self, hook: str) -> np.ndarray:
        own, store = hook.removeprefix(TUNED), self.beside if hook.startswith(TUNED) else super()
        return store.norm_histogram(own)

    def _hook(self, hook: str) -> dict[str, Any]:
        return self.beside._hook(hook.removeprefix(TUNED)) if hook.startswith(TUNED) else super()._hook(hook)


class PairedShard(Shard):
    """A shard of the first store, with the vectors of the second's shard of the same number."""

    def __init__(self, first: Store, second: Store, number: int) -> None:
        super().__init__(first.folder, first.manifest["shards"][number], first.manifest)
        self._other = second.shards[number]

    def empty(self, name: str, rows: int) -> np.ndarray:
        return self._other.empty(_own(name), rows) if name.startswith(_THEIRS) else super().empty(name, rows)

    def read_into(self, name: str, ranges: Sequence[tuple[int, int]], out: np.ndarray) -> None:
        if name.startswith(_THEIRS):
            self._other.read_into(_own(name), ranges, out)
        else:
            super().read_into(name, ranges, out)

    def first_difference(self, column: str) -> tuple[int, int, int] | None:
        """(row, value here, value there) where a column of provenance is first another in the second store; by checksums, while they agree."""
        unlike = np.flatnonzero(self._column(column).checksums != self._other._column(column).checksums)
        if not len(unlike):
            return None
        start = int(unlike[0]) * self.block_rows
        span = start, min(start + self.block_rows, self.n_rows)
        here, there = self.column(column, *span), self._other.column(column, *span)
        at = int(np.flatnonzero(here != there)[0])
        return start + at, int(here[at]), int(there[at])


def _own(name: str) -> str:
    return activations_path(name.removeprefix(_THEIRS))


def _check_shape(first: Store, second: Store) -> None:
    """Raises ValueError naming what of the rows' number and form is not the same in both."""

    def facts(store: Store) -> dict[str, Any]:
        shards = {f"rows of {shard.name} ({shard.split})": shard.n_rows for shard in store.shards}
        sums = {f"{split} rows": store.rows(split) for split in ("train", "validation")}
        form = {"context": store.context, "dtype": store.manifest["dtype"], "block_rows": store.manifest["block_rows"]}
        return form | sums | shards

    mine, theirs = facts(first), facts(second)
    for what in dict.fromkeys([*mine, *theirs]):
        if mine.get(what) != theirs.get(what):
            raise ValueError(
                f"{what} is {theirs.get(what, 'not there')} in {second.folder} and {mine.get(what, 'not there')} in {first.folder}; "
                f"expected the same rows of two models: {_REMEDY}"
            )


def _check_vocabularies(first: Store, second: Store) -> None:
    """Raises ValueError naming the first token that is another text. Files may differ, and the second model may have more tokens."""
    made = [store.manifest["identity"].get("tokenizer", {}).get("files") for store in (first, second)]
    tokenizers = [store.tokenizer() for store in (first, second)]
    if made[0] == made[1] or None in tokenizers:
        return
    mine, theirs = ({number: text for text, number in found.get_vocab().items()} for found in tokenizers)
    for token in sorted(mine.keys() & theirs.keys()):
        if mine[token] != theirs[token]:
            raise ValueError(
                f"token {token} is {theirs[token]!r} to the tokenizer of {second.folder} and {mine[token]!r} to that of {first.folder}; "
                "expected two models with one tokenizer: their rows are not of the same tokens"
            )


def _check_tokens(first: Store, second: Store, shards: Sequence[PairedShard]) -> None:
    """Raises ValueError naming the first row of another token, or of one that only one of the stores keeps."""
    begins = {"train": 0, "validation": 0}
    for shard in shards:
        for column in ("tokens", "keep"):
            if (found := shard.first_difference(column)) is None:
                continue
            row, here, there = found
            pieces = TokenBytes(first.tokenizer())
            if column == "tokens":
                here, there = (f"token {token} ({show_bytes(pieces[token])!r})" for token in (here, there))
            else:
                here, there = ("kept" if keep else "left out" for keep in (here, there))
            raise ValueError(
                f"row {begins[shard.split] + row} of the {shard.split} rows is {there} in {second.folder} and {here} in {first.folder}; "
                f"expected the same tokens: {_REMEDY}"
            )
        begins[shard.split] += shard.n_rows

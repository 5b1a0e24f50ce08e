"""Shuffled batches of activations from a store, for as many epochs as asked, from any point on.

An epoch is a random order of all blocks of the training shards. Consecutive blocks of that order
are read into a buffer; batches are gathered from a permutation of its kept rows, and go on across
buffers and epochs. Within an epoch nothing is skipped or repeated, and the order depends on the
store, the seed and the memory budget alone: hooks of equal width get the same tokens in each batch.
A caller may give each epoch shards of its own.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, islice
from operator import itemgetter
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from saebench.store.coding import all_finite, decode, finite, from_disk, in_words, row_bytes
from saebench.store.reader import Shard, Store
from saebench.store.schema import activations_path

Item = TypeVar("Item")
ShardsOf = Callable[[int], list[Shard]]
_READERS = min(max((os.cpu_count() or 2) // 2, 1), 4)  # threads that fill a buffer: half the cores are for its use
_PIECE = 256  # blocks of one shard that one of them reads at a time


class Cursor(NamedTuple):
    """Where the next batch begins: epoch, buffer within the epoch, row within the buffer."""

    epoch: int = 0
    buffer: int = 0
    row: int = 0


class _Buffer(NamedTuple):
    """Rows as they were read, and the order in which the kept ones are served."""

    epoch: int
    number: int
    rows: np.ndarray
    order: np.ndarray

    def serve(self, start: int, stop: int) -> Tensor:
        """A new tensor: the buffer's memory is used again. On one core, since training has use for the others."""
        return from_disk(in_words(self.rows).take(self.order[start:stop], axis=0).view(self.rows.dtype))


def shuffled_batches(
    store: Store, hook: str, batch: int, *,
    seed: int, memory: int = 2 << 30, start: Cursor = Cursor(), longest: Mapping[str, float] | None = None,
    shards: ShardsOf | None = None,
) -> Iterator[tuple[Tensor, Cursor]]:  # fmt: skip
    """Endless batches `[batch, d_in]` of kept training rows, as `Shard.rows` gives them, each with the cursor after it.

    Rows whose norm is above `longest` at one of the hooks that it names are left out as those are that are not kept: hooks of
    which each leaves out its own part company.
    `shards` gives the shards of an epoch (default: all of the store's, each time) and may wait until they are there;
    it is called in another thread, while the epoch before is still being served, and its errors are raised here.
    `memory` bounds the bytes held: one buffer being served and one being read. Raises ValueError
    when the store has fewer kept rows than a batch, or a block is damaged or not finite.
    """
    column = activations_path(hook)
    for rows, cursor in _batches(store, hook, column, batch, seed, memory, start, longest, shards):
        yield decode(rows), cursor


def shuffled_documents(
    store: Store, hook: str, batch: int, *, seed: int, memory: int = 2 << 30, start: Cursor = Cursor()
) -> Iterator[Tensor]:
    """Of the same batches, the document of each row: int32 `[batch]`."""
    for rows, _ in _batches(store, hook, "doc_id", batch, seed, memory, start):
        yield rows


def _batches(
    store: Store, hook: str, column: str, batch: int, seed: int, memory: int, start: Cursor,
    longest: Mapping[str, float] | None = None, shards: ShardsOf | None = None,
) -> Iterator[tuple[Tensor, Cursor]]:  # fmt: skip
    kept = store.rows("train", kept=True)
    if kept < batch:
        raise ValueError(f"{store.folder} has {kept} training rows, fewer than a batch of {batch}: harvest more tokens")
    budget = memory / row_bytes(store.manifest["dtype"], store.d_in(hook))
    always = store.of_split("train")
    left: list[Tensor] = []
    for buffer in _prefetched(_buffers(shards or (lambda epoch: always), column, seed, budget, start, longest or {})):
        position = start.row if buffer[:2] == start[:2] else 0
        while (missing := batch - sum(map(len, left))) <= len(buffer.order) - position:
            parts = [*left, buffer.serve(position, position + missing)]
            left, position = [], position + missing
            yield torch.cat(parts) if len(parts) > 1 else parts[0], Cursor(buffer.epoch, buffer.number, position)
        left.append(buffer.serve(position, len(buffer.order)))


def _buffers(
    shards_of: ShardsOf, column: str, seed: int, budget: float, start: Cursor, longest: Mapping[str, float]
) -> Iterator[_Buffer]:
    """From the buffer that `start` names on. `budget` is the rows of two of them; their memory is used in turn."""
    epoch, index = start.epoch, start.buffer
    spare = last = np.empty(0)
    with ThreadPoolExecutor(_READERS) as pool:
        while True:
            shards = shards_of(epoch)
            size = shards[0].block_rows
            blocks = [(shard, first) for shard in shards for first in range(0, shard.n_rows, size)]
            n_buffers = min(math.ceil(2 * sum(shard.n_rows for shard in shards) / budget), len(blocks))
            most = -(-len(blocks) // n_buffers) * size
            order = np.random.default_rng([seed, epoch]).permutation(len(blocks))
            for chosen in np.array_split(order, n_buffers)[index:]:
                rng = np.random.default_rng([seed, epoch, index, 1])
                if len(spare) < most:
                    spare = shards[0].empty(column, most)
                # Reads go forward through the files; the permutation undoes their order.
                kept = _fill(pool, _pieces([blocks[i] for i in np.sort(chosen)]), column, spare, longest)
                served = np.empty_like(kept)
                served[rng.permutation(len(kept))] = kept
                yield _Buffer(epoch, index, spare, served)
                spare, last = last, spare
                index += 1
            epoch, index = epoch + 1, 0


class _Piece(NamedTuple):
    """Some blocks of one shard, those that touch joined to ranges (first row, after the last), and their place in the buffer."""

    shard: Shard
    ranges: list[tuple[int, int]]
    start: int
    stop: int


def _pieces(blocks: Sequence[tuple[Shard, int]]) -> list[_Piece]:
    found: list[_Piece] = []
    start = 0
    for shard, group in groupby(blocks, key=itemgetter(0)):
        while some := [first for _, first in islice(group, _PIECE)]:
            ranges: list[tuple[int, int]] = []
            for first in some:
                end = min(first + shard.block_rows, shard.n_rows)
                touches = bool(ranges) and ranges[-1][1] == first
                ranges[-1:] = [(ranges[-1][0], end)] if touches else [*ranges[-1:], (first, end)]
            stop = start + sum(end - first for first, end in ranges)
            found.append(_Piece(shard, ranges, start, stop))
            start = stop
    return found


def _fill(
    pool: ThreadPoolExecutor, pieces: list[_Piece], column: str, buffer: np.ndarray, longest: Mapping[str, float]
) -> np.ndarray:
    """Read the pieces into the buffer; returns the places of the rows to serve."""

    def read(piece: _Piece) -> np.ndarray:
        rows = buffer[piece.start : piece.stop]
        keep = piece.shard.empty("keep", len(rows))
        piece.shard.read_into("keep", piece.ranges, keep)
        piece.shard.read_into(column, piece.ranges, rows)
        if rows.ndim == 2 and not all_finite(from_disk(rows)):
            _refuse(piece, column, from_disk(rows), keep)
        for hook, bound in longest.items():
            vectors = rows
            if (other := activations_path(hook)) != column:
                vectors = piece.shard.empty(other, len(rows))
                piece.shard.read_into(other, piece.ranges, vectors)
            keep &= (decode(from_disk(vectors)).float().norm(dim=1) <= bound).numpy()
        return piece.start + np.flatnonzero(keep)

    return np.concatenate(list(pool.map(read, pieces)))


def _refuse(piece: _Piece, column: str, rows: Tensor, keep: np.ndarray) -> None:
    """Raises ValueError naming the first kept row that is not finite; the others may be anything."""
    bad = np.flatnonzero(keep & ~finite(rows).numpy())
    if len(bad):
        row = int(np.concatenate([np.arange(*ends) for ends in piece.ranges])[bad[0]])
        hook = column.removeprefix(activations_path(""))
        raise ValueError(f"row {row} of {piece.shard.path} at {hook} is not finite; harvest again with a wider --dtype")


def _prefetched(items: Iterator[Item]) -> Iterator[Item]:
    """The same items; the next one is made in a thread while the last one is used."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, items)
        while True:
            item = future.result()
            future = pool.submit(next, items)
            yield item

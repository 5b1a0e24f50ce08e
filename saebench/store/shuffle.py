"""Shuffled batches of activations from a store, for as many epochs as asked, from any point on.

An epoch is a random order of all blocks of the training shards. Consecutive blocks of that order
fill a buffer whose kept rows are permuted in memory; batches are cut from the concatenation of
those permutations, across buffers and epochs. Within an epoch nothing is skipped or repeated, and
the order depends on the store, the seed and the memory budget alone.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from saebench.store.reader import Shard, Store

Item = TypeVar("Item")
_STRETCH = 1 << 13  # rows of blocks that are read at once, where they touch


class Cursor(NamedTuple):
    """Where the next batch begins: epoch, buffer within the epoch, row within the buffer."""

    epoch: int = 0
    buffer: int = 0
    row: int = 0


def shuffled_batches(
    store: Store, hook: str, batch: int, *, seed: int, memory: int = 2 << 30, start: Cursor = Cursor()
) -> Iterator[tuple[Tensor, Cursor]]:
    """Endless batches `[batch, d_in]` (store dtype) of kept training rows, each with the cursor after it.

    `memory` bounds the bytes held: one buffer being served and one being read. Raises ValueError
    when the store has fewer kept rows than a batch, or a block is damaged or not finite.
    """
    kept = store.rows("train", kept=True)
    if kept < batch:
        raise ValueError(f"{store.folder} has {kept} training rows, fewer than a batch of {batch}: harvest more tokens")
    left: list[Tensor] = []
    for epoch, index, rows in _prefetched(_buffers(store, hook, seed, memory, start)):
        position = start.row if (epoch, index) == start[:2] else 0
        while sum(map(len, left)) + len(rows) - position >= batch:
            taken = batch - sum(map(len, left))
            parts = [*left, rows[position : position + taken]]
            left, position = [], position + taken
            yield torch.cat(parts), Cursor(epoch, index, position)
        left.append(rows[position:].clone())


def _buffers(store: Store, hook: str, seed: int, memory: int, start: Cursor) -> Iterator[tuple[int, int, Tensor]]:
    """(epoch, number within the epoch, permuted rows) from the buffer that `start` names on."""
    shards = store.of_split("train")
    size = shards[0].block_rows
    blocks = [(shard, first) for shard in shards for first in range(0, shard.n_rows, size)]
    total = sum(shard.n_rows for shard in shards) * store.d_in(hook) * shards[0].rows(hook, 0, 1).element_size()
    n_buffers = min(-(-2 * total // memory), len(blocks))
    epoch, index = start.epoch, start.buffer
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(len(blocks))
        for chosen in np.array_split(order, n_buffers)[index:]:
            rng = np.random.default_rng([seed, epoch, index, 1])
            # Reads go forward through the files; the permutation undoes their order.
            yield epoch, index, _permuted(_stretches([blocks[i] for i in np.sort(chosen)]), hook, rng)
            index += 1
        epoch, index = epoch + 1, 0


def _stretches(blocks: list[tuple[Shard, int]]) -> list[tuple[Shard, int, int]]:
    """(shard, first row, row after the last) of blocks in order, those that touch joined: one read costs as much as another."""
    found: list[tuple[Shard, int, int]] = []
    for shard, first in blocks:
        end = min(first + shard.block_rows, shard.n_rows)
        if found and found[-1][0] is shard and found[-1][2] == first and end - found[-1][1] <= _STRETCH:
            found[-1] = (shard, found[-1][1], end)
        else:
            found.append((shard, first, end))
    return found


def _permuted(stretches: list[tuple[Shard, int, int]], hook: str, rng: np.random.Generator) -> Tensor:
    keeps = [np.array(shard.column("keep", first, end)) for shard, first, end in stretches]
    ends = np.cumsum([keep.sum() for keep in keeps])
    places = torch.from_numpy(rng.permutation(int(ends[-1])))
    sample = stretches[0][0].rows(hook, 0, 1)
    buffer = torch.empty(len(places), sample.shape[1], dtype=sample.dtype)
    for (shard, first, _), keep, end in zip(stretches, keeps, ends, strict=True):
        rows = shard.rows(hook, first, first + len(keep))
        buffer[places[end - keep.sum() : end]] = rows[torch.from_numpy(keep)]
    finite = torch.isfinite(buffer).all(1)
    if not finite.all():
        # The buffer's rows came in the order of `places`: find the first bad one's stretch.
        bad = int((~finite)[places].nonzero()[0])
        which = int(np.searchsorted(ends, bad, side="right"))
        (shard, first, _), keep = stretches[which], keeps[which]
        row = first + int(np.flatnonzero(keep)[bad - (ends[which] - keep.sum())])
        raise ValueError(f"row {row} of {shard.path} at {hook} is not finite; harvest again with a wider --dtype")
    return buffer


def _prefetched(items: Iterator[Item]) -> Iterator[Item]:
    """The same items; the next one is made in a thread while the last one is used."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, items)
        while True:
            item = future.result()
            future = pool.submit(next, items)
            yield item

"""Shuffled batches of activations from a store, for as many epochs as asked, from any point on.

An epoch is a random order of all blocks of the training shards. Consecutive blocks of that order
are read into a buffer; batches are gathered from a permutation of its kept rows, and go on across
buffers and epochs. Within an epoch nothing is skipped or repeated, and the order depends on the
store, the seed and the rows of a buffer alone: hooks of a store get the same tokens in each batch, and several can be had at once.
A caller may give each epoch shards of its own.

Blocks may be dealt out to partitions, which are shuffled apart from each other: of several processes each reads its own.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saebench.store.coding import all_finite, decode, finite, from_disk, in_words, to_disk
from saebench.store.feed import ToGPU, ToHost, feed, prefetched
from saebench.store.reader import Store
from saebench.store.schema import activations_path
from saebench.store.shard import Shard

ShardsOf = Callable[[int], list[Shard]]
BUFFER_ROWS = 500_000
_READERS = min(max((os.cpu_count() or 2) // 2, 1), 8)  # threads that fill a buffer: half the cores are for its use
_PIECE = 256  # blocks of one shard that one of them reads at a time
_TASTED = 16  # shards whose documents say how well a buffer shuffles


class Cursor(NamedTuple):
    """Where the next batch begins: epoch, buffer within the epoch, row within the buffer."""

    epoch: int = 0
    buffer: int = 0
    row: int = 0


class Partition(NamedTuple):
    """Which one, of how many that the blocks of a store are dealt out to."""

    number: int = 0
    of: int = 1

    def deal(self, n_blocks: int, seed: int) -> np.ndarray:
        """Its own blocks: the same in every epoch, so that who reads them again finds them in page cache."""
        if self.of == 1:
            return np.arange(n_blocks)
        return np.random.default_rng([seed, self.of, self.of]).permutation(n_blocks)[self.number :: self.of]

    def seeds(self, seed: int) -> list[int]:
        """Those of the orders of its blocks and rows; the deal has that of a partition behind the last."""
        return [seed] if self.of == 1 else [seed, self.of, self.number]


class _Buffer(NamedTuple):
    """The rows of some columns as they were read, and the order in which the kept ones are served."""

    epoch: int
    number: int
    columns: tuple[np.ndarray, ...]
    order: np.ndarray

    def serve(self, start: int, column: int, out: Tensor, all_cores: bool) -> None:
        """Fill `out` with a column's rows from `start` on: the buffer's memory is used again.

        On one core where training has use for the others.
        """
        chosen, source = self.order[start : start + len(out)], in_words(self.columns[column])
        target = in_words(to_disk(out))
        if all_cores:
            torch.index_select(torch.from_numpy(source), 0, torch.from_numpy(chosen), out=torch.from_numpy(target))
        else:
            source.take(chosen, axis=0, out=target, mode="clip")


def shuffled_batches(
    store: Store, hook: str, batch: int, *,
    seed: int, buffer_rows: int | float = BUFFER_ROWS, start: Cursor = Cursor(), longest: Mapping[str, float] | None = None,
    shards: ShardsOf | None = None, device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor, Cursor]]:  # fmt: skip
    """Endless batches `[batch, d_in]` of kept training rows on `device`, as `Shard.rows` gives them, each with the cursor after it.

    Rows whose norm is above `longest` at one of the hooks that it names are left out as those are that are not kept: hooks of
    which each leaves out its own part company.
    `shards` gives the shards of an epoch (default: all of the store's, each time) and may wait until they are there;
    it is called in another thread, while the epoch before is still being served, and its errors are raised here.
    Two buffers of at most `buffer_rows` are held: one being served and one being read. Raises ValueError
    when the store has fewer kept rows than a batch, or a block is damaged or not finite.
    """
    together = joint_batches(
        store, [hook], batch, seed=seed, buffer_rows=buffer_rows, start=start, longest=longest, shards=shards, device=device
    )  # fmt: skip
    for rows, cursor in together:
        yield rows[hook], cursor


def joint_batches(
    store: Store, hooks: Sequence[str], batch: int, *,
    seed: int, buffer_rows: int | float = BUFFER_ROWS, start: Cursor = Cursor(), longest: Mapping[str, float] | None = None,
    shards: ShardsOf | None = None, device: torch.device | str = "cpu", partition: Partition = Partition(),
) -> Iterator[tuple[dict[str, Tensor], Cursor]]:  # fmt: skip
    """As `shuffled_batches`, of several hooks at once: `[batch, d_in]` for each, the same tokens in the same order in all.

    A row that is left out at one hook is left out at all. Each hook's rows are those of its own stream under the same
    `longest`. The two buffers have the rows of all hooks.
    Of a partition, `batch` is its part of a batch, and its buffers have its part of `buffer_rows`. Raises ValueError where there are
    more partitions than blocks.
    """
    ways = [feed(device) for _ in hooks]
    paths = [activations_path(hook) for hook in hooks]
    for columns, cursor in _batches(store, paths, batch, seed, buffer_rows, start, ways, longest, shards, partition):
        sent = [decode(way.sent(rows)) for way, rows in zip(ways, columns, strict=True)]
        yield dict(zip(hooks, sent, strict=True)), cursor


def shuffled_documents(
    store: Store, batch: int, *, seed: int, buffer_rows: int | float = BUFFER_ROWS, start: Cursor = Cursor()
) -> Iterator[Tensor]:
    """Of the same batches, the document of each row: int32 `[batch]`."""
    for (rows,), _ in _batches(store, ["doc_id"], batch, seed, buffer_rows, start, [ToHost()]):
        yield rows


def quality(store: Store, batch: int, buffer_rows: int | float) -> float:
    """The documents that a batch is expected to have rows of, over those of a batch from a perfect shuffle; at most 1.

    A batch of B rows touches 1 + B/M buffers of M of the N rows. A document of b blocks has Binomial(b, M'/N) of them there,
    M' = M + B, and gives the batch no row of a block of 32 with probability (1 - B/M')^32. From the documents of a few shards,
    spread over all.
    """
    if not (shards := store.of_split("train")):
        return 1.0
    some = [shards[i] for i in np.unique(np.linspace(0, len(shards) - 1, _TASTED).round().astype(int))]
    lengths = np.unique(np.concatenate([shard.column("doc_id") for shard in some]), return_counts=True)[1]
    total, size = store.rows("train"), shards[0].block_rows
    batch = min(batch, total)
    touched = min(total / math.ceil(total / buffer_rows) + batch, total)
    missed = 1 - touched / total * (1 - (1 - batch / touched) ** size)
    here = 1 - missed ** np.maximum(lengths / size, 1)
    perfect = 1 - (1 - batch / total) ** lengths
    return min(1.0, float(here.sum() / perfect.sum()))


def _batches(
    store: Store, columns: Sequence[str], batch: int, seed: int, buffer_rows: int | float, start: Cursor,
    ways: Sequence[ToHost | ToGPU], longest: Mapping[str, float] | None = None, shards: ShardsOf | None = None,
    partition: Partition = Partition(),
) -> Iterator[tuple[list[Tensor], Cursor]]:  # fmt: skip
    kept = store.rows("train", kept=True)
    if kept < batch * partition.of:
        raise ValueError(
            f"{store.folder} has {kept} training rows, fewer than a batch of {batch * partition.of}: harvest more tokens"
        )
    always = store.of_split("train")
    filled, outs = 0, [torch.empty(0) for _ in columns]
    for buffer in prefetched(
        _buffers(shards or (lambda epoch: always), columns, seed, buffer_rows, start, longest or {}, partition)
    ):
        position = start.row if buffer[:2] == start[:2] else 0
        while position < len(buffer.order):
            if not filled:
                likes = [from_disk(rows) for rows in buffer.columns]
                outs = [way.room((batch, *like.shape[1:]), like.dtype) for way, like in zip(ways, likes, strict=True)]
            more = min(batch - filled, len(buffer.order) - position)
            for column, (way, out) in enumerate(zip(ways, outs, strict=True)):
                buffer.serve(position, column, out[filled : filled + more], way.pinned)
            filled, position = filled + more, position + more
            if filled < batch:
                break
            filled = 0
            yield outs, Cursor(buffer.epoch, buffer.number, position)


def _buffers(
    shards_of: ShardsOf, columns: Sequence[str], seed: int, buffer_rows: int | float, start: Cursor,
    longest: Mapping[str, float], partition: Partition,
) -> Iterator[_Buffer]:  # fmt: skip
    """From the buffer that `start` names on; the memory of two of them is used in turn."""
    epoch, index = start.epoch, start.buffer
    seeds = partition.seeds(seed)
    spare = last = tuple(np.empty(0) for _ in columns)
    with ThreadPoolExecutor(_READERS) as pool:
        while True:
            shards = shards_of(epoch)
            size = shards[0].block_rows
            ends = np.cumsum([-(-shard.n_rows // size) for shard in shards])  # of each shard's blocks among all
            blocks, empty = partition.deal(int(ends[-1]), seed), index == 0
            if not len(blocks):
                raise ValueError(
                    f"partitions is {partition.of} and {shards[0].path.parent} has {ends[-1]} blocks of {size} rows to train on; "
                    "expected no more partitions than blocks"
                )
            n_buffers = min(math.ceil(sum(shard.n_rows for shard in shards) / buffer_rows), len(blocks))
            most = -(-len(blocks) // n_buffers) * size
            order = np.random.default_rng([*seeds, epoch]).permutation(blocks)
            for chosen in np.array_split(order, n_buffers)[index:]:
                rng = np.random.default_rng([*seeds, epoch, index, 1])
                if len(spare[0]) < most:
                    spare = tuple(shards[0].empty(column, most) for column in columns)
                # Reads go forward through the files; the permutation undoes their order.
                kept = _fill(pool, _pieces(shards, ends, np.sort(chosen)), columns, spare, longest)
                served = np.empty_like(kept)
                served[rng.permutation(len(kept))] = kept
                yield _Buffer(epoch, index, spare, served)
                spare, last = last, spare
                index += 1
                empty &= not len(kept)
            if empty:
                raise ValueError(
                    f"no row of {shards[0].path.parent} in partition {partition.number + 1} of {partition.of} is one to train on; "
                    "use fewer --partitions, a larger --exclude-outliers, or harvest more tokens"
                )
            epoch, index = epoch + 1, 0


class _Piece(NamedTuple):
    """Some blocks of one shard, those that touch joined to ranges (first row, after the last), and their place in the buffer."""

    shard: Shard
    ranges: list[tuple[int, int]]
    start: int
    stop: int


def _pieces(shards: Sequence[Shard], ends: np.ndarray, chosen: np.ndarray) -> list[_Piece]:
    """Of ascending numbers of blocks among those of all shards, which end at `ends`."""
    found: list[_Piece] = []
    start = 0
    of_shard = np.searchsorted(ends, chosen, side="right")
    for index in np.unique(of_shard):
        shard, before = shards[index], ends[index - 1] if index else 0
        mine = chosen[of_shard == index] - before
        for part in np.split(mine, range(_PIECE, len(mine), _PIECE)):
            runs = np.split(part, np.flatnonzero(np.diff(part) > 1) + 1)  # those that touch
            size = shard.block_rows
            ranges = [(int(run[0]) * size, min((int(run[-1]) + 1) * size, shard.n_rows)) for run in runs]
            stop = start + sum(end - first for first, end in ranges)
            found.append(_Piece(shard, ranges, start, stop))
            start = stop
    return found


def _fill(
    pool: ThreadPoolExecutor, pieces: list[_Piece], columns: Sequence[str], buffer: Sequence[np.ndarray],
    longest: Mapping[str, float],
) -> np.ndarray:  # fmt: skip
    """Read the pieces into the buffer; returns the places of the rows to serve."""

    def read(piece: _Piece) -> np.ndarray:
        n_rows = piece.stop - piece.start
        keep = piece.shard.empty("keep", n_rows)
        piece.shard.read_into("keep", piece.ranges, keep)
        found = {name: rows[piece.start : piece.stop] for name, rows in zip(columns, buffer, strict=True)}
        for column, rows in found.items():
            piece.shard.read_into(column, piece.ranges, rows)
            if rows.ndim == 2 and not all_finite(from_disk(rows)):
                _refuse(piece, column, from_disk(rows), keep)
        for hook, bound in longest.items():
            if (vectors := found.get(other := activations_path(hook))) is None:
                vectors = piece.shard.empty(other, n_rows)
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

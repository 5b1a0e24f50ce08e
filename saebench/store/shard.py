"""Read one shard: columns by their place in the file, every block checked against its checksum as it is read."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from torch import Tensor
from xxhash import xxh3_64_intdigest

from saebench.files import hash_files
from saebench.store.coding import decode, from_disk, width
from saebench.store.schema import (
    DIGESTS,
    ON_DISK,
    PROVENANCE,
    Moments,
    activations_path,
    column_digest,
    digest,
)

_STRETCH_BYTES = 1 << 20  # read and checked at once: in the cache of a core


class Damaged(ValueError):
    """A shard that is missing, or not what was written."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(what)
        self.path = path


def open_shard(path: Path) -> Any:
    """The HDF5 file, untyped: h5py cannot know whether a name holds a group or a data set."""
    return h5py.File(path, "r")


class _Column(NamedTuple):
    """Where a column of a shard lies in its file, and what its blocks must be."""

    offset: int
    checksums: np.ndarray
    """vouched for by the manifest"""


class Shard:
    """One file of a store; what is read is verified. Several threads may read at once."""

    def __init__(self, folder: Path, entry: dict[str, Any], manifest: dict[str, Any]) -> None:
        self.path = folder / entry["file"]
        self.name: str = entry["file"]
        self.split: str = entry["split"]
        self.n_rows: int = entry["rows"]
        self.block_rows: int = manifest["block_rows"]
        self._entry = entry
        kind = ON_DISK[manifest["dtype"]]
        widths = {hook: width(manifest["dtype"], facts["d_in"]) for hook, facts in sorted(manifest["hooks"].items())}
        vectors = {activations_path(hook): (kind, (self.n_rows, columns)) for hook, columns in widths.items()}
        self._layout = {**{name: (kind, (self.n_rows,)) for name, kind in PROVENANCE.items()}, **vectors}
        self._columns: dict[str, _Column] = {}

    def _column(self, name: str) -> _Column:
        """What is known of a column. Threads that ask at the same time may each look; they find the same."""
        if name not in self._columns:
            self._columns |= self._look([name])
        return self._columns[name]

    def _look(self, names: Sequence[str]) -> dict[str, _Column]:
        """These columns; all of them where they are vouched for together, as before version 3."""
        if not self.path.exists():
            raise self._missing()
        size = self.path.stat().st_size
        if size != self._entry["bytes"]:
            raise self._damaged(f" has {size} bytes, the manifest says {self._entry['bytes']}")
        apart = "digests" in self._entry
        found: dict[str, _Column] = {}
        try:
            with open_shard(self.path) as file:
                digests = dict(zip(sorted(self._layout), file[DIGESTS][:], strict=True)) if apart else {}
                for name in names if apart else self._layout:
                    dataset, (kind, shape) = file[name], self._layout[name]
                    # Checksums cover the data; what the header says of them is checked here.
                    if (dataset.dtype, dataset.shape) != (kind, shape):
                        raise ValueError(f"{name} is {dataset.dtype} {dataset.shape}, expected {kind} {shape}")
                    found[name] = _Column(dataset.id.get_offset(), file[f"checksums/{name}"][:])
        except (OSError, KeyError, TypeError, RuntimeError, ValueError, AttributeError, IndexError) as error:
            raise self._damaged(f" cannot be read as HDF5 ({error})") from error
        vouched = digest(digests) if apart else digest({name: column.checksums for name, column in found.items()})
        if vouched != self._entry["digests" if apart else "digest"]:
            raise self._damaged(" is not the shard that the manifest describes")
        for name in digests.keys() & found.keys():
            if not np.array_equal(column_digest(found[name].checksums), digests[name]):
                raise self._damaged(f": the checksums of {name} are not those that were written")
        return found

    def check(self) -> None:
        """Raises ValueError unless the file is there, whole, and the one that the manifest describes."""
        self._look(())

    def _damaged(self, what: str) -> Damaged:
        remedy = "it was damaged or exchanged; restore it, or delete the store and harvest again"
        return Damaged(self.path, f"{self.path}{what}: {remedy}")

    def _missing(self) -> Damaged:
        return Damaged(self.path, f"{self.path} is missing; restore it or harvest again")

    def column(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of a provenance column (`tokens`, `doc_id`, `position`, `keep`), verified."""
        return self._verified(name, start, self.n_rows if stop is None else stop)

    def rows(self, hook: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` at `hook`, `[n, d_in]`, verified: in the store's dtype, or float32 from int8."""
        stop = self.n_rows if stop is None else stop
        return decode(from_disk(self._verified(activations_path(hook), start, stop)))

    def _verified(self, name: str, start: int, stop: int) -> np.ndarray:
        first = start // self.block_rows * self.block_rows
        last = min(-(-stop // self.block_rows) * self.block_rows, self.n_rows)
        blocks = self.empty(name, max(last - first, 0))
        self.read_into(name, [(first, last)], blocks)
        return blocks[start - first : stop - first]

    def empty(self, name: str, rows: int) -> np.ndarray:
        """Room for rows of a column as the file has them."""
        kind, shape = self._layout[name]
        return np.empty((rows, *shape[1:]), kind)

    def read_into(self, name: str, ranges: Sequence[tuple[int, int]], out: np.ndarray) -> None:
        """Fill `out` with the rows (first, after the last) of each range, one after another, as the file has them.

        Ranges begin and end with a block (or the shard). Each stretch is checked while the cache still has it.
        Raises ValueError naming the first rows that are not what was written.
        """
        column = self._column(name)
        view, at = out.data.cast("B") if out.size else memoryview(b""), 0
        row = out.nbytes // max(len(out), 1)
        block = row * self.block_rows
        stretch = max(_STRETCH_BYTES // max(block, 1), 1) * self.block_rows
        found: list[int] = []
        try:
            file = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise self._missing() from error
        try:
            for first, end in ranges:
                for start in range(first, end, stretch):
                    part = view[at : at + min(stretch, end - start) * row]
                    self._fill(file, part, column.offset + start * row)
                    found += [xxh3_64_intdigest(part[i : i + block]) for i in range(0, len(part), max(block, 1))]
                    at += len(part)
        finally:
            os.close(file)
        blocks = np.concatenate([np.arange(f // self.block_rows, -(-e // self.block_rows)) for f, e in ranges])
        bad = np.array(found, dtype=np.uint64) != column.checksums[blocks]
        if bad.any():
            first = int(blocks[bad.argmax()]) * self.block_rows
            last = min(first + self.block_rows, self.n_rows) - 1
            raise self._damaged(f": rows {first} to {last} of {name} do not match their checksum")

    def _fill(self, file: int, part: memoryview, place: int) -> None:
        done = 0
        while done < len(part):
            read = os.preadv(file, [part[done:]], place + done)
            if read == 0:
                raise self._damaged(f" ends at byte {place + done}")
            done += read

    def verify(self, checked: Callable[[int], object] = lambda rows: None) -> None:
        """Check every block of every column, reporting rows as they are done. Raises ValueError at the first that is wrong."""
        self._columns = self._look(list(self._layout))
        step = self.block_rows * 128
        for start in range(0, self.n_rows, step):
            stop = min(start + step, self.n_rows)
            for name in self._layout:
                self._verified(name, start, stop)
            checked(stop - start)
        self._columns = {}  # checksums of all hooks and shards would be gigabytes
        # Blocks, whose damage is named by its rows, are not all of a file: the rest is HDF5's own structures.
        if "hash" in self._entry and hash_files([self.path]) != self._entry["hash"]:
            raise self._damaged(": bytes beside its rows are not what was written")


def entry_of(path: Path, widths: dict[str, int]) -> dict[str, Any]:
    """A whole shard's entry in the manifest, by what its file says of itself."""
    with open_shard(path) as file:
        columns = sorted([*PROVENANCE, *map(activations_path, widths)])
        if DIGESTS in file:
            vouched = {"digests": digest(dict(zip(columns, file[DIGESTS][:], strict=True)))}
        else:  # written by an earlier version
            vouched = {"digest": digest({name: file[f"checksums/{name}"][:] for name in columns})}
        return {
            "file": path.name, "split": str(file.attrs["split"]), "context": int(file.attrs["context"]),
            "cursor": file.attrs["cursor"].tolist(), "rows": len(file["tokens"]), "kept": int(file["keep"][:].sum()),
            "bytes": path.stat().st_size, "hash": hash_files([path]), **vouched,
        }  # fmt: skip


def moments_of(file: Any, hook: str) -> Moments:
    group = file[f"statistics/{hook}"]
    return Moments(
        int(group.attrs["rows"]),
        group["mean_sum"][:],
        float(group.attrs["squared_norm_sum"]),
        group["norm_histogram"][:],
    )

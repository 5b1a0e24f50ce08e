"""Read a store: memory-mapped columns, every block checked against its checksum as it is read."""

import functools
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from saebench.files import block_checksums, hash_files, read_json
from saebench.store.schema import (
    DOCUMENTS,
    MANIFEST,
    ON_DISK,
    PROVENANCE,
    SCHEMA,
    SCHEMA_VERSION,
    TOKENIZER,
    activations_path,
    digest,
)


def read_manifest(folder: Path, name: str = MANIFEST) -> dict[str, Any]:
    """The manifest. Raises ValueError when there is none, or one that this version cannot read."""
    path = folder / name
    if not path.exists():
        raise ValueError(
            f"{folder} holds no activation store (no {MANIFEST}); make one with `saebench harvest --out {folder}`"
        )
    manifest = read_json(path)
    if manifest.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not the manifest of an activation store: schema is {manifest.get('schema')!r}")
    if (version := manifest.get("schema_version")) != SCHEMA_VERSION:
        raise ValueError(
            f"{folder} has schema version {version}, this saebench reads {SCHEMA_VERSION}: "
            "use the version that wrote it, or harvest again"
        )
    return manifest


def open_shard(path: Path) -> Any:
    """The HDF5 file, untyped: h5py cannot know whether a name holds a group or a data set."""
    return h5py.File(path, "r")


class Shard:
    """One file of a store, memory-mapped; what is read is verified."""

    def __init__(self, folder: Path, entry: dict[str, Any], manifest: dict[str, Any]) -> None:
        self.path = folder / entry["file"]
        self.name: str = entry["file"]
        self.split: str = entry["split"]
        self.n_rows: int = entry["rows"]
        self.block_rows: int = manifest["block_rows"]
        self._entry = entry
        hooks = {activations_path(hook): facts["d_in"] for hook, facts in sorted(manifest["hooks"].items())}
        vectors = {path: (ON_DISK[manifest["dtype"]], (self.n_rows, d_in)) for path, d_in in hooks.items()}
        self._layout = {**{name: (kind, (self.n_rows,)) for name, kind in PROVENANCE.items()}, **vectors}

    @functools.cached_property
    def _opened(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], mmap.mmap]:
        """Mapped columns, their block checksums, vouched for by the manifest's digest, and the map."""
        if not self.path.exists():
            raise ValueError(f"{self.path} is missing; restore it or harvest again")
        size = self.path.stat().st_size
        if size != self._entry["bytes"]:
            raise ValueError(
                f"{self.path} has {size} bytes, the manifest says {self._entry['bytes']}: {self._remedy()}"
            )
        columns: dict[str, np.ndarray] = {}
        try:
            with self.path.open("rb") as raw:
                mapped = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
            with open_shard(self.path) as file:
                checksums = {name: file[f"checksums/{name}"][:] for name in self._layout}
                for name, (kind, shape) in self._layout.items():
                    dataset = file[name]
                    # Checksums cover the data; what the header says of them is checked here.
                    if (dataset.dtype, dataset.shape) != (kind, shape):
                        raise ValueError(f"{name} is {dataset.dtype} {dataset.shape}, expected {kind} {shape}")
                    offset = dataset.id.get_offset()
                    columns[name] = np.ndarray(dataset.shape, dataset.dtype, mapped, offset)
        except (OSError, KeyError, TypeError, RuntimeError, ValueError, AttributeError, IndexError) as error:
            raise ValueError(f"{self.path} cannot be read as HDF5 ({error}): {self._remedy()}") from error
        if digest(checksums) != self._entry["digest"]:
            raise ValueError(f"{self.path} is not the shard that the manifest describes: {self._remedy()}")
        return columns, checksums, mapped

    def check(self) -> None:
        """Raises ValueError unless the file is there, whole, and the one that the manifest describes."""
        _ = self._opened

    @staticmethod
    def _remedy() -> str:
        return "it was damaged or exchanged; restore it, or delete the store and harvest again"

    def column(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of a provenance column (`tokens`, `doc_id`, `position`, `keep`), verified."""
        return self._verified(name, start, self.n_rows if stop is None else stop)

    def rows(self, hook: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` at `hook`, `[n, d_in]` in the store's dtype, verified."""
        raw = self._verified(activations_path(hook), start, self.n_rows if stop is None else stop)
        tensor = torch.from_numpy(np.array(raw))
        self._let_go(raw)
        return tensor.view(torch.bfloat16) if raw.dtype == np.uint16 else tensor

    def _let_go(self, rows: np.ndarray) -> None:
        """Unmap the pages of rows that were copied, so that a pass over a store does not come to hold all of it."""
        mapped = self._opened[2]
        first = rows.ctypes.data - np.frombuffer(mapped, np.uint8).ctypes.data
        start, end = -(-first // mmap.PAGESIZE), (first + rows.nbytes) // mmap.PAGESIZE
        if end > start:
            mapped.madvise(mmap.MADV_DONTNEED, start * mmap.PAGESIZE, (end - start) * mmap.PAGESIZE)

    def _verified(self, name: str, start: int, stop: int) -> np.ndarray:
        columns, checksums, _ = self._opened
        first, last = start // self.block_rows, -(-stop // self.block_rows)
        blocks = columns[name][first * self.block_rows : last * self.block_rows]
        bad = np.flatnonzero(block_checksums(blocks, self.block_rows) != checksums[name][first:last])
        if len(bad):
            row = (first + bad[0]) * self.block_rows
            raise ValueError(
                f"{self.path}: rows {row} to {min(row + self.block_rows, self.n_rows) - 1} of {name} do not match their checksum: "
                f"{self._remedy()}"
            )
        offset = first * self.block_rows
        return blocks[start - offset : stop - offset]

    def verify(self) -> Iterator[int]:
        """Check every block; yields the rows done. Raises ValueError at the first that is wrong."""
        step = self.block_rows * 128
        for start in range(0, self.n_rows, step):
            stop = min(start + step, self.n_rows)
            for name in self._opened[0]:
                self._verified(name, start, stop)
            yield stop - start


class Store:
    """A finished store, opened for reading."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.hooks: list[str] = sorted(manifest["hooks"])
        self.context: int = manifest["identity"]["context"]
        self.shards = [Shard(folder, entry, manifest) for entry in manifest["shards"]]

    def of_split(self, split: str) -> list[Shard]:
        return [shard for shard in self.shards if shard.split == split]

    def d_in(self, hook: str) -> int:
        return self._hook(hook)["d_in"]

    def statistics(self, hook: str) -> dict[str, Any]:
        """Over kept training rows: `rows`, `mean` `[d_in]`, `mean_squared_norm`, `median_norm`."""
        return self._hook(hook)["statistics"]

    def _hook(self, hook: str) -> dict[str, Any]:
        if hook not in self.manifest["hooks"]:
            raise ValueError(f"hook {hook!r} is not in {self.folder}; it has {', '.join(self.hooks)}")
        return self.manifest["hooks"][hook]

    def rows(self, split: str, *, kept: bool = False) -> int:
        entries = [entry for entry in self.manifest["shards"] if entry["split"] == split]
        return sum(entry["kept" if kept else "rows"] for entry in entries)

    def kept_rows(self, hook: str, split: str, limit: int, chunk: int) -> Iterator[Tensor]:
        """Kept rows of a split in order, float32 `[at most chunk, d_in]`, `limit` of them at most."""
        for shard in self.of_split(split):
            for start in range(0, shard.n_rows, chunk):
                if limit <= 0:
                    return
                stop = min(start + chunk, shard.n_rows)
                keep = torch.from_numpy(shard.column("keep", start, stop).copy())
                rows = shard.rows(hook, start, stop)[keep][:limit].float()
                limit -= len(rows)
                yield rows

    def tokenizer(self) -> Any:
        """The tokenizer copied beside the store."""
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        # AutoTokenizer imports the code of the model that the tokenizer belongs to, ten times what is needed here.
        whole = (self.folder / TOKENIZER / "tokenizer.json").exists()
        return (PreTrainedTokenizerFast if whole else AutoTokenizer).from_pretrained(self.folder / TOKENIZER)

    def verify_beside(self) -> None:
        """Check what lies beside the shards. Raises ValueError naming the part that is not as it was written."""
        expected = {
            TOKENIZER: self.manifest["identity"]["tokenizer"]["files"],
            DOCUMENTS: self.manifest["documents_hash"],
        }
        for name, digest_then in expected.items():
            path = self.folder / name
            files = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
            if hash_files(files) != digest_then:
                raise ValueError(f"{path} is not what the harvest wrote: restore it, or harvest again")

    def document_names(self) -> dict[int, str]:
        import pyarrow.parquet as pq

        table = pq.read_table(self.folder / DOCUMENTS).to_pydict()
        return dict(zip(table["doc_id"], table["name"], strict=True))


def open_store(folder: Path | str) -> Store:
    """Open a finished store. Raises ValueError when there is none, it is unfinished or of another schema."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    if not manifest["complete"]:
        raise ValueError(
            f"{folder} is unfinished ({len(manifest['shards'])} shards so far); run the same harvest again to complete it"
        )
    return Store(folder, manifest)


def describe(store: Store) -> str:
    """What is in a store, for people."""
    manifest, made = store.manifest, store.manifest["identity"]
    size = sum(entry["bytes"] for entry in manifest["shards"])
    lines = [
        f"{store.folder}: {len(store.shards)} shards, {size / 1e6:,.0f} MB, contexts of {store.context} tokens, {manifest['dtype']}",
        f"  model    {made['model']['id']} in {made['model_dtype']} (weights {made['model']['weights'][:12]})",
        f"  text     {made['text']['dataset']}: {manifest['documents']:,} documents"
        + (", all of it" if manifest["exhausted"] else ""),
    ]
    lines += [
        f"  {split:<10} {store.rows(split):>12,} rows, {store.rows(split, kept=True):>12,} kept"
        for split in ("train", "validation")
    ]
    for hook in store.hooks:
        statistics = store.statistics(hook)
        lines.append(
            f"  {hook}  d_in {store.d_in(hook)}, median norm {statistics['median_norm']:.4g}, "
            f"root mean square norm {statistics['mean_squared_norm'] ** 0.5:.4g}"
        )
    return "\n".join(lines)

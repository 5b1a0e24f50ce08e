"""Write a store shard by shard; what is finished survives whatever happens next."""

import io
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from saebench.config import differences, flat
from saebench.files import block_checksums, hash_files, replacing
from saebench.store import coding
from saebench.store.manifest import (
    add_to_journal,
    begin_manifest,
    drop_unfinished,
    mend_journal,
    publish_manifest,
    read_manifest,
)
from saebench.store.reader import Shard, open_shard
from saebench.store.schema import (
    BLOCK_ROWS,
    DIGESTS,
    DOCUMENTS,
    EXTENSION,
    MANIFEST,
    ON_DISK,
    PROVENANCE,
    SCHEMA,
    SCHEMA_VERSION,
    TOKENIZER,
    UNEMBEDDING,
    Moments,
    StoreDtype,
    activations_path,
    column_digest,
    digest,
    shard_name,
)


class _Spool(io.RawIOBase):
    """A file whose failures HDF5 never sees: the first is remembered, and writes after it go nowhere.

    HDF5 cannot close a file after a write that failed, and then crashes the process as it exits.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self.position = 0
        self.error: OSError | None = None

    def check(self) -> None:
        """Raises the OSError that a write has met."""
        if self.error is not None:
            raise self.error

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: os.fstat(self.fd).st_size}[whence]
        self.position = base + offset
        return self.position

    def tell(self) -> int:
        return self.position

    # h5py hands over Cython's memory views, which are not instances of `memoryview`.

    def readinto(self, buffer: Any) -> int:
        read = os.preadv(self.fd, [buffer], self.position)
        self.position += read
        return read

    def write(self, data: Any) -> int:
        data, written = memoryview(data), 0
        while written < len(data) and self.error is None:
            try:
                written += os.pwrite(self.fd, data[written:], self.position + written)
            except OSError as error:
                self.error = error
        self.position += len(data)
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        size = self.position if size is None else size
        try:
            os.ftruncate(self.fd, size)
        except OSError as error:
            self.error = self.error or error
        return size

    def close(self) -> None:
        if not self.closed:
            os.close(self.fd)
        super().close()


class ShardWriter:
    """One shard being filled, under a temporary name."""

    def __init__(self, path: Path, rows: int, widths: dict[str, int], dtype: StoreDtype) -> None:
        self.path = path
        self.rows = rows
        self.dtype: StoreDtype = dtype
        self.filled = 0
        self.moments = {hook: Moments.zero(width) for hook, width in widths.items()}
        self.spool = _Spool(path)
        # No time stamps: equal contents give equal bytes.
        self.file: Any = h5py.File(self.spool, "w", track_times=False)
        for name, kind in PROVENANCE.items():
            self.file.create_dataset(name, (rows,), kind, track_times=False)
        for hook, width in widths.items():
            shape = (rows, coding.width(dtype, width))
            dataset = self.file.create_dataset(activations_path(hook), shape, ON_DISK[dtype], track_times=False)
            dataset.attrs["dtype"] = dtype

    def write(
        self,
        provenance: dict[str, np.ndarray],
        activations: dict[str, Tensor],
        moments: dict[str, Moments] | None = None,
    ) -> None:
        """Append rows: every column of `PROVENANCE` `[n]`, and per hook a CPU tensor that `coding.encode` made `[n, width]`.

        `moments` are those of the kept rows, where they are known. Raises ValueError naming the first kept row that is not finite.
        """
        start, stop = self.filled, self.filled + len(provenance["tokens"])
        keep = torch.from_numpy(provenance["keep"])
        for hook, rows in activations.items():
            assert rows.dtype == getattr(torch, self.dtype)
            found = None if moments is None else moments[hook]
            kept = rows[keep] if found is None else rows
            if not (coding.all_finite(kept) if found is None else math.isfinite(found.total_squared_norm)):
                self._refuse(hook, rows, keep)
            found = found or Moments.of(coding.decode(kept).float().numpy())
            self.moments[hook] = self.moments[hook].plus(found)
            self.file[activations_path(hook)][start:stop] = coding.to_disk(rows)
        for name in PROVENANCE:
            self.file[name][start:stop] = provenance[name]
        self.spool.check()
        self.filled = stop

    def _refuse(self, hook: str, rows: Tensor, keep: Tensor) -> None:
        bad = (~coding.finite(rows) & keep).nonzero()[0].item()
        remedy = " (float16 ends at 65504: harvest with --dtype bfloat16)" if self.dtype == "float16" else ""
        raise ValueError(
            f"row {self.filled + bad} of {self.path.name.strip('.').removesuffix('.tmp')} at {hook} is not finite{remedy}; "
            "nothing of this shard was kept"
        )

    def finish(self, attributes: dict[str, Any], documents: dict[int, str]) -> None:
        """Add checksums, statistics and document names."""
        assert self.filled == self.rows, f"{self.filled} of {self.rows} rows written"
        self.file.flush()
        self.spool.check()
        checksums: dict[str, np.ndarray] = {}
        for name, dataset in self._columns().items():
            # Read back what the file holds, so that the checksum vouches for the write as well.
            column = np.memmap(self.path, dataset.dtype, "r", dataset.id.get_offset(), dataset.shape)
            checksums[name] = block_checksums(column, BLOCK_ROWS)
        for name, values in checksums.items():
            self.file.create_dataset(f"checksums/{name}", data=values, track_times=False)
        digests = np.stack([column_digest(checksums[name]) for name in sorted(checksums)])
        self.file.create_dataset(DIGESTS, data=digests, track_times=False)
        for hook, moments in self.moments.items():
            group = f"statistics/{hook}"
            self.file.create_dataset(f"{group}/mean_sum", data=moments.total, track_times=False)
            self.file.create_dataset(f"{group}/norm_histogram", data=moments.norm_histogram, track_times=False)
            self.file[group].attrs.update(rows=moments.rows, squared_norm_sum=moments.total_squared_norm)
        self.file.create_dataset("documents/doc_id", data=np.array(sorted(documents), dtype="<i4"), track_times=False)
        names = [documents[index] for index in sorted(documents)]
        self.file.create_dataset("documents/name", data=names, dtype=h5py.string_dtype(), track_times=False)
        self.file.attrs.update(schema=SCHEMA, schema_version=SCHEMA_VERSION, block_rows=BLOCK_ROWS, **attributes)
        self.close()
        self.spool.check()

    def _columns(self) -> dict[str, Any]:
        hooks = {activations_path(hook): self.file[activations_path(hook)] for hook in self.moments}
        return {**{name: self.file[name] for name in PROVENANCE}, **hooks}

    def close(self) -> None:
        if self.file:  # h5py's way to ask whether it is open
            self.file.close()
            self.spool.close()


def _shards_in(folder: Path) -> dict[int, Path]:
    """The shards' files by their numbers."""
    found = ((re.fullmatch(r"shard-(\d{5,})\.h5", path.name), path) for path in folder.glob("shard-*.h5"))
    return {int(match[1]): path for match, path in found if match}


class StoreWriter:
    """Adds shards to the store in `folder`, creating it or continuing one made with the same `identity`.

    `identity` is everything that decides the store's contents. Raises ValueError, naming the values
    that differ, when the folder holds shards of another identity, and naming the shard when one that
    it would continue from is missing or damaged (block contents are checked as they are read).

    With `finished`, the manifest of a whole store, shards are added behind that store's, which stays what it is
    until `complete`: the manifest of the longer one is kept in a file of its own until then.
    Of several processes that write one store, the one that `leads` writes the manifest, and opens it first.
    """

    def __init__(
        self, folder: Path, identity: dict[str, Any], widths: dict[str, int], dtype: StoreDtype,
        *, finished: dict[str, Any] | None = None, leads: bool = True,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.widths = widths
        self.dtype: StoreDtype = dtype
        self.leads = leads
        self.path = folder / (MANIFEST if finished is None else EXTENSION)
        earlier = read_manifest(folder, self.path.name) if self.path.exists() else None
        changed = differences(flat(earlier["identity"]), flat(identity)) if earlier else []
        on_disk = {} if finished else _shards_in(folder)
        if earlier is None and on_disk:
            raise ValueError(
                f"{folder} holds {len(on_disk)} shards, {on_disk[min(on_disk)].name} for one, and no {MANIFEST} that says what they are: "
                "restore it, move the shards away, or choose another --out"
            )
        # Where no shard was written yet, nothing is lost by beginning again with other settings.
        if earlier is not None and (earlier["shards"] or on_disk or not changed):
            self.manifest = earlier
            if changed:
                raise ValueError(
                    f"{folder} holds a store made with other settings: {'; '.join(changed)}. "
                    "Use the same settings to continue it, or another --out, or delete it"
                )
            for entry in self.shards:
                Shard(folder, entry, self.manifest).check()
            if leads and self.manifest["complete"]:
                drop_unfinished(self.path)  # killed between the two
            elif leads:
                mend_journal(self.path)
                self.adopt()
        else:
            self.manifest = {
                "schema": SCHEMA, "schema_version": SCHEMA_VERSION, "identity": identity, "complete": False,
                "dtype": dtype, "block_rows": BLOCK_ROWS, "shards": list(finished["shards"] if finished else []),
                "hooks": {hook: {"d_in": width} for hook, width in widths.items()},
                **({"grown_from": [*finished.get("grown_from", []), hash_files([folder / MANIFEST])]} if finished else {}),
            }  # fmt: skip
            for path in self._present().values():
                path.unlink()  # of an extension that was given up: what lies beyond a manifest is always its own
            if finished is None:
                (folder / UNEMBEDDING).unlink(missing_ok=True)
            begin_manifest(self.path, self.manifest)

    @property
    def shards(self) -> list[dict[str, Any]]:
        return self.manifest["shards"]

    @property
    def present(self) -> frozenset[int]:
        """The numbers of whole shards on disk that the manifest does not have yet: another shard before them is missing."""
        return frozenset(self._present())

    def _present(self) -> dict[int, Path]:
        return {index: path for index, path in _shards_in(self.folder).items() if index >= len(self.shards)}

    def add_tokenizer(self, files: Sequence[Path]) -> None:
        """Copy the tokenizer's files beside the store, so that text is decoded without the model."""
        target = self.folder / TOKENIZER
        target.mkdir(exist_ok=True)
        for file in files:
            with replacing(target / file.name) as temporary:
                shutil.copyfile(file, temporary)

    @property
    def has_unembedding(self) -> bool:
        return (self.folder / UNEMBEDDING).exists()

    def add_unembedding(self, W_U: Tensor, gamma: Tensor, *, centred: bool, scale: float) -> None:
        """Write what leads from the residual stream to the logits, so that logit effects are known without the model.

        `W_U` `[D, V]` in the model's dtype, the final norm's weight `gamma` `[D]`, whether it is `centred`, and the logits' `scale`.
        """
        tensors = {
            "weight": W_U.detach().T.cpu().contiguous(),
            "gamma": gamma.detach().cpu().contiguous(),
            "scale": torch.tensor(scale),  # metadata of more than one key come in an order of chance
        }
        with replacing(self.folder / UNEMBEDDING) as temporary:
            safetensors.torch.save_file(tensors, temporary, {"centred": str(centred).lower()})

    @contextmanager
    def shard(
        self, rows: int, index: int | None = None
    ) -> Iterator[tuple[ShardWriter, dict[int, str], dict[str, Any]]]:
        """Shard number `index`, or the next, of `rows` rows: its writer, and the document names and attributes to fill in.

        It joins the store when the block ends without an exception, and leaves no trace otherwise.
        A full disk is a ValueError that says what is safe.
        """
        path = self.folder / shard_name(len(self.shards) if index is None else index)
        documents: dict[int, str] = {}
        attributes: dict[str, Any] = {}
        try:
            with replacing(path) as temporary:
                writer = ShardWriter(temporary, rows, self.widths, self.dtype)
                try:
                    yield writer, documents, attributes
                    writer.finish(attributes, documents)
                finally:
                    writer.close()
            if self.leads:
                self.adopt()
        except OSError as error:
            raise ValueError(
                f"writing {path} failed: {error}. The {len(self.shards)} whole shards before it are safe; "
                "free some space and run the same command again to continue"
            ) from error

    def adopt(self) -> None:
        """Take the shards on disk that come next into the journal, whoever wrote them."""
        while (path := self.folder / shard_name(len(self.shards))).exists():
            entry = _entry(path, self.widths)
            add_to_journal(self.path, entry)
            self.shards.append(entry)

    def complete(self, facts: dict[str, Any]) -> None:
        """Merge the shards' statistics and document names, and mark the store whole."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        moments = {hook: Moments.zero(width) for hook, width in self.widths.items()}
        documents: dict[int, tuple[str, str]] = {}
        for entry in self.shards:
            with open_shard(self.folder / entry["file"]) as file:
                names = zip(
                    file["documents/doc_id"][:].tolist(), file["documents/name"].asstr()[:].tolist(), strict=True
                )
                documents |= {doc_id: (name, entry["split"]) for doc_id, name in names}
                if entry["split"] == "train":
                    moments = {hook: total.plus(_moments(file, hook)) for hook, total in moments.items()}
        for hook, total in moments.items():
            self.manifest["hooks"][hook]["statistics"] = total.to_json()
        table = pa.table({
            "doc_id": pa.array(sorted(documents), pa.int32()),
            "name": [documents[doc_id][0] for doc_id in sorted(documents)],
            "split": [documents[doc_id][1] for doc_id in sorted(documents)],
        })  # fmt: skip
        with replacing(self.folder / DOCUMENTS) as temporary:
            pq.write_table(table, temporary)
        self.manifest |= {
            **facts,
            "documents": len(documents),
            "documents_hash": hash_files([self.folder / DOCUMENTS]),
            **({"unembedding_hash": hash_files([self.folder / UNEMBEDDING])} if self.has_unembedding else {}),
            "schema_version": SCHEMA_VERSION,  # also of a store that an earlier version began
            "complete": True,
        }
        publish_manifest(self.path, self.manifest)


def _entry(path: Path, widths: dict[str, int]) -> dict[str, Any]:
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


def _moments(file: Any, hook: str) -> Moments:
    group = file[f"statistics/{hook}"]
    return Moments(
        int(group.attrs["rows"]),
        group["mean_sum"][:],
        float(group.attrs["squared_norm_sum"]),
        group["norm_histogram"][:],
    )

"""Write one shard: its columns, then checksums and statistics of what the file holds."""

import io
import math
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from saebench.files import block_checksums
from saebench.store import coding
from saebench.store.schema import (
    BLOCK_ROWS,
    DIGESTS,
    ON_DISK,
    PROVENANCE,
    SCHEMA,
    SCHEMA_VERSION,
    Moments,
    StoreDtype,
    activations_path,
    column_digest,
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

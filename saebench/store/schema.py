"""What is in a store: names, dtypes, versions, and the statistics kept of each hook."""

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

SCHEMA = "saebench-activations"
# What a store needs of its reader: version 2 was of stores with int8 rows; since 3 each column's checksums have a digest of their own.
SCHEMA_VERSION = 3
SCHEMA_VERSIONS = (1, 2, SCHEMA_VERSION)
MANIFEST = "manifest.json"
MANIFEST_HASH = "manifest.xxh3"
EXTENSION = "extension.json"  # the manifest of a store that is being extended, until it takes the other's place
DOCUMENTS = "documents.parquet"
TOKENIZER = "tokenizer"
UNEMBEDDING = "unembedding.safetensors"
DIGESTS = "digests"  # data set of a shard: the digest of each column's checksums, columns in order of name

BLOCK_ROWS = 32  # rows under one checksum: the smallest read of a shuffled epoch

StoreDtype = Literal["float16", "bfloat16", "float32", "int8"]
# HDF5 has no bfloat16: its bits are kept as uint16, marked by the attribute `dtype`. What an int8 row is, `coding.py` says.
ON_DISK: dict[str, np.dtype] = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "float32": np.dtype("<f4"),
    "int8": np.dtype("i1"),
}
PROVENANCE: dict[str, np.dtype] = {
    "tokens": np.dtype("<i4"),
    "doc_id": np.dtype("<i4"),
    "position": np.dtype("<i4"),
    "keep": np.dtype("?"),
}

# Norms are counted in bins of 1/64 octave from 2^-20 to 2^20: a median to half a percent, at no
# cost in memory and with sums that do not depend on the order of shards.
NORM_BINS = 40 * 64
_NORM_FLOOR = 2.0**-20


MASSIVE = 10.0
"""times the median norm of a hook's kept training rows: longer rows are massive (Sun et al. 2024, "Massive activations in large
language models"). Attention sinks that are not BOS, a few in a thousand rows at most, which no figure of an SAE should be about."""


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.h5"


def activations_path(hook: str) -> str:
    return f"activations/{hook}"


def digest(columns: dict[str, np.ndarray]) -> str:
    """One xxh3-128 over the columns' names and values: of their digests, or in shards before version 3 of all of their checksums."""
    total = xxhash.xxh3_128()
    for name in sorted(columns):
        total.update(name.encode())
        total.update(_little_endian(columns[name]))
    return total.hexdigest()


def column_digest(checksums: np.ndarray) -> np.ndarray:
    """The xxh3-128 of a column's block checksums, uint8 `[16]`."""
    return np.frombuffer(xxhash.xxh3_128_digest(_little_endian(checksums)), dtype=np.uint8)


def _little_endian(values: np.ndarray) -> bytes:
    return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


class Moments(NamedTuple):
    """Sums over kept rows of one hook: row count, Σx `[d_in]`, Σ‖x‖², histogram of ‖x‖ `[NORM_BINS]`."""

    rows: int
    total: np.ndarray
    total_squared_norm: float
    norm_histogram: np.ndarray

    @staticmethod
    def zero(d_in: int) -> "Moments":
        return Moments(0, np.zeros(d_in), 0.0, np.zeros(NORM_BINS, dtype=np.int64))

    @staticmethod
    def of(vectors: np.ndarray) -> "Moments":
        """Of float vectors `[n, d_in]`."""
        vectors = vectors.astype(np.float64)
        squared = np.einsum("nd,nd->n", vectors, vectors)
        octaves = np.log2(np.maximum(np.sqrt(squared), _NORM_FLOOR) / _NORM_FLOOR)
        bins = np.minimum((octaves * 64).astype(np.int64), NORM_BINS - 1)
        return Moments(len(vectors), vectors.sum(0), float(squared.sum()), np.bincount(bins, minlength=NORM_BINS))

    @staticmethod
    def packed(vectors: Tensor, keep: Tensor) -> Tensor:
        """The same of those of float vectors `[n, d_in]` that are to be kept, bool `[n]`, on their device and without waiting
        for it: float64 `[2 + NORM_BINS + d_in]`, for `unpacked`. Σ‖x‖² is not finite where one of them is not."""
        weights = keep.double()
        norms = torch.linalg.vector_norm(vectors.float(), dim=1, dtype=torch.float64).where(keep, 0.0)
        octaves = (norms.clamp(min=_NORM_FLOOR) / _NORM_FLOOR).log2()
        bins = (octaves * 64).nan_to_num(0.0).clamp(max=NORM_BINS - 1).long()
        histogram = weights.new_zeros(NORM_BINS).index_add_(0, bins, weights)
        total = vectors.where(keep[:, None], 0.0).sum(0, dtype=torch.float64)
        return torch.cat([weights.sum()[None], norms.square().sum()[None], histogram, total])

    @staticmethod
    def unpacked(values: np.ndarray) -> "Moments":
        rows, squared, histogram, total = np.split(values, [1, 2, 2 + NORM_BINS])
        return Moments(int(rows[0]), total.copy(), float(squared[0]), histogram.astype(np.int64))

    def plus(self, other: "Moments") -> "Moments":
        return Moments(
            self.rows + other.rows,
            self.total + other.total,
            self.total_squared_norm + other.total_squared_norm,
            self.norm_histogram + other.norm_histogram,
        )

    def to_json(self) -> dict[str, Any]:
        """The manifest's statistics of a hook."""
        count = max(self.rows, 1)
        filled = np.flatnonzero(self.norm_histogram)
        first, last = (int(filled[0]), int(filled[-1])) if len(filled) else (0, -1)
        return {
            "rows": self.rows,
            "mean": (self.total / count).tolist(),
            "mean_squared_norm": self.total_squared_norm / count,
            "median_norm": norm_quantile(self.norm_histogram, 0.5),
            "norms": {"first_bin": first, "rows": self.norm_histogram[first : last + 1].tolist()},
        }


class Norms(NamedTuple):
    """How long the kept training rows of a hook are."""

    bound: float
    """rows of a greater norm are massive"""
    rows: int
    massive: int
    """of the rows, to a bin of half a percent"""
    median: float
    """norm of the rows that are not massive"""

    @staticmethod
    def of(histogram: np.ndarray) -> "Norms":
        """From the rows in each bin of norms, `[NORM_BINS]`."""
        bound = MASSIVE * norm_quantile(histogram, 0.5)
        usual = ~bins_beyond(bound)
        return Norms(
            bound, int(histogram.sum()), int(histogram[~usual].sum()), norm_quantile(np.where(usual, histogram, 0), 0.5)
        )


def norm_at(index: int | float) -> float:
    """The norm at the lower edge of a bin, or anywhere between two."""
    return float(_NORM_FLOOR * 2 ** (index / 64))


def bins_beyond(bound: float) -> np.ndarray:
    """Which bins of norms lie above a norm, by their middles: bool `[NORM_BINS]`."""
    return np.array([norm_at(index + 0.5) for index in range(NORM_BINS)]) > bound


def norm_quantile(histogram: np.ndarray, q: float) -> float:
    """The norm that a share `q` of the rows stays under, to half a percent; 0 without rows."""
    below = np.cumsum(histogram)
    if not below[-1]:
        return 0.0
    return norm_at(int(np.searchsorted(below, max(q * below[-1], 1))) + 0.5)

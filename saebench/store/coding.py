"""Vectors as a store keeps them: float types as they are, or int8 with what each row needs to come back.

An int8 row is one record of `d_in + TAIL` bytes, so that it is written, checksummed, read and shuffled like
a row of any other type: `d_in` whole numbers; the scale, float32; and the row's `PEAKS` largest coordinates
kept exactly, their values as float32 and their places as uint16. The scale is that of the largest
coordinate left, over 127: a few massive coordinates (Sun et al. 2024, "Massive activations in large
language models") would otherwise leave no steps for the rest.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from saebench.store.schema import ON_DISK, StoreDtype

PEAKS = 4
TAIL = 4 + PEAKS * (4 + 2)
_LEVELS = 127
_CACHEFUL = 1 << 18
# The exponent bits of each type, which an infinity or NaN has set to the last one, and no other number has.
_EXPONENTS = {
    torch.float16: (torch.int16, np.int16(0x7C00)),
    torch.bfloat16: (torch.int16, np.int16(0x7F80)),
    torch.float32: (torch.int32, np.int32(0x7F800000)),
}


def width(dtype: StoreDtype, d_in: int) -> int:
    """Numbers in a stored row of a hook."""
    return d_in + TAIL if dtype == "int8" else d_in


def row_bytes(dtype: StoreDtype, d_in: int) -> int:
    return width(dtype, d_in) * ON_DISK[dtype].itemsize


def encode(vectors: Tensor, dtype: StoreDtype) -> Tensor:
    """Vectors `[n, d_in]` as rows of a store `[n, width]` in its dtype, computed on their device."""
    if dtype != "int8":
        return vectors.to(getattr(torch, dtype))
    if vectors.shape[1] <= PEAKS:
        raise ValueError(f"d_in is {vectors.shape[1]}; int8 expects more than {PEAKS}: use --dtype float16")
    x = vectors.float()
    largest, places = x.abs().topk(PEAKS + 1, dim=1)
    places = places[:, :PEAKS]
    scale = largest[:, PEAKS:] / _LEVELS
    levels = (x / scale.clamp(min=torch.finfo(torch.float32).tiny)).round_().clamp_(-_LEVELS, _LEVELS)
    levels.scatter_(1, places, 0.0)
    tail = [scale, x.gather(1, places), places.to(torch.int16)]
    return torch.cat([levels.to(torch.int8), *(part.contiguous().view(torch.int8) for part in tail)], dim=1)


def decode(rows: Tensor) -> Tensor:
    """Stored rows `[n, width]` as vectors `[n, d_in]`: float32 for int8, else the same tensor."""
    if rows.dtype != torch.int8:
        return rows
    scale, peaks, places = _tail(rows)
    vectors = rows[:, : rows.shape[1] - TAIL].float().mul_(scale)
    return vectors.scatter_(1, places.long() & 0xFFFF, peaks)


def _tail(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of int8 rows: scale `[n, 1]`, peaks `[n, PEAKS]`, their places `[n, PEAKS]` as the bits of uint16."""
    tail = rows[:, rows.shape[1] - TAIL :]
    scale, peaks, places = (part.contiguous() for part in tail.split([4, 4 * PEAKS, 2 * PEAKS], dim=1))
    return scale.view(torch.float32), peaks.view(torch.float32), places.view(torch.int16)


def finite(rows: Tensor) -> Tensor:
    """Which stored rows `[n, width]` are finite throughout."""
    if rows.dtype == torch.int8:
        scale, peaks, _ = _tail(rows)
        return torch.isfinite(torch.cat([scale, peaks], dim=1)).all(1)
    return torch.isfinite(rows).all(1)


def all_finite(rows: Tensor) -> bool:
    """`finite(rows).all()` at the speed of memory: by the bits of contiguous rows, a cacheful at a time."""
    if rows.dtype == torch.int8:
        return bool(finite(rows).all())
    word, exponent = _EXPONENTS[rows.dtype]
    words = rows.view(word).numpy().reshape(-1)
    parts = (words[start : start + _CACHEFUL] for start in range(0, len(words), _CACHEFUL))
    # numpy, since torch would start a set of threads of its own in each thread that asks.
    return all((part & exponent).max() < exponent for part in parts)


def from_disk(raw: np.ndarray) -> Tensor:
    """Rows as HDF5 has them, without a copy: bfloat16 lies there as uint16."""
    tensor = torch.from_numpy(raw)
    return tensor.view(torch.bfloat16) if raw.dtype == ON_DISK["bfloat16"] else tensor


def to_disk(rows: Tensor) -> Any:
    """The inverse of `from_disk`."""
    return (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy()


def in_words(rows: np.ndarray) -> np.ndarray:
    """Contiguous rows seen as the widest integers that fit: faster to gather than halves."""
    size = rows.strides[0]
    return rows.view(
        next(word for word in (np.int64, np.int32, np.int16, np.int8) if size % np.dtype(word).itemsize == 0)
    )

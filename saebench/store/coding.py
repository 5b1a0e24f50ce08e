"""Vectors as a store keeps them."""

import torch
from torch import Tensor

from saebench.store.schema import ON_DISK, StoreDtype


def row_bytes(dtype: StoreDtype, d_in: int) -> int:
    return d_in * ON_DISK[dtype].itemsize


def encode(vectors: Tensor, dtype: StoreDtype) -> Tensor:
    """Vectors `[n, d_in]` as rows of a store `[n, width]` in its dtype, computed on their device."""
    return vectors.to(getattr(torch, dtype))

"""The products of `sparse.py` on a GPU, as Triton kernels; imported only for tensors that are there.

Legend: R rows, D d_in, F latents, N entries (pairs of row and latent), M rows of a table.

All take tables in float32, bfloat16 or float16, accumulate in float32 and return float32; nothing here
differentiates, waits for the GPU or adds atomically. Block sizes are fixed rather than autotuned, since
they set the order of every sum: the same inputs give the same bits every time. Programs over one slice of
D run side by side, so that the slice of the table that they share stays in the L2 cache.

There is no kernel for the two-stage top-k. Its first stage reads each pre-activation once, contiguously,
and writes a sixteenth as much: `amax` over the middle axis is at the memory's speed already, and only a
selection inside the encoder's product could avoid that read. The rest works on small remainders.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 256  # entries; rows with more are summed in parts by several programs
SUM_BLOCK = 32, 128  # entries and columns that a program gathers at a time: 16-byte loads, several in flight
DOT_BLOCK = 16, 256  # wider: each slice of D costs a column of partial products
FUSED = {"enable_fp_fusion": True}  # multiply-adds round once; said aloud because Triton's default is to change


# `no_type_check` keeps the tests' shape checker away from what Triton compiles from source.


@triton.jit
@no_type_check
def _row_of(offsets, entry, n_rows):
    """The row that an entry is in: the last one that begins at or before it."""
    low = entry * 0
    high = low + n_rows
    while high - low > 1:
        middle = (low + high) // 2
        begun = tl.load(offsets + middle) <= entry
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle)
    return low


@triton.jit
@no_type_check
def _span(first, last, index, weights, table, d, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Σ of weights[n] table[index[n], d] over first ≤ n < last."""
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        real = n < last
        mask = real[:, None] & (d < D)[None, :]
        place = tl.load(index + n, mask=real, other=0).to(tl.int64)[:, None] * D + d[None, :]
        weight = tl.load(weights + n, mask=real, other=0.0).to(tl.float32)
        total += weight[:, None] * tl.load(table + place, mask=mask, other=0.0).to(tl.float32)
    return tl.sum(total, 0)


@triton.jit
@no_type_check
def _parts(
    offsets, index, weights, table, scratch, n_entries, n_rows, D,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums of the long rows' entries within each chunk of CHUNK entries, into scratch[2 chunk + slot].

    At most two rows longer than a chunk meet one: that of its first entry (slot 0) and, where another,
    that of its last (slot 1).
    """
    chunk, slot = tl.program_id(0), tl.program_id(1)
    start = chunk * CHUNK
    end = tl.minimum(start + CHUNK, n_entries)
    row = _row_of(offsets, tl.where(slot == 0, start, end - 1), n_rows)
    first = tl.load(offsets + row)
    last = tl.load(offsets + row + 1)
    if (last - first > CHUNK) & ((slot == 0) | (first > start)):
        first, last = tl.maximum(first, start), tl.minimum(last, end)
        out = scratch + (2 * chunk + slot).to(tl.int64) * D
        for column in range(0, D, BLOCK_D):
            d = column + tl.arange(0, BLOCK_D)
            total = _span(first, last, index, weights, table, d, D, BLOCK_N, BLOCK_D)
            tl.store(out + d, total, mask=d < D)


@triton.jit
@no_type_check
def _sum_parts(scratch, first, last, d, D, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sum of a long row's parts. It begins within its first chunk (slot 1 there) or with it (slot 0)."""
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    end = (last - 1) // CHUNK + 1
    for start in range(first // CHUNK, end, BLOCK_N):
        chunk = start + tl.arange(0, BLOCK_N)
        part = 2 * chunk + (chunk * CHUNK < first).to(tl.int32)
        mask = (chunk < end)[:, None] & (d < D)[None, :]
        total += tl.load(scratch + part.to(tl.int64)[:, None] * D + d[None, :], mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit
@no_type_check
def _rows(
    offsets, index, weights, table, scratch, out, D,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A slice of out[row]: from the entries, or from the parts where there are more than CHUNK."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(offsets + row)
    last = tl.load(offsets + row + 1)
    if last - first <= CHUNK:
        total = _span(first, last, index, weights, table, d, D, BLOCK_N, BLOCK_D)
    else:
        total = _sum_parts(scratch, first, last, d, D, CHUNK, BLOCK_N, BLOCK_D)
    tl.store(out + row * D + d, total, mask=d < D)


@triton.jit
@no_type_check
def _dots(offsets, index, left, table, out, n_entries, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """out[slice, n]: left[row of n] · table[index[n]] over one slice of D."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    d = part * BLOCK_D + tl.arange(0, BLOCK_D)
    left_d = tl.load(left + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    last = tl.load(offsets + row + 1)
    for start in range(tl.load(offsets + row), last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        real = n < last
        place = tl.load(index + n, mask=real, other=0).to(tl.int64)[:, None] * D + d[None, :]
        values = tl.load(table + place, mask=real[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        tl.store(out + part.to(tl.int64) * n_entries + n, tl.sum(values * left_d[None, :], 1), mask=real)


def gather_sum(
    offsets: Int[Tensor, " R1"],
    index: Int[Tensor, " N"],
    weights: Float[Tensor, " N"],
    table_MD: Float[Tensor, "M D"],
) -> Float[Tensor, "R D"]:
    """Row r: Σ of `weights[n] table[index[n]]` over n from `offsets[r]` to `offsets[r + 1]`, in float32.

    Rows of any lengths keep the GPU busy: those of more than CHUNK entries are summed in parts, through
    a scratch buffer of 2 ceil(N / CHUNK) rows.
    """
    n_rows, n_entries, d_in = len(offsets) - 1, len(index), table_MD.shape[1]
    if n_entries == 0:
        return torch.zeros(n_rows, d_in, device=index.device, dtype=torch.float32)
    chunks = -(-n_entries // CHUNK)
    out = torch.empty(n_rows, d_in, device=index.device, dtype=torch.float32)
    scratch = torch.empty(2 * chunks, d_in, device=index.device, dtype=torch.float32)
    operands = offsets, index, weights.contiguous(), table_MD.contiguous(), scratch
    block_n, block_d = SUM_BLOCK[0], _columns(d_in, SUM_BLOCK[1])
    fixed = {"CHUNK": CHUNK, "BLOCK_N": block_n, "BLOCK_D": block_d, **FUSED}
    with torch.cuda.device_of(out):
        _parts[(chunks, 2)](*operands, n_entries, n_rows, d_in, **fixed)
        _rows[(n_rows, -(-d_in // block_d))](*operands, out, d_in, **fixed)
    return out


def gather_dot(
    offsets: Int[Tensor, " R1"],
    index: Int[Tensor, " N"],
    left_RD: Float[Tensor, "R D"],
    table_MD: Float[Tensor, "M D"],
) -> Float[Tensor, " N"]:
    """Entry n of row r: `left[r] · table[index[n]]`, in float32; 0 for entries behind those of the last row.

    A program takes one row, so this is for rows of similar lengths, such as a batch's. It holds
    ceil(D / 256) partial products of each entry.
    """
    n_rows, n_entries, d_in = len(left_RD), len(index), left_RD.shape[1]
    block_n, block_d = DOT_BLOCK[0], _columns(d_in, DOT_BLOCK[1])
    slices = -(-d_in // block_d)
    out = torch.zeros(slices, n_entries, device=left_RD.device, dtype=torch.float32)
    if n_entries > 0:
        with torch.cuda.device_of(out):
            _dots[(n_rows, slices)](
                offsets, index, left_RD.contiguous(), table_MD.contiguous(), out, n_entries, d_in,
                BLOCK_N=block_n, BLOCK_D=block_d, **FUSED,
            )  # fmt: skip
    return out.sum(0)


def _columns(d_in: int, most: int) -> int:
    """Columns of a block: a power of two, as Triton asks, no wider than the table needs."""
    return min(most, max(16, 1 << (d_in - 1).bit_length()))

"""Sparse codes: which latents are active on which rows, and the products that need no others.

The gradient of every architecture vanishes where a latent is silent, so after the encoder's product
an exact training step needs only these. Legend: R rows, D d_in, F latents, N entries (active pairs of
row and latent, in order of rows), M rows of a table.

On a CPU the products are PyTorch's embedding bag and MKL's sampled product; on a GPU they are the
Triton kernels of `triton_kernels.py`, which nothing imports without one.
"""

import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

BLOCK_VALUES = (
    2**25
)  # pre-activations in memory at once while selecting on a CPU (128 MiB); smaller blocks multiply slower
_GROUP = 16  # latents in a group of the two-stage top-k


class DenseCode:
    """All pairs; `values` are `[R, F]`. What is elementwise in the maths is written once for both kinds of code."""

    def at(self, values_F: Float[Tensor, " F"]) -> Float[Tensor, " F"]:
        """The value of each entry's latent."""
        return values_F

    def sum_latents(self, values: Tensor) -> Float[Tensor, " F"]:
        """Sum over rows, for each latent."""
        return values.sum(0)

    def decode(self, values: Tensor, table_FD: Float[Tensor, "F D"]) -> Float[Tensor, "R D"]:
        """Σ_f values[r, f] table[f]."""
        return values @ table_FD

    def products(self, left_RD: Float[Tensor, "R D"], table_FD: Float[Tensor, "F D"]) -> Tensor:
        """left[r] · table[f] at each entry."""
        return left_RD @ table_FD.T

    def accumulate(self, values: Tensor, rows_RD: Float[Tensor, "R D"]) -> Float[Tensor, "F D"]:
        """Σ_r values[r, f] rows[r]."""
        return values.T @ rows_RD


@dataclass(frozen=True, eq=False)
class SparseCode:
    """N pairs, sorted by row; `values` are `[N]`. Row r has entries `offsets[r]` to `offsets[r + 1]`."""

    offsets: Int[Tensor, " R1"]
    latents: Int[Tensor, " N"]
    d_sae: int

    @property
    def n_rows(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def rows(self) -> Int[Tensor, " N"]:
        counts = self.offsets.diff()
        index = torch.arange(self.n_rows, dtype=torch.int32, device=counts.device)
        return index.repeat_interleave(counts, output_size=len(self.latents))

    @cached_property
    def by_latent(self) -> tuple[Int[Tensor, " F1"], Int[Tensor, " N"], Int[Tensor, " N"]]:
        """The inverted index: (offsets of each latent, rows sorted by latent, order that sorts the entries)."""
        latents, order = self.latents.sort(stable=True)
        bounds = torch.arange(self.d_sae + 1, dtype=latents.dtype, device=latents.device)
        return torch.searchsorted(latents, bounds, out_int32=True), self.rows[order], order

    def split(self, starts: list[int]) -> "SparseCode":
        """The same entries with each row cut at the latents `starts` (the first is 0): R·len(starts) rows."""
        segment = torch.bucketize(
            self.latents, torch.tensor(starts[1:], device=self.latents.device, dtype=self.latents.dtype), right=True
        )
        counts = torch.bincount(self.rows * len(starts) + segment, minlength=self.n_rows * len(starts))
        return SparseCode(_offsets(counts), self.latents, self.d_sae)

    def at(self, values_F: Tensor) -> Tensor:
        return values_F[self.latents]

    def sum_latents(self, values: Tensor) -> Tensor:
        if values.is_cuda:  # by the inverted index: the same sum every time
            bounds, _, order = self.by_latent
            return gather_sum(bounds, order.int(), torch.ones_like(values), values[:, None])[:, 0]
        return values.new_zeros(self.d_sae).index_add_(0, self.latents, values)

    def decode(self, values: Tensor, table_FD: Tensor) -> Tensor:
        return gather_sum(self.offsets, self.latents, values, table_FD)

    def products(self, left_RD: Tensor, table_FD: Tensor) -> Tensor:
        return gather_dot(self.offsets, self.latents, left_RD, table_FD)

    def accumulate(self, values: Tensor, rows_RD: Tensor) -> Tensor:
        bounds, rows, order = self.by_latent
        return gather_sum(bounds, rows, values[order], rows_RD)


def select(code: SparseCode, values: Float[Tensor, " N"], chosen: Tensor) -> tuple[SparseCode, Float[Tensor, " M"]]:
    """The entries that `chosen` names, by ascending places or by a mask."""
    counts = torch.bincount(code.rows[chosen], minlength=code.n_rows)
    return SparseCode(_offsets(counts), code.latents[chosen], code.d_sae), values[chosen]


Code = DenseCode | SparseCode

# ---------------------------------------------------------------------------------------- kernels


def gather_sum(
    offsets: Int[Tensor, " R1"],
    index: Int[Tensor, " N"],
    weights: Float[Tensor, " N"],
    table_MD: Float[Tensor, "M D"],
) -> Float[Tensor, "R D"]:
    """Row r: Σ of `weights[n] table[index[n]]` over n from `offsets[r]` to `offsets[r + 1]`; 0 where that is empty."""
    if table_MD.is_cuda:
        from saebench.sae import triton_kernels

        return triton_kernels.gather_sum(offsets, index, weights, table_MD)
    if len(index) == 0:
        return table_MD.new_zeros(len(offsets) - 1, table_MD.shape[1])
    return embedding_bag(
        index, table_MD, offsets, mode="sum", per_sample_weights=weights.to(table_MD.dtype), include_last_offset=True
    )


def gather_dot(
    offsets: Int[Tensor, " R1"],
    index: Int[Tensor, " N"],
    left_RD: Float[Tensor, "R D"],
    table_MD: Float[Tensor, "M D"],
) -> Float[Tensor, " N"]:
    """Entry n of row r: `left[r] · table[index[n]]`."""
    if table_MD.is_cuda:
        from saebench.sae import triton_kernels

        return triton_kernels.gather_dot(offsets, index, left_RD, table_MD)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        pattern = torch.sparse_csr_tensor(
            offsets, index, left_RD.new_zeros(len(index)), size=(len(left_RD), len(table_MD)), check_invariants=False
        )
    return torch.sparse.sampled_addmm(pattern, left_RD, table_MD.T, beta=0.0).values()


# -------------------------------------------------------------------------------------- selection


def rowwise_topk(pre_RF: Float[Tensor, "R F"], k: int) -> tuple[Float[Tensor, "R K"], Int[Tensor, "R K"]]:
    """The k largest of each row, in no order, in two stages where that pays.

    The k groups with the largest maxima hold the k largest values, so the second stage looks at those
    groups alone. (Of equal values any may be chosen, as in `torch.topk`.)
    """
    n_groups, rest = divmod(pre_RF.shape[1], _GROUP)
    if rest or n_groups < 2 * k:
        values, latents = pre_RF.topk(k, dim=1, sorted=False)
        return values, latents
    grouped = pre_RF.view(-1, _GROUP, n_groups)  # group g is the latents g, g + n_groups, …
    groups_RK = grouped.amax(1).topk(k, dim=1, sorted=False).indices
    candidates = grouped.gather(2, groups_RK[:, None].expand(-1, _GROUP, -1)).flatten(1)
    values, place = candidates.topk(k, dim=1, sorted=False)
    return values, place // k * n_groups + groups_RK.gather(1, place % k)


class Encoder:
    """Pre-activations z W_enc + bias, in blocks of rows that are forgotten once selected from."""

    def __init__(
        self,
        z_RD: Float[Tensor, "R D"],
        W_enc_DF: Float[Tensor, "D F"],
        bias_F: Float[Tensor, " F"],
        bf16: bool = False,
    ) -> None:
        self.z_RD, self.W_enc_DF, self.bias_F, self.bf16 = z_RD, W_enc_DF, bias_F, bf16
        if bf16:
            self.z_RD, self.W_enc_DF = z_RD.bfloat16(), W_enc_DF.bfloat16()
            if not z_RD.is_cuda:  # the same rounding, and products that every processor has
                self.z_RD, self.W_enc_DF = self.z_RD.float(), self.W_enc_DF.float()

    def blocks(self) -> list[tuple[int, int]]:
        """First and last row (exclusive) of each block, at least one; on a GPU there is no more."""
        n_rows, d_sae = len(self.z_RD), len(self.bias_F)
        step = max(1, n_rows if self.z_RD.is_cuda else BLOCK_VALUES // d_sae)
        return [(start, min(start + step, n_rows)) for start in range(0, max(n_rows, 1), step)]

    def dense(self) -> Float[Tensor, "R F"]:
        return self._product(self.z_RD, None)

    def topk(self, k: int) -> tuple[SparseCode, Float[Tensor, " N"]]:
        """The k largest of each row: (code, pre-activations of its entries)."""
        parts = [rowwise_topk(block, k) for block in self._each()]
        values, latents = (torch.cat(part).flatten() for part in zip(*parts, strict=True))
        offsets = torch.arange(len(self.z_RD) + 1, dtype=torch.int32, device=values.device) * k
        return SparseCode(offsets, latents.int(), len(self.bias_F)), values

    def above(self, threshold: float | Float[Tensor, " F"] = 0.0) -> tuple[SparseCode, Float[Tensor, " N"]]:
        """All that is above a threshold, or above that of its latent: (code, pre-activations of its entries)."""
        d_sae = len(self.bias_F)
        counts, latents, values = [], [], []
        for block in self._each():
            flat = _nonzero(block > threshold)
            values.append(block.view(-1)[flat])
            counts.append(torch.bincount(flat // d_sae, minlength=len(block)))
            latents.append((flat % d_sae).int())
        return SparseCode(_offsets(torch.cat(counts)), torch.cat(latents), d_sae), torch.cat(values)

    def batch_topk(self, k: int, guess: float = 0.0) -> tuple[SparseCode, Float[Tensor, " N"]]:
        """The k·R largest positive pre-activations of all rows together (fewer where fewer are positive).

        `guess`, a value that the least of them may reach, only makes it faster: where it turns out to
        be too high, the search begins again from 0.
        """
        wanted = k * len(self.z_RD)
        code, values = self.above(guess)
        if len(values) < wanted and guess > 0:
            code, values = self.above(0.0)
        if len(values) <= wanted:
            return code, values
        return select(code, values, values.topk(wanted, sorted=False).indices.sort().values)

    def _each(self) -> Iterator[Float[Tensor, "R F"]]:
        spans = self.blocks()
        buffer = _scratch(spans[0][1], len(self.bias_F), self.bias_F.dtype, self.bias_F.device)
        for start, end in spans:
            yield self._product(self.z_RD[start:end], buffer[: end - start])

    def _product(self, z_RD: Tensor, out: Tensor | None) -> Tensor:
        if z_RD.dtype == torch.bfloat16:
            return torch.mm(z_RD, self.W_enc_DF, out_dtype=torch.float32).add_(self.bias_F)
        return torch.addmm(self.bias_F, z_RD, self.W_enc_DF, out=out)


_kept = threading.local()


def _scratch(n_rows: int, d_sae: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for one block, kept by each thread from step to step: fresh pages would cost a tenth of the product."""
    wanted = (n_rows, d_sae, dtype, device)
    if getattr(_kept, "wanted", None) != wanted:
        _kept.wanted, _kept.buffer = wanted, torch.empty(n_rows, d_sae, dtype=dtype, device=device)
    return _kept.buffer


def _nonzero(mask: Tensor) -> Int[Tensor, " N"]:
    """Flat places of the true entries, ascending. NumPy's search is thrice as fast as PyTorch's on a CPU."""
    return mask.view(-1).nonzero()[:, 0] if mask.is_cuda else torch.from_numpy(np.flatnonzero(mask.numpy()))


def _offsets(counts: Tensor) -> Int[Tensor, " R1"]:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()

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
from torch.nn.functional import embedding_bag, pad

# Pre-activations in memory at once while selecting: 128 MiB on a CPU, where smaller blocks multiply slower; 1 GiB on a GPU,
# which searches no more than 2^31 of them at a time.
BLOCK_VALUES = {"cpu": 2**25, "cuda": 2**28}
_GROUP = {"cpu": 8, "cuda": 16}  # latents in a group of the two-stage top-k
_NUMPY_FASTER = 2  # threads of PyTorch's search, one a row at most, up to which NumPy's one is faster
_SAMPLED = 64  # rows that say where BatchTopK's selection may begin
_INERT = -1.0  # pre-activation of an entry that is none


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
    padded: bool = False
    """after the last row's entries come more, of latent 0 and of no row, so that N is known without asking a GPU"""

    @property
    def n_rows(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def rows(self) -> Int[Tensor, " N"]:
        if self.padded:
            entries = torch.arange(len(self.latents), dtype=self.offsets.dtype, device=self.offsets.device)
            found = torch.searchsorted(self.offsets[1:], entries, right=True, out_int32=True)
            return found.clamp_(max=self.n_rows - 1)
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
        """The same entries, of ascending latents within a row, with each row cut at `starts` (the first is 0): R·len(starts) rows."""
        place = self.rows * len(starts)
        for start in starts[1:]:
            place += self.latents >= start
        return SparseCode(_offsets(place, self.n_rows * len(starts)), self.latents, self.d_sae)

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
    return SparseCode(_offsets(code.rows[chosen], code.n_rows), code.latents[chosen], code.d_sae), values[chosen]


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
    """Entry n of row r: `left[r] · table[index[n]]`; 0 for entries behind those of the last row."""
    if table_MD.is_cuda:
        from saebench.sae import triton_kernels

        return triton_kernels.gather_dot(offsets, index, left_RD, table_MD)
    n_real = int(offsets[-1])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        pattern = torch.sparse_csr_tensor(
            offsets,
            index[:n_real],
            left_RD.new_zeros(n_real),
            size=(len(left_RD), len(table_MD)),
            check_invariants=False,
        )
    products = torch.sparse.sampled_addmm(pattern, left_RD, table_MD.T, beta=0.0).values()
    return products if n_real == len(index) else pad(products, (0, len(index) - n_real))


# -------------------------------------------------------------------------------------- selection


def rowwise_topk(pre_RF: Float[Tensor, "R F"], k: int) -> tuple[Float[Tensor, "R K"], Int[Tensor, "R K"]]:
    """The k largest of each row, in no order, in two stages where that pays.

    The k groups with the largest maxima hold the k largest values, so the second stage looks at those
    groups alone. (Of equal values any may be chosen, as in `torch.topk`.)
    """
    size = _GROUP.get(pre_RF.device.type, _GROUP["cpu"])
    n_groups, rest = divmod(pre_RF.shape[1], size)
    if rest or n_groups < 2 * k:
        latents = places_of_largest(pre_RF, k)
        return pre_RF.gather(1, latents), latents
    grouped = pre_RF.view(-1, size, n_groups)  # group g is the latents g, g + n_groups, …
    groups_RK = places_of_largest(grouped.amax(1), k)
    candidates = grouped.gather(2, groups_RK[:, None].expand(-1, size, -1)).flatten(1)
    place = places_of_largest(candidates, k)
    return candidates.gather(1, place), place // k * n_groups + groups_RK.gather(1, place % k)


def places_of_largest(values_RN: Float[Tensor, "R N"], k: int, ascending: bool = False) -> Int[Tensor, "R K"]:
    """Where the k largest of each row are, in no order unless they are to be ascending; of equal values any may be chosen.

    NumPy's partition of a row takes a quarter of the time of PyTorch's search, and says the least of the k largest. Where a row has
    others like it, or nan (the largest of all to both), PyTorch searches after all; and in bfloat16, which NumPy lacks.
    """
    n_rows, n = values_RN.shape
    few_threads = min(torch.get_num_threads(), n_rows) <= _NUMPY_FASTER
    if not values_RN.is_cuda and 0 < k < n and few_threads and values_RN.dtype != torch.bfloat16:
        values = values_RN.detach().numpy()
        parted = np.partition(values, n - k, axis=1)
        flat = np.flatnonzero(values >= parted[:, n - k, None])
        if len(flat) == n_rows * k and not np.isnan(parted[:, n - k :]).any():
            places = torch.from_numpy(flat.reshape(n_rows, k) - np.arange(0, values.size, n)[:, None])
            if bool(((places >= 0) & (places < n)).all()):
                return places
    places = values_RN.topk(k, dim=1, sorted=False).indices
    return places.sort(1).values if ascending else places


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
        """First and last row (exclusive) of each block, at least one."""
        n_rows = len(self.z_RD)
        step = rows_of_a_block(len(self.bias_F), self.z_RD.device)
        return [(start, min(start + step, n_rows)) for start in range(0, max(n_rows, 1), step)]

    def dense(self) -> Float[Tensor, "R F"]:
        return self._product(self.z_RD, None)

    def topk(self, k: int) -> tuple[SparseCode, Float[Tensor, " N"]]:
        """The k largest of each row: (code, pre-activations of its entries)."""
        parts = [rowwise_topk(block, k) for block in self._each()]
        values, latents = (torch.cat(part).flatten() for part in zip(*parts, strict=True))
        offsets = torch.arange(len(self.z_RD) + 1, dtype=torch.int32, device=values.device) * k
        return SparseCode(offsets, latents.int(), len(self.bias_F)), values

    def above(
        self, threshold: float | Float[Tensor, " F"] = 0.0, most: int | None = None
    ) -> tuple[SparseCode, Float[Tensor, " N"]]:
        """All that is above a threshold, or above that of its latent: (code, pre-activations of its entries).

        With `most`, N is that whatever is found, and a GPU need not be waited for: there are inert entries behind those found,
        or only the first are found, where `offsets[-1]` is `most`. Rows must then be those of one block.
        """
        d_sae = len(self.bias_F)
        assert most is None or len(self.blocks()) == 1
        rows, latents, values = [], [], []
        for (start, _), block in zip(self.blocks(), self._each(), strict=True):
            n_values = block.numel()
            if most is None:
                flat = _nonzero(block > threshold)
                values.append(block.view(-1)[flat])
            else:
                flat = torch.nonzero_static((block > threshold).view(-1), size=most, fill_value=n_values)[:, 0]
                values.append(torch.where(flat < n_values, block.view(-1)[flat.clamp(max=n_values - 1)], _INERT))
            rows.append((flat // d_sae).int() + start)
            latents.append((flat % d_sae).int())
        offsets = _offsets(torch.cat(rows), len(self.z_RD))
        return SparseCode(offsets, torch.cat(latents), d_sae, padded=most is not None), torch.cat(values)

    def batch_topk(self, k: int, guess: float = 0.0) -> tuple[SparseCode, Float[Tensor, " N"]]:
        """The k·R largest positive pre-activations of all rows together (fewer where fewer are positive, or some that are not).

        `guess`, a value that the least of them may reach, only makes it faster: where it turns out to
        be too high, or there is none, the search begins from what a sample of the rows says.
        """
        wanted, per_row = k * len(self.z_RD), 2 * k
        if self.z_RD.is_cuda:
            return self._largest(wanted)
        while True:
            floor = guess if guess > 0 else self._reached_by(per_row)
            code, values = self.above(floor)
            if len(values) >= wanted or floor == 0.0:
                break
            guess, per_row = 0.0, 4 * per_row
        if len(values) <= wanted:
            return code, values
        return select(code, values, places_of_largest(values[None], wanted, ascending=True)[0])

    def _largest(self, wanted: int) -> tuple[SparseCode, Float[Tensor, " N"]]:
        """The largest pre-activations of all rows together, without waiting for a GPU."""
        d_sae, values, places = len(self.bias_F), [], []
        for (start, _), block in zip(self.blocks(), self._each(), strict=True):
            found = rowwise_topk(block.view(1, -1), min(wanted, block.numel()))
            values.append(found[0][0])
            places.append(found[1][0] + start * d_sae)
        largest, among = torch.cat(values).topk(min(wanted, sum(map(len, values))), sorted=False)
        flat, order = torch.cat(places)[among].sort()
        offsets = _offsets((flat // d_sae).int(), len(self.z_RD))
        return SparseCode(offsets, (flat % d_sae).int(), d_sae), largest[order]

    def _reached_by(self, per_row: int) -> float:
        """What about so many pre-activations of a row reach, by a sample of the rows; at least 0, and 0 for all of a row's."""
        if per_row >= len(self.bias_F):
            return 0.0
        some_RD = self.z_RD[:: max(len(self.z_RD) // _SAMPLED, 1)]
        largest = self._product(some_RD, None).flatten().topk(per_row * len(some_RD), sorted=False).values
        return max(float(largest.min()), 0.0)

    def _each(self) -> Iterator[Float[Tensor, "R F"]]:
        spans = self.blocks()
        own = self.z_RD.dtype == torch.bfloat16  # a product that has its own memory
        buffer = None if own else _scratch(spans[0][1], len(self.bias_F), self.bias_F.dtype, self.bias_F.device)
        for start, end in spans:
            yield self._product(self.z_RD[start:end], None if buffer is None else buffer[: end - start])

    def _product(self, z_RD: Tensor, out: Tensor | None) -> Tensor:
        if z_RD.dtype == torch.bfloat16 and z_RD.is_cuda:
            return torch.mm(z_RD, self.W_enc_DF, out_dtype=torch.float32).add_(self.bias_F)
        return torch.addmm(self.bias_F, z_RD, self.W_enc_DF, out=out)


def rows_of_a_block(d_sae: int, device: torch.device, share: float = 1.0) -> int:
    """How many rows' pre-activations are in memory at once, or of a share of that memory; at least one."""
    return max(1, int(share * BLOCK_VALUES.get(device.type, BLOCK_VALUES["cpu"])) // d_sae)


_kept = threading.local()


def _scratch(n_rows: int, d_sae: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for one block, kept by each thread from step to step: fresh pages would cost a tenth of the product."""
    wanted = (n_rows, d_sae, dtype, device)
    if getattr(_kept, "wanted", None) != wanted:
        with torch.inference_mode(False):  # for whoever comes next, too
            _kept.wanted, _kept.buffer = wanted, torch.empty(n_rows, d_sae, dtype=dtype, device=device)
    return _kept.buffer


def forget_scratch() -> None:
    """Give back what this thread keeps for the next step."""
    vars(_kept).clear()


def _nonzero(mask: Tensor) -> Int[Tensor, " N"]:
    """Flat places of the true entries, ascending. NumPy's search is thrice as fast as PyTorch's on a CPU."""
    return mask.view(-1).nonzero()[:, 0] if mask.is_cuda else torch.from_numpy(np.flatnonzero(mask.numpy()))


def _offsets(rows_N: Int[Tensor, " N"], n_rows: int) -> Int[Tensor, " R1"]:
    """Where each row's entries begin, from the ascending rows of all."""
    bounds = torch.arange(n_rows + 1, dtype=rows_N.dtype, device=rows_N.device)
    return torch.searchsorted(rows_N, bounds, out_int32=True)

"""What a row's active latents would best add up to: least squares over their decoder rows.

The encoder says which latents fire, and how strongly, in one product; its coefficients are not those with the least error. R rows, N
entries; B rows of a block, K entries of the fullest of them, E what is written.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saebench.sae.sparse import SparseCode

_VALUES = {"cpu": 2**21, "cuda": 2**27}  # numbers of a block's decoder rows and of their products, held at once
_RIDGE = 1e-5  # of the sum of squares of a row's decoder rows: more than rounding makes of a singular system
_ROUNDS = 10  # in which all entries move at once that should
_ROUNDING = 8  # units in the last place of the steepest slope at the start


@torch.no_grad()
def refit(
    code: SparseCode, values: Float[Tensor, " N"], target_RE: Float[Tensor, "R E"], W_dec: Float[Tensor, "F E"]
) -> Float[Tensor, " N"]:
    """Coefficients c ≥ 0 of the entries with which ‖target − Σ_j c_j d_j‖² is least, d_j the decoder row of an entry's latent.

    Where decoder rows depend on each other (twins, or more latents than E), c is the nearest to `values`, the encoder's activations: what is
    least is the square plus 10⁻⁵ of Σ‖d_j‖² times ‖c − values‖². The square is therefore never above that of `values`, but for rounding.
    """
    held, counts_R = _VALUES.get(values.device.type, _VALUES["cpu"]), code.offsets.diff()
    order_R = counts_R.argsort(descending=True)  # rows of a block have about as many entries
    found = torch.zeros_like(values)
    start, fullest = 0, counts_R[order_R].tolist()
    while start < len(fullest) and (k := fullest[start]):
        rows_B = order_R[start : start + max(1, held // (k * (k + target_RE.shape[1])))]
        start += len(rows_B)
        column_K = torch.arange(k, device=values.device)
        real_BK = column_K < counts_R[rows_B, None]
        entries_BK = torch.where(real_BK, code.offsets[rows_B, None] + column_K, 0)
        d_BKE = W_dec[code.latents[entries_BK]] * real_BK[..., None]
        gram_BKK = d_BKE @ d_BKE.mT
        squares_BK = gram_BKK.diagonal(dim1=1, dim2=2)
        ridge_B1 = (_RIDGE * squares_BK.sum(1, keepdim=True)).clamp(min=1e-30)
        squares_BK += ridge_B1
        toward_BK = (d_BKE @ target_RE[rows_B, :, None])[..., 0] + ridge_B1 * values[entries_BK]
        found[entries_BK[real_BK]] = _nonnegative(gram_BKK, toward_BK, real_BK)[real_BK]
    return found


def _nonnegative(
    gram_BKK: Float[Tensor, "B K K"],
    toward_BK: Float[Tensor, "B K"],
    real_BK: Bool[Tensor, "B K"],
) -> Float[Tensor, "B K"]:
    """c ≥ 0 of least cᵀGc/2 − c·toward for each row's entries, the others 0, by block principal pivoting (Kim and Park 2011).

    Entries below 0 leave the system, those at 0 with which it would fall join it, until there are neither.
    """
    found_BK, within_BK = torch.zeros_like(toward_BK), real_BK.clone()
    todo, rounds = torch.arange(len(toward_BK), device=toward_BK.device), 0
    rounding = _ROUNDING * torch.finfo(toward_BK.dtype).eps
    while len(todo):
        gram, toward, within = gram_BKK[todo], toward_BK[todo], within_BK[todo]
        system = within[:, :, None] & within[:, None]
        system.diagonal(dim1=1, dim2=2).fill_(True)
        factors = torch.linalg.cholesky(gram * system)
        found = torch.cholesky_solve((toward * within)[..., None], factors)[..., 0]
        wrong = within & (found < 0)
        if rounds < 4 * len(found.T) + _ROUNDS:  # and where rounding makes a circle of them they leave alone
            slope = toward - (gram @ found[..., None])[..., 0]
            wrong |= real_BK[todo] & ~within & (slope > rounding * toward.abs().amax(1, keepdim=True))
        if rounds >= _ROUNDS:  # one at a time, the last, they come to an end (Murty 1974)
            wrong &= wrong.flip(1).cumsum(1).flip(1) == 1
        found_BK[todo], within_BK[todo] = found, within ^ wrong
        todo, rounds = todo[wrong.any(1)], rounds + 1
    return found_BK

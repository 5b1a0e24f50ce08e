"""A step of Muon for the encoder's matrix, whose gradients come from the latents that fire alone."""

import torch
from jaxtyping import Float
from torch import Tensor

from saebench.train.shares import Share

_NEWTON_SCHULZ, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5  # of Jordan et al. 2024
_MOMENTUM = 0.9
_PACE = 0.37  # root mean square of an entry's step over the learning rate; Adam's is below 1


def step_by_muon(
    weight_FD: torch.nn.Parameter, optimizer: torch.optim.Optimizer, share: Share, lr: float, shrink: float
) -> None:
    """Momentum (Nesterov's), and along it the matrix whose singular values are near 1 (Jordan et al. 2024, "Muon"), sized to Adam's steps by
    √F (Liu et al. 2025, arXiv 2502.16982, section 2.2); weights shrink by `shrink`·lr.

    What gradients are divided by (`grad_scale`) and whether the step is left out (`found_inf`) are the optimizer's, and so is the state,
    `exp_avg` `[F, D]`. Of a share of latents the matrix is that of all.
    """
    gradient_FD, state = weight_FD.grad, optimizer.state[weight_FD]
    assert gradient_FD is not None
    if not state:
        state["exp_avg"] = torch.zeros_like(weight_FD)
    taken = 1.0 - optimizer.found_inf.to(weight_FD.dtype)  # type: ignore[attr-defined]
    gradient_FD = torch.where(taken > 0, gradient_FD / optimizer.grad_scale, 0.0)  # type: ignore[attr-defined]
    state["exp_avg"].lerp_(gradient_FD, (1.0 - _MOMENTUM) * taken)
    ahead_FD = gradient_FD.lerp(state["exp_avg"], _MOMENTUM)
    rate = lr * _PACE * share.n_latents(len(weight_FD)) ** 0.5
    weight_FD.data.mul_(1.0 - lr * shrink * taken)
    weight_FD.data.addmm_(ahead_FD, orthogonaliser(share.gram(ahead_FD)) * taken, alpha=-rate)


def orthogonaliser(gram_DD: Float[Tensor, "D D"]) -> Float[Tensor, "D D"]:
    """Q with which M·Q has singular values near 1 (0.7 to 1.2, but for those of M that are next to nothing), by MᵀM alone.

    Newton-Schulz iterations X ← aX + bX·A + cX·A², A = XᵀX, from X = M over its Frobenius norm, are polynomials in A, of the small
    side: for F ≫ D it takes a third of the products.
    """
    a, b, c = _NEWTON_SCHULZ
    square = gram_DD.diagonal().sum().clamp(min=torch.finfo(gram_DD.dtype).tiny)
    gram_DD, eye_DD = gram_DD / square, torch.eye(len(gram_DD), dtype=gram_DD.dtype, device=gram_DD.device)
    found_DD = eye_DD * square.rsqrt()
    for left in reversed(range(_ITERATIONS)):
        factor_DD = a * eye_DD + b * gram_DD + c * gram_DD @ gram_DD
        found_DD = found_DD @ factor_DD
        if left:
            gram_DD = factor_DD @ gram_DD @ factor_DD
    return found_DD

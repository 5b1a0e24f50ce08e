"""A step of low-rank Muon for the encoder's matrix, whose gradients have most of their length along few directions of the stream."""

import torch
from jaxtyping import Float
from torch import Tensor

from saebench.train.shares import Share

_NEWTON_SCHULZ, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5  # of Jordan et al. 2024
_MOMENTUM = 0.9
RANK = 32
_PACE = 0.37  # root mean square of an entry's step over the learning rate; Adam's is below 1
_BLOCK = 2**19  # numbers of a block of latents on a CPU, whose cache then has it from one use to the next
_LEAST = 1e-6  # of the squared length, that the other directions are taken to have


def step_by_muon(
    weight_FD: torch.nn.Parameter, optimizer: torch.optim.Optimizer, share: Share, lr: float, shrink: float
) -> None:
    """Momentum M (Nesterov's), and along it a matrix whose singular values are near 1 (Jordan et al. 2024, "Muon"): each of the 32 largest,
    and the others, which differ less, in their root mean square. Sized to Adam's steps by √F (Liu et al. 2025, arXiv 2502.16982,
    section 2.2), whatever the gradient's length; weights shrink by `shrink`·lr.

    With the largest directions S `[D, 32]`, Y = M·S, c = √(D − 32) / √(‖M‖² − ‖Y‖²) and Q as `orthogonaliser` has it, the matrix is
    c·M + (Y·Q − c·Y)·Sᵀ. S follows M by one power iteration a step, S ← QR(MᵀY), as in Dion (Ahn et al. 2025, arXiv 2504.05295).

    Whether the step is left out (`found_inf`) is the optimizer's, and so is the state, `exp_avg` (M before Nesterov's step) `[F, D]` and
    `span` (S). Of a share of latents the matrix is that of all.
    """
    gradient_FD, state = weight_FD.grad, optimizer.state[weight_FD]
    assert gradient_FD is not None
    n_latents, d_in = gradient_FD.shape
    if not state:
        state["exp_avg"] = torch.zeros_like(weight_FD)
        state["span"] = _any_span(d_in).to(weight_FD)
    taken = 1.0 - optimizer.found_inf.to(weight_FD.dtype)  # type: ignore[attr-defined]
    if gradient_FD.is_cuda or not bool(taken):  # where to ask costs nothing
        gradient_FD.nan_to_num_(0.0, 0.0, 0.0)  # of a step that is left out
    span_DR, turned_DR = state["span"], torch.zeros_like(state["span"])
    along_FR, square = gradient_FD.new_empty(n_latents, span_DR.shape[1]), gradient_FD.new_zeros(())
    block = n_latents if gradient_FD.is_cuda else max(1, _BLOCK // d_in)

    parts = gradient_FD, state["exp_avg"], along_FR
    for ahead_FD, momentum_FD, y_FR in zip(*(part.split(block) for part in parts), strict=True):
        momentum_FD.lerp_(ahead_FD, (1.0 - _MOMENTUM) * taken)
        ahead_FD.lerp_(momentum_FD, _MOMENTUM)
        torch.mm(ahead_FD, span_DR, out=y_FR)
        square += ahead_FD.norm().square()
    gram_RR, square = share.over_latents(along_FR.T @ along_FR), share.over_latents(square)

    rest = torch.maximum(square - gram_RR.diagonal().sum(), _LEAST * square).clamp(min=torch.finfo(square.dtype).tiny)
    others = (len(span_DR) - len(gram_RR)) ** 0.5 * rest.rsqrt()
    more_FR = torch.where(taken > 0, along_FR @ orthogonaliser(gram_RR) - others * along_FR, 0.0)
    rate, others = lr * _PACE * share.n_latents(n_latents) ** 0.5, torch.where(taken > 0, others, 0.0)
    parts = weight_FD.data, gradient_FD, along_FR, more_FR
    for w_FD, ahead_FD, y_FR, m_FR in zip(*(part.split(block) for part in parts), strict=True):
        w_FD.mul_(1.0 - lr * shrink * taken)
        w_FD.addcmul_(ahead_FD, others, value=-rate)
        w_FD.addmm_(m_FR, span_DR.T, alpha=-rate)
        turned_DR.addmm_(ahead_FD.T, y_FR)
    turned_DR = torch.linalg.qr(share.over_latents(turned_DR)).Q.contiguous()  # as it is read from a checkpoint
    state["span"] = torch.where(taken > 0, turned_DR, span_DR)


def _any_span(d_in: int) -> Float[Tensor, "D R"]:
    """Where the power iteration begins: 32 directions, a quarter of all in a narrow stream."""
    rank = min(RANK, max(1, d_in // 4))
    return torch.linalg.qr(torch.randn(d_in, rank, generator=torch.Generator().manual_seed(0))).Q.contiguous()


def orthogonaliser(gram_RR: Float[Tensor, "R R"]) -> Float[Tensor, "R R"]:
    """Q with which Y·Q has singular values near 1 (0.7 to 1.2, but for those of Y that are next to nothing), by YᵀY alone.

    Newton-Schulz iterations X ← aX + bX·A + cX·A², A = XᵀX, from X = Y over its Frobenius norm, are polynomials in A.
    """
    a, b, c = _NEWTON_SCHULZ
    square = gram_RR.diagonal().sum().clamp(min=torch.finfo(gram_RR.dtype).tiny)
    gram_RR, eye_RR = gram_RR / square, torch.eye(len(gram_RR), dtype=gram_RR.dtype, device=gram_RR.device)
    found_RR = eye_RR * square.rsqrt()
    for left in reversed(range(_ITERATIONS)):
        factor_RR = a * eye_RR + b * gram_RR + c * gram_RR @ gram_RR
        found_RR = found_RR @ factor_RR
        if left:
            gram_RR = factor_RR @ gram_RR @ factor_RR
    return found_RR

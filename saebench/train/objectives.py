"""What each architecture is trained to do, on inputs scaled to E‖x‖² = D: dense, by autograd, to be read.

Training itself takes the same gradients from `gradients.py`, and the tests hold the two together.
Each objective is a function of the SAE, what it reads (x), a `Context` that carries the rest, and what it is to write (y),
which is scaled to E‖y‖² = E; of an SAE that is x.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saebench.sae import SAE, GatedSAE, JumpReLUSAE, ReLUSAE, topk_relu

AUX_WEIGHT = 1 / 32  # Gao et al. 2024, section 2.4
PREFIX_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)  # of the latents, for Matryoshka's nested SAEs


class Context(NamedTuple):
    """λ (sparsity coefficient), the latents that count as dead (their numbers), and k where the architecture has one."""

    coefficient: Float[Tensor, ""]
    dead: Int[Tensor, " n_dead"]
    k: int | None = None


class Loss(NamedTuple):
    """Scalars. `total` is minimised; `reconstruction` is mean ‖y−x̂‖², `sparsity` the penalty before λ."""

    total: Float[Tensor, ""]
    reconstruction: Float[Tensor, ""]
    sparsity: Float[Tensor, ""]
    auxiliary: Float[Tensor, ""]


Objective = Callable[[Any, Float[Tensor, "B D"], Context, Float[Tensor, "B E"]], Loss]


def relu_objective(sae: ReLUSAE, x_BD: Tensor, context: Context, y_BE: Tensor) -> Loss:
    """mean‖y−x̂‖² + λ mean Σ_j f_j ‖d_j‖ (Anthropic, "Circuits Updates" April 2024); of several hooks the sum of their ‖d_j‖
    (Lindsey et al. 2024, "Sparse Crosscoders")."""
    out = sae(x_BD)
    reconstruction = _mean_squared_error(y_BE, out.x_hat)
    sparsity = (out.acts.sum(0) @ sae.lengths_FH.sum(1)) / len(x_BD)
    return Loss(reconstruction + context.coefficient * sparsity, reconstruction, sparsity, torch.zeros_like(sparsity))


def topk_objective(sae: ReLUSAE, x_BD: Tensor, context: Context, y_BE: Tensor) -> Loss:
    """mean‖y−x̂‖²/Var + α AuxK/Var, α = 1/32 (Gao et al. 2024, sections 2.3 and 2.4).

    Var is Σ_d var_d of the batch. AuxK asks the k_aux = min(D/2, dead) strongest dead latents of each
    row to reconstruct what the living leave over.
    """
    assert context.k is not None
    pre_BF = sae.project(x_BD) + sae.b_enc
    return _topk_kin(sae, x_BD, y_BE, pre_BF, topk_relu(pre_BF, context.k), [sae.d_sae], context)


def batchtopk_objective(sae: ReLUSAE, x_BD: Tensor, context: Context, y_BE: Tensor) -> Loss:
    """As TopK, with the k·B largest positive pre-activations of the batch (Bussmann et al. 2024, "BatchTopK", section 3)."""
    pre_BF = sae.project(x_BD) + sae.b_enc
    return _topk_kin(sae, x_BD, y_BE, pre_BF, _batch_topk(pre_BF, context), [sae.d_sae], context)


def matryoshka_objective(sae: ReLUSAE, x_BD: Tensor, context: Context, y_BE: Tensor) -> Loss:
    """As BatchTopK, with the error averaged over nested SAEs: those of the first m latents, m each of `prefixes`.

    Bussmann et al. 2025, "Learning Multi-Level Features with Matryoshka Sparse Autoencoders", section 3.
    """
    pre_BF = sae.project(x_BD) + sae.b_enc
    return _topk_kin(sae, x_BD, y_BE, pre_BF, _batch_topk(pre_BF, context), prefixes(sae.d_sae), context)


def gated_objective(sae: GatedSAE, x_BD: Tensor, context: Context, y_BE: Tensor) -> Loss:
    """mean‖y−x̂‖² + λ mean‖ReLU(π_gate)‖₁ + mean‖y − x̂_frozen(ReLU(π_gate))‖²

    The last term trains the gate through a frozen copy of the decoder
    (Rajamanoharan et al. 2024, equation 8).
    """
    out = sae(x_BD)
    gate_BF = torch.relu(out.pre)
    reconstruction = _mean_squared_error(y_BE, out.x_hat)
    sparsity = gate_BF.sum(1).mean()
    auxiliary = _mean_squared_error(y_BE, gate_BF @ sae.W_dec.detach() + sae.base(x_BD).detach())
    return Loss(reconstruction + context.coefficient * sparsity + auxiliary, reconstruction, sparsity, auxiliary)


def jumprelu_objective(sae: JumpReLUSAE, x_BD: Tensor, context: Context, y_BE: Tensor) -> Loss:
    """mean‖y−x̂‖² + λ mean L0, the thresholds trained by straight-through estimates of bandwidth ε.

    Rajamanoharan et al. 2024, "Jumping Ahead", section 3 and equations 11 and 12.
    """
    pre_BF, epsilon = sae.project(x_BD) + sae.b_enc, bandwidth(sae.d_in)
    acts_BF = _Jump.apply(pre_BF, sae.threshold, epsilon)
    reconstruction = _mean_squared_error(y_BE, acts_BF @ sae.W_dec + sae.base(x_BD))
    sparsity = _Step.apply(pre_BF, sae.threshold, epsilon).sum(1).mean()
    return Loss(reconstruction + context.coefficient * sparsity, reconstruction, sparsity, torch.zeros_like(sparsity))


def prefixes(d_sae: int) -> list[int]:
    """Sizes of Matryoshka's nested SAEs, the last of them d_sae; for few latents some coincide and are left out."""
    sizes = [max(1, round(d_sae * sum(PREFIX_SHARES[: n + 1]))) for n in range(len(PREFIX_SHARES) - 1)]
    return sorted({*sizes, d_sae})


def bandwidth(d_in: int) -> float:
    """ε of JumpReLU: .001 at E‖x‖² = 1 (Rajamanoharan et al. 2024, appendix), so .001·√D at E‖x‖² = D."""
    return 0.001 * d_in**0.5


def _topk_kin(
    sae: SAE, x_BD: Tensor, y_BE: Tensor, pre_BF: Tensor, acts_BF: Tensor, sizes: list[int], context: Context
) -> Loss:
    variance = (y_BE - y_BE.mean(0)).pow(2).sum(1).mean()
    nested = [acts_BF[:, :size] @ sae.W_dec[:size] + sae.base(x_BD) for size in sizes]
    errors = torch.stack([_mean_squared_error(y_BE, x_hat) for x_hat in nested])
    auxiliary = torch.zeros_like(variance)
    if len(context.dead):
        left_over_BE = (y_BE - nested[-1]).detach()
        acts = topk_relu(pre_BF[:, context.dead], min(sae.d_in // 2, len(context.dead)))
        auxiliary = _mean_squared_error(left_over_BE, acts @ sae.W_dec[context.dead])
    total = (errors.mean() + AUX_WEIGHT * auxiliary) / variance
    return Loss(total, errors[-1], torch.zeros_like(total), auxiliary)


def _batch_topk(pre_BF: Tensor, context: Context) -> Tensor:
    assert context.k is not None
    values, places = torch.relu(pre_BF).flatten().topk(context.k * len(pre_BF), sorted=False)
    return torch.zeros_like(pre_BF).flatten().scatter(0, places, values).view_as(pre_BF)


def _mean_squared_error(x_BD: Tensor, x_hat_BD: Tensor) -> Tensor:
    return (x_BD - x_hat_BD).pow(2).sum(1).mean()


class _Step(torch.autograd.Function):
    """1[z > θ], whose gradient for θ is taken as -1/ε within ε/2 of it."""

    @staticmethod
    def forward(ctx: Any, pre_BF: Tensor, threshold_F: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(pre_BF, threshold_F)
        ctx.epsilon = epsilon
        return (pre_BF > threshold_F).to(pre_BF.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        pre_BF, threshold_F = ctx.saved_tensors
        near = (pre_BF - threshold_F).abs() < ctx.epsilon / 2
        return None, -(gradients[0] * near).sum(0) / ctx.epsilon, None


class _Jump(torch.autograd.Function):
    """z 1[z > θ], whose gradient for θ is taken as -θ/ε within ε/2 of it."""

    @staticmethod
    def forward(ctx: Any, pre_BF: Tensor, threshold_F: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(pre_BF, threshold_F)
        ctx.epsilon = epsilon
        return pre_BF * (pre_BF > threshold_F)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        pre_BF, threshold_F = ctx.saved_tensors
        near = (pre_BF - threshold_F).abs() < ctx.epsilon / 2
        return (
            gradients[0] * (pre_BF > threshold_F),
            -(gradients[0] * near * threshold_F).sum(0) / ctx.epsilon,
            None,
        )

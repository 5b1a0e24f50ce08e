"""What each architecture is trained to do, on inputs scaled to E‖x‖² = D.

Each objective is a function of the SAE, the batch and its output; `Context` carries the rest. The
gradients come from autograd here: readable first.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saebench.sae import SAE, GatedSAE, SAEOutput, topk_relu

AUX_WEIGHT = 1 / 32  # Gao et al. 2024, section 2.4


class Context(NamedTuple):
    """λ (sparsity coefficient, a scalar) and the latents that count as dead `[F]`."""

    coefficient: Float[Tensor, ""]
    dead: Bool[Tensor, " F"]


class Loss(NamedTuple):
    """Scalars. `total` is minimised; `reconstruction` is mean ‖x−x̂‖², `sparsity` the penalty before λ."""

    total: Float[Tensor, ""]
    reconstruction: Float[Tensor, ""]
    sparsity: Float[Tensor, ""]
    auxiliary: Float[Tensor, ""]


Objective = Callable[[SAE, Float[Tensor, "B D"], SAEOutput, Context], Loss]


def relu_objective(sae: SAE, x_BD: Tensor, out: SAEOutput, context: Context) -> Loss:
    """mean‖x−x̂‖² + λ mean Σ_j f_j ‖d_j‖ (Anthropic, "Circuits Updates" April 2024)."""
    reconstruction = _mean_squared_error(x_BD, out.x_hat)
    sparsity = (out.acts.sum(0) @ sae.W_dec.norm(dim=1)) / len(x_BD)
    return Loss(reconstruction + context.coefficient * sparsity, reconstruction, sparsity, torch.zeros_like(sparsity))


def topk_objective(sae: SAE, x_BD: Tensor, out: SAEOutput, context: Context) -> Loss:
    """mean‖x−x̂‖²/Var + α AuxK/Var, α = 1/32 (Gao et al. 2024, sections 2.3 and 2.4).

    Var is Σ_d var_d of the batch. AuxK asks the k_aux = min(D/2, dead) strongest dead latents of each
    row to reconstruct what the living leave over.
    """
    variance = (x_BD - x_BD.mean(0)).pow(2).sum(1).mean()
    reconstruction = _mean_squared_error(x_BD, out.x_hat)
    auxiliary = torch.zeros_like(reconstruction)
    n_dead = int(context.dead.sum())
    if n_dead:
        left_over_BD = (x_BD - out.x_hat).detach()
        acts = topk_relu(out.pre[:, context.dead], min(sae.d_in // 2, n_dead))
        auxiliary = _mean_squared_error(left_over_BD, acts @ sae.W_dec[context.dead]).nan_to_num(0.0)
    total = (reconstruction + AUX_WEIGHT * auxiliary) / variance
    return Loss(total, reconstruction, torch.zeros_like(total), auxiliary)


def gated_objective(sae: SAE, x_BD: Tensor, out: SAEOutput, context: Context) -> Loss:
    """mean‖x−x̂‖² + λ mean‖ReLU(π_gate)‖₁ + mean‖x − x̂_frozen(ReLU(π_gate))‖²

    The last term trains the gate through a frozen copy of the decoder
    (Rajamanoharan et al. 2024, equation 8).
    """
    assert isinstance(sae, GatedSAE)
    gate_BF = torch.relu(out.pre)
    reconstruction = _mean_squared_error(x_BD, out.x_hat)
    sparsity = gate_BF.sum(1).mean()
    auxiliary = _mean_squared_error(x_BD, gate_BF @ sae.W_dec.detach() + sae.b_dec.detach())
    return Loss(reconstruction + context.coefficient * sparsity + auxiliary, reconstruction, sparsity, auxiliary)


def _mean_squared_error(x_BD: Tensor, x_hat_BD: Tensor) -> Tensor:
    return (x_BD - x_hat_BD).pow(2).sum(1).mean()


OBJECTIVES: dict[str, Objective] = {"relu": relu_objective, "topk": topk_objective, "gated": gated_objective}

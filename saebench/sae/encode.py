"""What an SAE makes of rows, as a sparse code: for whoever reads activations and not gradients."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saebench.sae.architectures import (
    NOT_OF_LATENTS,
    SAE,
    GatedSAE,
    JumpReLUSAE,
    ReLUSAE,
    TopKSAE,
    new_sae,
    normalized,
)
from saebench.sae.refit import refit
from saebench.sae.sparse import Encoder, SparseCode, select


@torch.no_grad()
def encode_sparse(sae: SAE, x_RD: Float[Tensor, "R D"]) -> tuple[SparseCode, Float[Tensor, " N"]]:
    """The non-zero activations of `sae.encode(x)`, sorted by row: (which, their values).

    Never holds more than a block of rows densely. Rounding may differ from `encode` in the last bits.
    """
    x_RD = normalized(x_RD, sae.normalize)[0]
    shift_F = sae.b_pre @ sae.W_enc
    if isinstance(sae, GatedSAE):
        code, gate = Encoder(x_RD, sae.W_enc, sae.b_gate - shift_F).above()
        values = (gate - code.at(sae.b_gate)) * code.at(sae.r_mag.exp()) + code.at(sae.b_mag)
        return select(code, values, values > 0)
    assert isinstance(sae, ReLUSAE)
    encoder = Encoder(x_RD, sae.W_enc, sae.b_enc - shift_F)
    if isinstance(sae, TopKSAE):
        code, values = encoder.topk(sae.k)
        return select(code, values, values > 0)
    return encoder.above(sae.threshold.clamp(min=0) if isinstance(sae, JumpReLUSAE) else 0.0)


@torch.no_grad()
def reconstruct_sparse(
    sae: SAE, x_RD: Float[Tensor, "R D"], *, refitted: bool = False
) -> tuple[Float[Tensor, "R E"], SparseCode, Float[Tensor, " N"]]:
    """(x̂, which latents are active, their values): `sae(x)` without anything dense of the width of the SAE.

    `refitted` has the values of `refit`, those above 0 of the same latents. Raises ValueError for it of what is no autoencoder: it would
    have to be told what it is there to predict.
    """
    if refitted and not sae.tied:
        raise ValueError(
            "refitted is True of a dictionary that writes other vectors than it reads; expected an autoencoder"
        )
    code, values = encode_sparse(sae, x_RD)
    rows_RD, scale, shift = normalized(x_RD, sae.normalize)
    base = sae.base(rows_RD)
    if refitted:
        values = refit(code, values, rows_RD - base, sae.W_dec)
        code, values = select(code, values, values > 0)
    return (code.decode(values, sae.W_dec) + base) * scale + shift, code, values


@torch.no_grad()
def latent_encoder(sae: SAE, latents: Sequence[int]) -> Callable[[Float[Tensor, "R D"]], Float[Tensor, "R G"]]:
    """The encoder of some latents alone: rows to their activations, in the order given.

    At the price of those latents' columns of W_enc; for TopK, whose latents compete, of all. Raises ValueError for a latent
    that the SAE does not have.
    """
    if wrong := [latent for latent in latents if not 0 <= latent < sae.d_sae]:
        raise ValueError(f"latent is {wrong[0]}; the SAE has 0 to {sae.d_sae - 1}")
    picked = torch.tensor(latents, device=sae.W_enc.device, dtype=torch.long)
    if isinstance(sae, TopKSAE):

        def among_all(x_RD: Tensor) -> Tensor:
            code, values = encode_sparse(sae, x_RD)
            acts_RG = x_RD.new_zeros(len(x_RD), len(picked))
            entries, columns = (code.latents[:, None] == picked).nonzero(as_tuple=True)
            acts_RG[code.rows[entries].long(), columns] = values[entries]
            return acts_RG

        return torch.no_grad()(among_all)
    return torch.no_grad()(part(sae, picked).encode)


@torch.no_grad()
def part(sae: SAE, latents: Int[Tensor, " G"]) -> SAE:
    """The SAE of some latents alone, in the order given; of a TopK one, whose latents compete, without the competition: ReLU."""
    architecture = "relu" if isinstance(sae, TopKSAE) else sae.architecture
    made = new_sae(architecture, sae.d_in, len(latents), normalize=sae.normalize, writes=sae.writes)
    made = made.to(sae.W_enc.device)
    for name, parameter in made.named_parameters():
        whole = sae.get_parameter(name)
        parameter.copy_(whole if name in NOT_OF_LATENTS else whole.index_select(int(name == "W_enc"), latents))
    made.b_pre.copy_(sae.b_pre)
    return made

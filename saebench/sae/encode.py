"""What an SAE makes of rows, as a sparse code: for whoever reads activations and not gradients."""

import torch
from jaxtyping import Float
from torch import Tensor

from saebench.sae.architectures import SAE, GatedSAE, JumpReLUSAE, ReLUSAE, TopKSAE, normalized
from saebench.sae.sparse import Encoder, SparseCode, select


@torch.no_grad()
def encode_sparse(sae: SAE, x_RD: Float[Tensor, "R D"]) -> tuple[SparseCode, Float[Tensor, " N"]]:
    """The non-zero activations of `sae.encode(x)`, sorted by row: (which, their values).

    Never holds more than a block of rows densely. Rounding may differ from `encode` in the last bits.
    """
    x_RD = normalized(x_RD, sae.normalize)[0]
    shift_F = sae.b_dec @ sae.W_enc
    if isinstance(sae, GatedSAE):
        code, gate = Encoder(x_RD, sae.W_enc, sae.b_gate - shift_F).above()
        values = (gate - code.at(sae.b_gate)) * code.at(sae.r_mag.exp()) + code.at(sae.b_mag)
        return select(code, values, values > 0)
    assert isinstance(sae, ReLUSAE)
    encoder = Encoder(x_RD, sae.W_enc, sae.b_enc - shift_F)
    if isinstance(sae, TopKSAE):
        code, values = encoder.topk(sae.k)
        return select(code, values, values > 0)
    code, values = encoder.above()
    return select(code, values, values > code.at(sae.threshold)) if isinstance(sae, JumpReLUSAE) else (code, values)

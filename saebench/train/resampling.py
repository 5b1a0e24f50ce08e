"""Dead latents are pointed at inputs that are badly reconstructed (Bricken et al. 2023, "Neuron resampling")."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saebench.metrics import DUPLICATE
from saebench.sae import SAE
from saebench.sae.architectures import NOT_OF_LATENTS
from saebench.train.objectives import bandwidth
from saebench.train.shares import Share

_ENCODER_SHARE = 0.2  # of the living latents' mean encoder norm, for a resampled one (Bricken et al. 2023)
_PAIRED = 1024  # rows whose cosines with all others are held at once


def keys_of(u_B: Float[Tensor, " B"], error_B: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Keys of which the largest are of rows drawn by their squared loss, without replacement; u is uniform.

    The rows of the largest u^(1/weight) are such a draw (Efraimidis and Spirakis 2006, algorithm A-Res).
    """
    weights_B = error_B.double().pow(2).nan_to_num(0.0, 0.0, 0.0)
    return u_B.log() / weights_B.clamp(min=1e-30)


def point(
    sae: SAE, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, share: Share,
    rows: Float[Tensor, "n V"], silent_F: Bool[Tensor, " F"], n_dead: int,
) -> Int[Tensor, " latents"]:  # fmt: skip
    """Point silent latents, `n_dead` in all processes, at these rows, each at another; returns which. Behind the inputs are the
    vectors that were to be written, where they are others.

    What latents write is their input, or what is missing there where other vectors are written than read.
    Other than there, the bias lets them fire on what is at least half as far along as their input, and not on half of all.
    Where there are fewer inputs than dead latents, the rest stay dead until the next time.
    """
    x, y = rows[:, : sae.d_in], rows[:, sae.d_in :]
    offsets = x - sae.b_pre
    dead, alive, mean = silent_F.nonzero().flatten(), ~silent_F, share.mean
    chosen = _apart(offsets).nonzero()[:n_dead, 0]
    x_hat = share.reconstructed(sae, x[chosen]) if not sae.tied else None
    start = share.before(len(dead))
    own = slice(start, start + len(dead))
    chosen = chosen[own]
    offsets, dead = offsets[chosen], dead[: len(chosen)]
    directions = written = torch.nn.functional.normalize(offsets, dim=1)
    if x_hat is not None:
        written = torch.nn.functional.normalize(y[chosen] - x_hat[own], dim=1)
    encoder_norm = _ENCODER_SHARE * mean(parameters["W_enc"][alive].norm(dim=1))
    biases = () if "threshold" in parameters else ("b_enc", "b_gate", "b_mag")
    for name, parameter in parameters.items():
        if name in NOT_OF_LATENTS:
            continue
        if name == "W_enc":
            parameter[dead] = directions * encoder_norm
        elif name == "W_dec":
            parameter[dead] = written * mean(parameter[alive].norm(dim=1))
        elif name in biases:
            parameter[dead] = -0.5 * encoder_norm * offsets.norm(dim=1)
        else:
            parameter[dead] = bandwidth(sae.d_in) if name == "threshold" else 0.0
        # With no second moment Adam's next step would be many times lr, and undo the direction.
        moments = optimizer.state[parameter]
        moments["exp_avg"][dead] = 0.0
        if "exp_avg_sq" in moments:
            moments["exp_avg_sq"][dead] = mean(moments["exp_avg_sq"][alive])
    return dead


def _apart(rows_ND: Float[Tensor, "N D"]) -> Bool[Tensor, " N"]:
    """Which rows point nowhere near one before them."""
    unit_ND = torch.nn.functional.normalize(rows_ND, dim=1)
    parts = enumerate(unit_ND.split(_PAIRED))
    return ~torch.cat([(part @ unit_ND.T).tril_(_PAIRED * n - 1).amax(1) > DUPLICATE for n, part in parts])

"""What of a model is explained: one number at one position of a text.

B texts, D what is read, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saebench.models import LanguageModel
from saebench.sae import SAE, Ends, latent_encoder, reconstruct_sparse

LOGITS = "logits"
"""in the place of a hook: the logits of what comes next"""
At = Mapping[str, Tensor]
"""`[B, D]` at each hook, or `[B, V]`, at the position."""


class Scalar(NamedTuple):
    """A number of a model, and what it is made of."""

    name: str
    hooks: tuple[str, ...]
    """those whose vectors it is a function of, or LOGITS"""
    of: Callable[[At], Tensor]
    """from these to `[B]`"""
    fires: bool = False
    """whether at 0 there is nothing to explain"""


def activation(sae: SAE, ends: Ends, latent: int) -> Scalar:
    """A latent's activation. Raises ValueError for a latent that the SAE does not have."""
    encode = latent_encoder(sae, [latent])
    return Scalar(f"latent {latent}", ends.reads, lambda at: encode(_read(at, ends.reads, sae))[:, 0], fires=True)


def error(sae: SAE, ends: Ends) -> Scalar:
    """The length of what an SAE does not reconstruct of what it is to write."""

    def of(at: At) -> Float[Tensor, " B"]:
        x_BD = _read(at, ends.reads, sae)
        return (_read(at, ends.writes, sae) - reconstruct_sparse(sae, x_BD)[0]).norm(dim=1)

    return Scalar("norm of the SAE's error", ends.hooks, of)


def log_probability(model: LanguageModel, token: int, against: int | None = None) -> Scalar:
    """The log-probability that a token comes next, in nats, or by how much it is above another's.

    Raises ValueError for a token beyond the model's embedding, and the two the same.
    """
    known = [one for one in (token, against) if one is not None]
    if any(not 0 <= one < model.n_vocab for one in known) or token == against:
        raise ValueError(f"tokens are {token} and {against}; expected two of 0 to {model.n_vocab - 1}, or one")

    def of(at: At) -> Float[Tensor, " B"]:
        logs_BV = torch.log_softmax(at[LOGITS].double(), 1)
        return logs_BV[:, token] if against is None else logs_BV[:, token] - logs_BV[:, against]

    return Scalar(" − ".join(f"log p({model.pieces.text([one])!r})" for one in known), (LOGITS,), of)


def _read(at: At, hooks: tuple[str, ...], sae: SAE) -> Float[Tensor, "B D"]:
    return torch.cat([at[hook] for hook in hooks], -1).to(sae.W_dec.device, torch.float32)

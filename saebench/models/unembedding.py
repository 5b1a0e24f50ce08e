"""What leads from the residual stream to the logits."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saebench.models.attach import attach
from saebench.models.checks import probe_tokens
from saebench.models.devices import through, weights_in
from saebench.models.load import LanguageModel
from saebench.models.passes import last_states, logits
from saebench.models.places import Place

_CAPS = ("final_logit_softcapping", "logits_soft_cap")
_CLOSE = 0.05  # of the logits' spread, that final norm and unembedding may leave unexplained


class Unembedding(NamedTuple):
    """The way of a direction to the logits, but for the final norm's division by its scale."""

    W_U: Float[Tensor, "D V"]
    gamma: Float[Tensor, " D"]
    """the final norm's weight"""
    centred: bool
    """whether the final norm takes off the mean first (LayerNorm)"""
    scale: float = 1.0
    """what the model multiplies its logits by"""

    def effects(self, directions: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Logits of directions at a final-norm scale of 1, biases and a soft cap left out."""
        if self.centred:
            directions = directions - directions.mean(1, keepdim=True)
        return (directions * (self.gamma * self.scale)) @ self.W_U.float()


@torch.no_grad()
def unembedding(model: LanguageModel) -> Unembedding:
    """The unembedding, `W_U` in the model's dtype; tried on a few tokens.

    The final norm is found by what it reads, and asked rather than read, since families keep its weight differently. Raises
    ValueError for a model whose logits are not a final norm's output times a matrix, times one number, with or without a soft cap.
    """
    tokens = probe_tokens(model)
    norm, normed_BLD = final_norm(model, tokens)
    matrix = model.module.get_output_embeddings()
    if matrix is None or matrix.weight.shape[1] != normed_BLD.shape[2]:
        raise ValueError(_unknown(model, "it has no unembedding of the width of its residual stream"))
    with weights_in(matrix):
        W_VD, bias = matrix.weight.to(model.device), getattr(matrix, "bias", None)
        plain = torch.nn.functional.linear(normed_BLD.float(), W_VD.float())
        plain += 0 if bias is None else bias.to(model.device).float()
    found = logits(model, tokens).float()
    text_config = model.module.config.get_text_config(decoder=True)
    if cap := next((value for name in _CAPS if (value := getattr(text_config, name, None))), None):
        found = torch.atanh((found / cap).clamp(-1 + 1e-6, 1 - 1e-6)) * cap
    plain, found = plain.flatten(), found.flatten()
    scale = float((plain @ found) / (plain @ plain))
    if float((found - scale * plain).norm() / found.norm()) > _CLOSE:
        raise ValueError(_unknown(model, "its logits are not its final norm times its unembedding"))
    sign_D = torch.ones(model.d_model, device=model.device, dtype=getattr(torch, model.dtype))
    sign_D[::2] = -1.0
    outputs = [through(norm, x_D[None, None]).float()[0, 0] for x_D in (sign_D, -sign_D, sign_D + 3.0)]
    gamma_D = (outputs[0] - outputs[1]) / 2 * sign_D.float()
    centred = torch.allclose(outputs[2], outputs[0], rtol=1e-2, atol=1e-3)
    return Unembedding(W_VD.T, gamma_D, centred, float(f"{scale:.3g}"))


def final_norm(model: LanguageModel, tokens: Tensor) -> tuple[nn.Module, Tensor]:
    """The module that reads what the last layer writes, and what it makes of it; where none does, one that changes nothing."""
    inside = {part for block in model.blocks for part in block.modules()}
    last: list[Tensor] = []
    found: list[tuple[nn.Module, Tensor]] = []

    def see(module: nn.Module, args: tuple, output: object) -> None:
        x, y = (args[0] if args else None), output
        if (
            last
            and isinstance(x, Tensor)
            and isinstance(y, Tensor)
            and x.shape == y.shape == last[0].shape
            and torch.equal(x.to(model.device), last[0])
        ):
            found.append((module, y.to(model.device)))

    handles = [
        part.register_forward_hook(see)
        for part in model.base.modules()
        if part not in inside and not list(part.children())
    ]
    handles.append(attach(model, Place(model.blocks[-1]), lambda value: last.append(value.clone())))
    try:
        last_states(model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else (nn.Identity(), last[0])


def _unknown(model: LanguageModel, why: str) -> str:
    return f"the logit effects of model {model.id!r} ({type(model.module).__name__}) are not known: {why}; index with --no-logits"

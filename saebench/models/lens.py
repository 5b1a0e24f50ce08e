"""What a model would say next: after its last layer, and after each of the layers before it (the logit lens).

V vocabulary, N layers and the embedding before them, k most likely tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saebench.models.devices import through
from saebench.models.load import LanguageModel
from saebench.models.passes import capturer, head, last_states
from saebench.models.places import hook_name
from saebench.models.unembedding import final_norm

_CLOSE = 1e-2  # of the logits' spread, by which the lens at the last layer may miss the model's own logits


class Predictions(NamedTuple):
    """The most likely next tokens, the first the likeliest."""

    ids: np.ndarray
    """`[k]`"""
    probabilities: np.ndarray
    """`[k]`"""


def next_tokens(model: LanguageModel, tokens: Sequence[int], position: int = -1, *, top: int = 10) -> Predictions:
    """What the model says comes after a position of a text. Raises ValueError for a position that is not in it."""
    return _most_likely(model, _logits(model, _up_to(model, tokens, position)), top)[0]


@torch.inference_mode()
def logit_lens(
    model: LanguageModel, tokens: Sequence[int], position: int = -1, *, top: int = 5
) -> dict[str, Predictions]:
    """What each layer's stream after a position says comes next, through the final norm and the unembedding, by hook.

    The first is the stream before any layer, the last is what the model says (nostalgebraist 2020, "interpreting GPT: the
    logit lens"). Raises ValueError for a position that is not in the text, and for a model whose logits are not its final
    norm's of what its last layer writes.
    """
    ids = _up_to(model, tokens, position)
    hooks = [hook_name(0, "resid_pre"), *(hook_name(layer) for layer in range(model.n_layers))]
    streams: dict[str, Tensor] = {}
    capturer(model, hooks)(ids, lambda name, value: streams.update({name: value[0, -1].clone()}))
    x_ND = torch.stack([streams[hook] for hook in hooks])
    norm, _ = final_norm(model, ids)
    logits_NV = head(model, through(norm, x_ND[None])[0]).float()
    own_V = _logits(model, ids)[0]
    if float((logits_NV[-1] - own_V).norm() / (own_V - own_V.mean()).norm()) > _CLOSE:
        raise ValueError(
            f"there is no logit lens of model {model.id!r} ({type(model.module).__name__}): its logits are not its final norm "
            "times its unembedding of what its last layer writes"
        )
    return dict(zip(hooks, _most_likely(model, logits_NV, top), strict=True))


def _up_to(model: LanguageModel, tokens: Sequence[int], position: int) -> Int[Tensor, "1 L"]:
    if not -len(tokens) <= position < len(tokens):
        raise ValueError(f"position is {position}; the text has tokens 0 to {len(tokens) - 1}")
    return torch.tensor([list(tokens)[: position % len(tokens) + 1]], device=model.device)


def _logits(model: LanguageModel, ids: Int[Tensor, "1 L"]) -> Float[Tensor, "1 V"]:
    return head(model, last_states(model, ids)[0, -1:]).float()


def _most_likely(model: LanguageModel, logits_NV: Float[Tensor, "N V"], top: int) -> list[Predictions]:
    """Of tokens alone: an unembedding may be padded beyond them."""
    known = torch.from_numpy(model.pieces.known(logits_NV.shape[1])).to(logits_NV.device)
    best = logits_NV.masked_fill(~known, -torch.inf).softmax(-1).topk(min(top, int(known.sum())), dim=-1)
    return [
        Predictions(ids, probabilities)
        for ids, probabilities in zip(best.indices.cpu().numpy(), best.values.cpu().numpy(), strict=True)
    ]

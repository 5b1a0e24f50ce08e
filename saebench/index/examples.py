"""Examples with the activation of each of their tokens, computed from the store's rows when they are shown."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from saebench.index.reader import Context, Example, FeatureIndex
from saebench.sae import SAE, encode_sparse

_ROWS = 4096  # encoded at once


class Shown(NamedTuple):
    """An example as it is shown: tokens around a firing, and how strongly the latent fires on each."""

    context: Context
    values: np.ndarray
    """`[len(context.tokens)]`, 0 at special tokens"""


def show(
    index: FeatureIndex, sae: SAE, latent: int, examples: Sequence[Example], around: int | None = 16
) -> list[Shown]:
    """Examples of a latent within `around` tokens of their rows (None: their whole contexts)."""
    contexts = [index.context_of(example.row, around) for example in examples]
    return [Shown(*pair) for pair in zip(contexts, activations(index, sae, latent, contexts), strict=True)]


def activations(index: FeatureIndex, sae: SAE, latent: int, contexts: Sequence[Context]) -> list[np.ndarray]:
    """A latent's activation on each token of some contexts."""
    found: list[np.ndarray] = []
    pending: list[Context] = []
    for number, context in enumerate(contexts):
        pending.append(context)
        if sum(len(each.rows) for each in pending) >= _ROWS or number == len(contexts) - 1:
            found += _activations(index, sae, latent, pending)
            pending = []
    return found


@torch.no_grad()
def _activations(index: FeatureIndex, sae: SAE, latent: int, contexts: Sequence[Context]) -> list[np.ndarray]:
    rows, keep = zip(*(index.vectors(context.rows) for context in contexts), strict=True)
    x_RD = torch.cat(rows).to(sae.W_dec.device, torch.float32)
    code, values = encode_sparse(sae, x_RD)
    mine = code.latents == latent
    acts_R = torch.zeros(len(x_RD))
    acts_R[code.rows[mine].long().cpu()] = values[mine].cpu()
    acts_R *= torch.from_numpy(np.concatenate(keep))
    return [part.numpy() for part in acts_R.split([len(context.rows) for context in contexts])]

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
    """`[len(context.tokens)]`, 0 at special tokens and massive rows"""


def show(
    index: FeatureIndex, sae: SAE, latent: int, examples: Sequence[Example], around: int | None = 16
) -> list[Shown]:
    """Examples of a latent within `around` tokens of their rows (None: their whole contexts)."""
    return show_all(index, sae, [(latent, example) for example in examples], around)


def show_all(
    index: FeatureIndex, sae: SAE, examples: Sequence[tuple[int, Example]], around: int | None = 16
) -> list[Shown]:
    """Examples of many latents, each a (latent, example); every row that they need is encoded once."""
    contexts = [index.context_of(example.row, around) for _, example in examples]
    lengths = np.array([len(context.rows) for context in contexts], np.int64)
    rows_N = np.concatenate([np.arange(context.rows.start, context.rows.stop) for context in contexts] or [[]])
    latents_N = np.repeat(np.array([latent for latent, _ in examples], np.int64), lengths)
    values_N = _activations(index, sae, rows_N.astype(np.int64), latents_N)
    parts = np.split(values_N, lengths.cumsum()[:-1])
    return [Shown(*pair) for pair in zip(contexts, parts, strict=False)]


@torch.no_grad()
def _activations(index: FeatureIndex, sae: SAE, rows_N: np.ndarray, latents_N: np.ndarray) -> np.ndarray:
    """`[N]` the activation of a latent on a row, for N such pairs."""
    unique, place_N = np.unique(rows_N, return_inverse=True)
    order = np.argsort(place_N, kind="stable")
    sorted_N = place_N[order]
    found_N = np.zeros(len(rows_N), np.float32)
    for first in range(0, len(unique), _ROWS):
        block = unique[first : first + _ROWS]
        mine = order[slice(*np.searchsorted(sorted_N, [first, first + len(block)]))]
        ends = np.flatnonzero((np.diff(block) != 1) | (np.diff(block // index.context) != 0)) + 1
        runs = [range(int(run[0]), int(run[-1]) + 1) for run in np.split(block, ends)]
        rows, counts = zip(*(index.vectors(run) for run in runs), strict=True)
        counted = np.concatenate(counts)
        code, values = encode_sparse(sae, torch.cat(rows).to(sae.W_dec.device))
        keys = code.rows.cpu().numpy().astype(np.int64) * sae.d_sae + code.latents.cpu().numpy()
        by_key = np.argsort(keys)
        wanted = (place_N[mine] - first) * sae.d_sae + latents_N[mine]
        at = np.searchsorted(keys[by_key], wanted)
        at = by_key[np.minimum(at, len(keys) - 1)] if len(keys) else np.zeros(0, np.int64)
        if len(at):
            fires = (keys[at] == wanted) & counted[place_N[mine] - first]
            found_N[mine] = np.where(fires, values.cpu().numpy()[at], 0)
    return found_N

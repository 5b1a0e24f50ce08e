"""Constraints under which a dictionary is trained as a control: what it reaches all the same is not due to what it could not learn.

Korznikov et al. 2026 ("Sanity Checks for Sparse Autoencoders: Do SAEs Beat Random Baselines?", arXiv 2602.14111). Biases and thresholds learn in all of them.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Control = Literal["frozen-decoder", "soft-frozen", "frozen-encoder"]
FROZEN: dict[str, tuple[str, ...]] = {"frozen-decoder": ("W_dec",), "frozen-encoder": ("W_enc",)}
"""parameters that stay as they were drawn"""
NEAR = 0.8
"""least cosine of a decoder row with its start under soft-frozen"""


@torch.no_grad()
def keep_near(W_dec: Float[Tensor, "F D"], start_FD: Float[Tensor, "F D"], least: float = NEAR) -> None:
    """Turn rows whose cosine with their start (rows of norm 1) is below `least` back to it, in place, in the plane of both; norms stay.

    A row opposite to its start, which is in no plane with it, becomes the start.
    """
    along_F = (W_dec * start_FD).sum(1)
    norm_F = W_dec.norm(dim=1)
    across_FD = torch.nn.functional.normalize(W_dec - along_F[:, None] * start_FD, dim=1)
    turned_FD = norm_F[:, None] * (least * start_FD + (1 - least**2) ** 0.5 * across_FD)
    W_dec.copy_(torch.where((along_F < least * norm_F)[:, None], turned_FD, W_dec))

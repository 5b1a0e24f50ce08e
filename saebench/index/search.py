"""Which latents fire on a text, and where."""

from typing import Literal, NamedTuple

import numpy as np
import torch

from saebench.index.reader import FeatureIndex
from saebench.models import LanguageModel, capture
from saebench.sae import SAE, encode_sparse
from saebench.text import encoder_of

Ranking = Literal["activation", "quantile", "attribution"]


class Firing(NamedTuple):
    """A latent that fires on a text."""

    latent: int
    positions: np.ndarray
    """tokens of the text on which it fires"""
    values: np.ndarray
    """its activations there"""
    quantile: float
    """share of its firings in the index that its strongest here reaches or exceeds"""
    density: float
    """share of the index's rows on which it fires"""

    @property
    def peak(self) -> float:
        return float(self.values.max())


class TextFeatures(NamedTuple):
    """A text as an SAE sees it."""

    tokens: np.ndarray
    pieces: list[str]
    firings: list[Firing]
    """ranked, the first first"""


def features_for_text(
    model: LanguageModel,
    sae: SAE,
    index: FeatureIndex,
    text: str,
    *,
    rank: Ranking = "activation",
    position: int | None = None,
    max_density: float = 1.0,
    limit: int | None = 50,
) -> TextFeatures:
    """The latents that fire on a text, ranked by their strongest activation or by its quantile in the index.

    Firings are looked for on all tokens but special ones, or at one `position` alone. A density above `max_density` leaves a
    latent out. Raises ValueError for a text of no tokens or of more than the model takes, and a position not in it.
    """
    tokens = tokenize(model, text)
    if position is not None and not 0 <= position < len(tokens):
        raise ValueError(f"position is {position}; the text has tokens 0 to {len(tokens) - 1}")
    with torch.no_grad():
        x_LD = capture(model, torch.tensor(tokens, device=model.device)[None], [index.hook])[index.hook][0]
        code, values = encode_sparse(sae, x_LD.to(sae.W_dec.device, torch.float32))
    special = np.isin(tokens, list(encoder_of(model.tokenizer).special))
    rows, latents, acts = (part.cpu().numpy() for part in (code.rows, code.latents, values))
    wanted = ~special[rows] & (index.columns["density"][latents] <= max_density)
    if position is not None:
        wanted &= rows == position
    rows, latents, acts = rows[wanted], latents[wanted], acts[wanted]
    order = np.argsort(latents, kind="stable")
    ids, starts = np.unique(latents[order], return_index=True)
    groups = np.split(order, starts[1:]) if len(ids) else []
    quantiles = index.quantiles(ids, np.array([acts[group].max() for group in groups], np.float32))
    density = index.columns["density"]
    firings = [
        Firing(int(latent), rows[group], acts[group], float(quantile), float(density[latent]))
        for latent, group, quantile in zip(ids, groups, quantiles, strict=True)
    ]
    key = {"activation": lambda firing: -firing.peak, "quantile": lambda firing: (-firing.quantile, -firing.peak)}[rank]
    return TextFeatures(np.array(tokens), index.pieces(np.array(tokens)), sorted(firings, key=key)[:limit])


def tokenize(model: LanguageModel, text: str) -> list[int]:
    """Token ids of a text as contexts have them, BOS first. Raises ValueError where there are none or too many."""
    encoder = encoder_of(model.tokenizer)
    ids = [encoder.bos, *encoder.encode([text])[0]]
    if len(ids) == 1:
        raise ValueError("the text is empty; expected at least one token")
    if len(ids) > model.max_context:
        raise ValueError(f"the text has {len(ids)} tokens; the model takes at most {model.max_context}")
    return ids

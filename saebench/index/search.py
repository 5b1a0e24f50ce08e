"""Which latents fire on a text, and where."""

from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saebench.evaluate.attribution import attribute, left_alone, logit_of, massive, read
from saebench.index.reader import FeatureIndex
from saebench.models import LanguageModel, next_logits
from saebench.pieces import show_bytes
from saebench.sae import SAE, encode_sparse, latent_encoder

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
    effects: np.ndarray | None = None
    """of each value on the target's logit, less what it is compared with, where ranked by attribution"""

    @property
    def peak(self) -> float:
        return float(self.values.max())

    @property
    def unusual(self) -> float:
        """Probability that the strongest of as many of its firings as there are here is no stronger: quantile to their number."""
        return self.quantile ** len(self.positions)

    @property
    def effect(self) -> float:
        """The sum of its effects."""
        return 0.0 if self.effects is None else float(self.effects.sum())


class Parts(NamedTuple):
    """What a logit is due to, as sums of gradient × activation; of all latents, whichever are shown."""

    latents: float
    error: float
    """of the SAE"""
    alone: float
    """BOS and massive vectors, which are left alone"""

    def shares(self) -> list[float]:
        """Of the sum of their sizes."""
        whole = sum(map(abs, self)) or 1.0
        return [abs(part) / whole for part in self]


class TextFeatures(NamedTuple):
    """A text as an SAE sees it."""

    tokens: np.ndarray
    pieces: list[str]
    firings: list[Firing]
    """ranked, the first first"""
    massive: np.ndarray
    """`[L]` whose vectors are massive: nothing is looked for there"""
    target: int | None = None
    """the token whose logit was attributed"""
    parts: Parts | None = None
    """what that logit is due to"""


def features_for_text(
    model: LanguageModel,
    sae: SAE,
    index: FeatureIndex,
    text: str,
    *,
    rank: Ranking = "activation",
    position: int | None = None,
    target: int | None = None,
    against: int | None = None,
    max_density: float = 1.0,
    limit: int | None = 50,
) -> TextFeatures:
    """The latents that fire on a text, ranked by their strongest activation, by how unusual that is, or by attribution.

    The quantile of an activation among the latent's own is no measure of that alone: the strongest of many firings is high in
    any text (`Firing.unusual`).

    Firings are looked for on all tokens but special ones and those of massive vectors, or at one `position` alone. A density above `max_density` leaves a
    latent out. Attribution (gradient × activation) is to the logit of the token `target` after `position` or after the text,
    less that of the token `against`, or less the mean logit: it comes from firings at `position` and all before it. Without a
    `target`, it is that of the token that follows in the text, or that the model holds most likely.
    Raises ValueError for a text of no tokens or of more than the model takes, a position not in it, a `target` or `against`
    that the vocabulary lacks, and the two the same.
    """
    tokens = np.array(model.tokens_of(text))
    if position is not None and not 0 <= position < len(tokens):
        raise ValueError(f"position is {position}; the text has tokens 0 to {len(tokens) - 1}")
    effects, parts = None, None
    x_LD = _vectors(model, index, tokens)
    too_long = massive(x_LD, index.longest).cpu().numpy()
    if rank == "attribution":
        target = _target(model, tokens, position, target)
        if against is not None and (against == target or not 0 <= against < model.n_vocab):
            raise ValueError(
                f"against is {against}; expected 0 to {model.n_vocab - 1}, and another than target {target}"
            )
        metric = logit_of(target, -1 if position is None else position, against)
        found = attribute(model, sae, index.ends, tokens, metric, longest=index.longest)
        rows, latents, acts, effects = found.positions, found.latents, found.activations, found.effects
        parts = Parts(*(float(part.sum()) for part in (effects, found.errors, found.alone)))
    else:
        target = None
        code, values = encode_sparse(sae, x_LD.to(sae.W_dec.device))
        rows, latents, acts = (part.cpu().numpy() for part in (code.rows, code.latents, values))
    density = index.columns["density"]
    left_out = _left_out(model, index, tokens, x_LD)
    wanted = ~left_out[rows] & (density[latents] <= max_density)
    if position is not None:
        wanted &= rows <= position if rank == "attribution" else rows == position
    order = np.flatnonzero(wanted)[np.argsort(latents[wanted], kind="stable")]
    ids, starts = np.unique(latents[order], return_index=True)
    groups = np.split(order, starts[1:]) if len(ids) else []
    quantiles = index.quantiles(ids, np.array([acts[group].max() for group in groups], np.float32))
    firings = [
        Firing(
            int(latent), rows[group], acts[group], float(quantile), float(density[latent]),
            None if effects is None else effects[group],
        )
        for latent, group, quantile in zip(ids, groups, quantiles, strict=True)
    ]  # fmt: skip
    firings.sort(key=_KEYS[rank])
    return TextFeatures(tokens, index.running(tokens), firings[:limit], too_long, target, parts)


class Difference(NamedTuple):
    """A latent on two texts: where it fires on each, None where it does not."""

    latent: int
    first: Firing | None
    second: Firing | None

    @property
    def peaks(self) -> tuple[float, float]:
        """Its strongest activation on the one and on the other; 0 where it does not fire."""
        first, second = (0.0 if firing is None else firing.peak for firing in (self.first, self.second))
        return first, second

    @property
    def more(self) -> float:
        """By how much it fires more strongly on the first."""
        first, second = self.peaks
        return first - second


def differences(first: TextFeatures, second: TextFeatures, limit: int | None = 50) -> list[Difference]:
    """The latents of two texts, the largest difference of their strongest activations first, whichever way it goes.

    Of what `features_for_text` found on either: with a `limit` there, a latent beyond it counts as silent.
    """
    here, there = ({firing.latent: firing for firing in found.firings} for found in (first, second))
    every = [Difference(latent, here.get(latent), there.get(latent)) for latent in sorted(here | there)]
    return sorted(every, key=lambda one: -abs(one.more))[:limit]


def token_of(model: LanguageModel, text: str) -> int:
    """The one token that a text is; a leading space may be written `·`. Raises ValueError for none or several."""
    _, *ids = model.tokens_of(text.replace("·", " "))
    if len(ids) != 1:
        pieces = ", ".join(repr(show_bytes(model.pieces[token])) for token in ids)
        raise ValueError(
            f"{text!r} is {len(ids)} tokens ({pieces}); expected one: a leading space, written ·, is part of it"
        )
    return ids[0]


def activations_on(
    model: LanguageModel, sae: SAE, index: FeatureIndex, text: str, latent: int
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens of a text, BOS first, and one latent's activation on each, 0 on special ones and massive vectors). Raises ValueError as `features_for_text`."""
    tokens = np.array(model.tokens_of(text))
    x_LD = _vectors(model, index, tokens)
    with torch.no_grad():
        values = latent_encoder(sae, [latent])(x_LD.to(sae.W_dec.device))[:, 0].cpu().numpy()
    return tokens, np.where(_left_out(model, index, tokens, x_LD), 0.0, values)


_KEYS = {
    "activation": lambda firing: -firing.peak,
    "quantile": lambda firing: (-firing.unusual, -firing.peak),
    "attribution": lambda firing: -abs(firing.effect),
}


def _vectors(model: LanguageModel, index: FeatureIndex, tokens: np.ndarray) -> Float[Tensor, "L D"]:
    """What is read of a text."""
    return read(model, torch.tensor(tokens, device=model.device)[None], index.ends)[0][0]


def _left_out(model: LanguageModel, index: FeatureIndex, tokens: np.ndarray, x_LD: Float[Tensor, "L D"]) -> np.ndarray:
    return left_alone(model, torch.tensor(tokens, device=model.device), x_LD, index.longest).cpu().numpy()


def _target(model: LanguageModel, tokens: np.ndarray, position: int | None, target: int | None) -> int:
    """The token whose logit after `position` is attributed."""
    if target is not None:
        if not 0 <= target < model.n_vocab:
            raise ValueError(f"target is {target}; the model's tokens are 0 to {model.n_vocab - 1}")
        return target
    if position is not None and position + 1 < len(tokens):
        return int(tokens[position + 1])
    return int(next_logits(model, torch.tensor(tokens, device=model.device)[None])[0][0, -1].argmax())

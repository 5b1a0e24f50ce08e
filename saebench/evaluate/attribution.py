"""What of a text's activations a figure of the logits is due to: latents, position by position, and the SAE's error.

At a hook x = x₀ + Σ f d + ε: latents' activations f times their decoder rows d, the SAE's error ε, and the decoder bias x₀,
each at every position. Legend: L positions, N active latents (pairs of position and latent), D d_in, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saebench.models import LanguageModel, capture, edits, logits
from saebench.sae import SAE, encode_sparse, latent_encoder
from saebench.sae.architectures import normalized

Metric = Callable[[Float[Tensor, "L V"]], Float[Tensor, ""]]
_POSITIONS = 2**22  # entries of vectors made at once


class Attribution(NamedTuple):
    """Shares of a metric; `effects` and `errors` sum to `total`."""

    positions: np.ndarray
    """`[N]`"""
    latents: np.ndarray
    """`[N]`"""
    activations: np.ndarray
    """`[N]`"""
    effects: np.ndarray
    """`[N]` of each activation"""
    errors: np.ndarray
    """`[L]` of the SAE's error at each position"""
    alone: np.ndarray
    """`[L]` ∇m·(x − x₀) where a position is left alone, as if it were not, and 0 elsewhere: no part of `total`"""
    metric: float
    """m(x): on the text as it is"""
    baseline: float
    """m(x₀): with the decoder bias alone at every position"""

    @property
    def total(self) -> float:
        """∇m·(x − x₀) of gradient × activation; about m(x) − m(x₀) of integrated gradients."""
        return float(self.effects.sum() + self.errors.sum())


def logit_of(token: int, position: int = -1, against: int | None = None) -> Metric:
    """The metric that is a token's logit at a position, less another token's or less the mean of all."""

    def metric(logits_LV: Tensor) -> Tensor:
        at = logits_LV[position]
        return at[token] - (at.mean() if against is None else at[against])

    return metric


def attribute(
    model: LanguageModel, sae: SAE, hook: str, tokens: Int[np.ndarray, " L"], metric: Metric, *, steps: int = 1,
    longest: float | None = math.inf,
) -> Attribution:  # fmt: skip
    """Attribute a metric of the logits of one text to the latents of an SAE at `hook`.

    With `steps` 1: gradient × activation, f ∇m·d at x (Marks et al. 2024, "Sparse feature circuits", section 2, with
    the error as a node). With more: integrated gradients, ∇m averaged along the straight line from x₀ to x at the `steps`
    points of Gauss and Legendre (Sundararajan et al. 2017, section 3); `total` then comes to metric − baseline, within
    a percent at 10 steps, unless x₀ is near zero: a model's norms have no derivative there, and no number of steps helps.
    What is `left_alone` (BOS, and vectors of a norm above `longest`) is left as it is, x₀ included, and no effect is theirs; None leaves
    out nothing. Raises ValueError when `steps` is under 1.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected 1 (gradient × activation) or more (integrated gradients)")
    ids = torch.as_tensor(tokens, device=model.device).long()[None]
    x_LD = capture(model, ids, [hook])[hook][0].float().clone()
    with torch.no_grad():
        alone_L = left_alone(model, ids[0], x_LD, longest)
        code, values = encode_sparse(sae, x_LD)
        counted = ~alone_L[code.rows.long()]
        rows, latents, values = code.rows.long()[counted], code.latents.long()[counted], values[counted]
        _, scale, shift = normalized(x_LD, sae.normalize)
        bias_LD = (sae.b_dec * scale + shift).expand_as(x_LD)
        base_LD = torch.where(alone_L[:, None], x_LD, bias_LD)
        scale_L = torch.as_tensor(scale, device=x_LD.device).expand(len(x_LD), 1)[:, 0].float()
        parts_LD = torch.zeros_like(x_LD)
        for picked in _blocks(len(rows), sae.d_in):
            parts_LD.index_add_(0, rows[picked], values[picked, None] * sae.W_dec[latents[picked]])
        errors_LD = x_LD - base_LD - parts_LD * scale_L[:, None]
    gradient_LD = torch.zeros_like(x_LD)
    for share, weight in _points(steps):
        gradient_LD += weight * _gradient(model, ids, hook, base_LD + share * (x_LD - base_LD), metric)
    with torch.no_grad():
        effects = torch.empty_like(values)
        for picked in _blocks(len(rows), sae.d_in):
            products = (gradient_LD[rows[picked]] * sae.W_dec[latents[picked]]).sum(1)
            effects[picked] = products * values[picked] * scale_L[rows[picked]]
        errors_L = (gradient_LD * errors_LD).sum(1)
        apart_L = (gradient_LD * (x_LD - bias_LD)).sum(1) * alone_L
        ends = [float(metric(_logits(model, ids, hook, end)).detach()) for end in (x_LD, base_LD)]
    parts = [part.cpu().numpy() for part in (rows, latents, values, effects, errors_L, apart_L)]
    return Attribution(*parts, metric=ends[0], baseline=ends[1])


def left_alone(
    model: LanguageModel, ids: Int[Tensor, "*B L"], x: Float[Tensor, "*B L D"], longest: float | None
) -> Bool[Tensor, "*B L"]:
    """The first position, those of special tokens, and of vectors of a norm above `longest`; none where it is None."""
    if longest is None:
        return torch.zeros_like(ids, dtype=torch.bool)
    special = torch.tensor(sorted(model.encoder.special), device=ids.device)
    alone = torch.isin(ids, special) | (x.norm(dim=-1) > longest)
    alone[..., 0] = True  # an attention sink, whether or not a ready-made context has BOS there
    return alone


def ablation_effects(
    model: LanguageModel, sae: SAE, hook: str, tokens: Int[np.ndarray, " L"], latent: int,
    *, longest: float | None = math.inf,
) -> tuple[Float[Tensor, "L V"], Float[Tensor, " L"]]:  # fmt: skip
    """(change of the logits, change of the next-token loss in nats; NaN at the last) when a latent is set to 0 on a text.

    The SAE's error and all other latents are kept: f d is taken off wherever the latent fires, but for what is `left_alone`
    (BOS, and vectors of a norm above `longest`); None leaves out nothing. Raises ValueError for a latent that the SAE does not have.
    """
    encode = latent_encoder(sae, [latent])
    ids = torch.as_tensor(tokens, device=model.device).long()[None]
    x_LD = capture(model, ids, [hook])[hook][0].float().clone()
    with torch.no_grad():
        _, scale, _ = normalized(x_LD, sae.normalize)
        acts_L = encode(x_LD)[:, 0].masked_fill(left_alone(model, ids[0], x_LD, longest), 0.0)
        off_LD = acts_L[:, None] * sae.W_dec[latent] * scale
        clean, without = (_logits(model, ids, hook, rows) for rows in (x_LD, x_LD - off_LD))
        loss = torch.full_like(acts_L, torch.nan)
        targets = ids[0, 1:]
        loss[:-1] = torch.nn.functional.cross_entropy(without[:-1], targets, reduction="none")
        loss[:-1] -= torch.nn.functional.cross_entropy(clean[:-1], targets, reduction="none")
    return without - clean, loss


def _points(steps: int) -> list[tuple[float, float]]:
    """(share of the way from x₀ to x, weight), weights summing to 1."""
    if steps == 1:
        return [(1.0, 1.0)]
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return [(float(node + 1) / 2, float(weight) / 2) for node, weight in zip(nodes, weights, strict=True)]


def _blocks(count: int, width: int) -> list[slice]:
    size = max(1, _POSITIONS // width)
    return [slice(start, start + size) for start in range(0, count, size)]


def _gradient(model: LanguageModel, ids: Tensor, hook: str, x_LD: Tensor, metric: Metric) -> Float[Tensor, "L D"]:
    """∇m at x in the place of the vectors at the hook."""
    with torch.enable_grad():
        x_LD = x_LD.detach().requires_grad_(True)
        return torch.autograd.grad(metric(_logits(model, ids, hook, x_LD)), x_LD)[0]


def _logits(model: LanguageModel, ids: Tensor, hook: str, x_LD: Tensor) -> Float[Tensor, "L V"]:
    with edits(model, {hook: lambda value: x_LD[None].to(value.dtype)})():
        return logits(model, ids)[0].float()

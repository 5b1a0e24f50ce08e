"""What of a text's activations a figure of the logits is due to: latents, position by position, and the SAE's error.

At the hooks written y = y₀ + Σ f d + ε: latents' activations f times their decoder rows d, the error ε, and y₀, what is written
where no latent is active (of an SAE the decoder bias), each at every position. Vectors of several hooks are one behind the other.
Legend: L positions, N active latents (pairs of position and latent), D what is read, E what is written, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saebench.models import LanguageModel, capture, edits, logits
from saebench.sae import SAE, Ends, encode_sparse, latent_encoder
from saebench.sae.architectures import normalized

Metric = Callable[[Float[Tensor, "L V"]], Float[Tensor, ""]]
Longest = float | tuple[float, ...]
"""The norm above which a vector is massive; where several hooks are read one for each of them."""
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
    """`[L]` ∇m·(y − y₀) where a position is left alone, as if it were not, and 0 elsewhere: no part of `total`"""
    metric: float
    """m(y): on the text as it is"""
    baseline: float
    """m(y₀): without latents and error at every position"""

    @property
    def total(self) -> float:
        """∇m·(y − y₀) of gradient × activation; about m(y) − m(y₀) of integrated gradients."""
        return float(self.effects.sum() + self.errors.sum())


def logit_of(token: int, position: int = -1, against: int | None = None) -> Metric:
    """The metric that is a token's logit at a position, less another token's or less the mean of all."""

    def metric(logits_LV: Tensor) -> Tensor:
        at = logits_LV[position]
        return at[token] - (at.mean() if against is None else at[against])

    return metric


def attribute(
    model: LanguageModel, sae: SAE, ends: Ends, tokens: Int[np.ndarray, " L"], metric: Metric, *, steps: int = 1,
    longest: Longest | None = math.inf,
) -> Attribution:  # fmt: skip
    """Attribute a metric of the logits of one text to the latents of an SAE, or of what reads and writes elsewhere (`ends`).

    With `steps` 1: gradient × activation, f ∇m·d at y (Marks et al. 2024, "Sparse feature circuits", section 2, with
    the error as a node). With more: integrated gradients, ∇m averaged along the straight line from y₀ to y at the `steps`
    points of Gauss and Legendre (Sundararajan et al. 2017, section 3); `total` then comes to metric − baseline, within
    a percent at 10 steps, unless y₀ is near zero: a model's norms have no derivative there, and no number of steps helps.
    Where several hooks are written, each holds what it holds whatever changes before it: so the effects of MLP outputs are those
    that do not go through another of them, and of stream after stream those of the deepest.
    What is `left_alone` (BOS, and vectors of a norm above `longest`) is left as it is, y₀ included, and no effect is theirs; None leaves
    out nothing. Raises ValueError when `steps` is under 1.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected 1 (gradient × activation) or more (integrated gradients)")
    ids = torch.as_tensor(tokens, device=model.device).long()[None]
    x_LD, y_LE = (vectors[0] for vectors in read(model, ids, ends))
    with torch.no_grad():
        alone_L = left_alone(model, ids[0], x_LD, longest)
        code, values = encode_sparse(sae, x_LD)
        counted = ~alone_L[code.rows.long()]
        rows, latents, values = code.rows.long()[counted], code.latents.long()[counted], values[counted]
        rows_LD, scale, shift = normalized(x_LD, sae.normalize)
        bias_LE = (sae.base(rows_LD) * scale + shift).expand_as(y_LE)
        base_LE = torch.where(alone_L[:, None], y_LE, bias_LE)
        scale_L = torch.as_tensor(scale, device=x_LD.device).expand(len(x_LD), 1)[:, 0].float()
        parts_LE = torch.zeros_like(y_LE)
        for picked in _blocks(len(rows), sae.d_out):
            parts_LE.index_add_(0, rows[picked], values[picked, None] * sae.W_dec[latents[picked]])
        errors_LE = y_LE - base_LE - parts_LE * scale_L[:, None]
    gradient_LE = torch.zeros_like(y_LE)
    for share, weight in _points(steps):
        gradient_LE += weight * _gradient(model, ids, ends, base_LE + share * (y_LE - base_LE), metric)
    with torch.no_grad():
        effects = torch.empty_like(values)
        for picked in _blocks(len(rows), sae.d_out):
            products = (gradient_LE[rows[picked]] * sae.W_dec[latents[picked]]).sum(1)
            effects[picked] = products * values[picked] * scale_L[rows[picked]]
        errors_L = (gradient_LE * errors_LE).sum(1)
        apart_L = (gradient_LE * (y_LE - bias_LE)).sum(1) * alone_L
        metrics = [float(metric(_logits(model, ids, ends, written)).detach()) for written in (y_LE, base_LE)]
    parts = [part.cpu().numpy() for part in (rows, latents, values, effects, errors_L, apart_L)]
    return Attribution(*parts, metric=metrics[0], baseline=metrics[1])


def read(
    model: LanguageModel, ids: Int[Tensor, "B L"], ends: Ends
) -> tuple[Float[Tensor, "B L D"], Float[Tensor, "B L E"]]:
    """(what a dictionary reads of some texts, what is written there), float32, from one pass of the model as it is."""
    found = capture(model, ids, ends.hooks)
    x_BLD, y_BLE = (torch.cat([found[hook].float() for hook in hooks], -1) for hooks in ends)
    return x_BLD, y_BLE


def longest_at(bounds: Sequence[float]) -> Longest:
    """Bounds of the hooks read as `Longest`."""
    return bounds[0] if len(bounds) == 1 else tuple(bounds)


def massive(x: Float[Tensor, "*B D"], longest: Longest) -> Bool[Tensor, "*B"]:
    """Whether what is read is longer than `longest` says, at one of the hooks."""
    bounds = longest if isinstance(longest, tuple) else (longest,)
    norms = x.unflatten(-1, (len(bounds), -1)).norm(dim=-1)
    return torch.stack([norms[..., place] > bound for place, bound in enumerate(bounds)]).any(0)


def left_alone(
    model: LanguageModel, ids: Int[Tensor, "*B L"], x: Float[Tensor, "*B L D"], longest: Longest | None
) -> Bool[Tensor, "*B L"]:
    """The first position, those of special tokens, and of vectors of a norm above `longest`; none where it is None."""
    if longest is None:
        return torch.zeros_like(ids, dtype=torch.bool)
    special = torch.tensor(sorted(model.encoder.special), device=ids.device)
    alone = torch.isin(ids, special) | massive(x, longest)
    alone[..., 0] = True  # an attention sink, whether or not a ready-made context has BOS there
    return alone


def ablation_effects(
    model: LanguageModel, sae: SAE, ends: Ends, tokens: Int[np.ndarray, " L"], latent: int,
    *, longest: Longest | None = math.inf,
) -> tuple[Float[Tensor, "L V"], Float[Tensor, " L"]]:  # fmt: skip
    """(change of the logits, change of the next-token loss in nats; NaN at the last) when a latent is set to 0 on a text.

    The SAE's error and all other latents are kept: f d is taken off what is written wherever the latent fires, but for what is
    `left_alone` (BOS, and vectors of a norm above `longest`); None leaves out nothing. f is that of the model as it is.
    Raises ValueError for a latent that the SAE does not have.
    """
    encode = latent_encoder(sae, [latent])
    ids = torch.as_tensor(tokens, device=model.device).long()[None]
    x_LD = read(model, ids, ends)[0][0]
    with torch.no_grad():
        _, scale, _ = normalized(x_LD, sae.normalize)
        acts_L = encode(x_LD)[:, 0].masked_fill(left_alone(model, ids[0], x_LD, longest), 0.0)
        off = _by_hook(ends, acts_L[:, None] * sae.W_dec[latent] * scale)
        clean = logits(model, ids)[0].float()
        with edits(
            model, {hook: lambda value, hook=hook: (value.float() - off[hook]).to(value.dtype) for hook in off}
        )():
            without = logits(model, ids)[0].float()
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


def _by_hook(ends: Ends, y_LE: Float[Tensor, "L E"]) -> dict[str, Tensor]:
    """What is written at each hook of one model, where all are of one width."""
    return dict(zip(ends.writes, y_LE.chunk(len(ends.writes), 1), strict=True))


def _gradient(model: LanguageModel, ids: Tensor, ends: Ends, y_LE: Tensor, metric: Metric) -> Float[Tensor, "L E"]:
    """∇m at y in the place of the vectors at the hooks written."""
    with torch.enable_grad():
        y_LE = y_LE.detach().requires_grad_(True)
        return torch.autograd.grad(metric(_logits(model, ids, ends, y_LE)), y_LE)[0]


def _logits(model: LanguageModel, ids: Tensor, ends: Ends, y_LE: Tensor) -> Float[Tensor, "L V"]:
    parts = _by_hook(ends, y_LE)
    with edits(model, {hook: lambda value, hook=hook: parts[hook][None].to(value.dtype) for hook in parts})():
        return logits(model, ids)[0].float()

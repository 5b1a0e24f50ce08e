"""What an SAE does on some rows, and what would mend it where that is not what it says: the likely causes, in words.

x is what it reads and y what it writes, N rows of them.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saebench.models import same_model
from saebench.sae import SAE, Ends, JumpReLUSAE, TopKSAE, reconstruct_sparse
from saebench.sae.architectures import Normalize, normalized
from saebench.store import Store

_AT_ONCE = 4096  # rows encoded at once
_TRIED = 512  # rows that a cause is tried on
_POOR = 0.7  # FVU that is said to be poor, where no cause was found
_MENDS = 0.7  # of the FVU: what is less than that mends it
_FITS = 1.5  # times more or fewer active latents than stated, at most
_SILENT = 0.9  # of the latents
_POWERS = range(-8, 9)  # of two: factors tried
_NEAR = 1.2  # times a factor with a name, at most, to be taken for it


def stated_l0(sae: SAE, config: dict[str, Any]) -> float | None:
    """Active latents per row that an SAE says it has: its k, or a mean; None where it says nothing."""
    if isinstance(sae, TopKSAE):
        return float(sae.k)
    metadata = config.get("metadata", {})
    told = (metadata.get(name) for name in ("stated_l0", "l0"))
    return next((float(value) for value in told if isinstance(value, int | float) and value > 0), None)


def is_off(l0: float, stated: float | None) -> bool:
    return stated is not None and not stated / _FITS <= l0 <= stated * _FITS


# ------------------------------------------------------------------------------------------ the rows


class Some(NamedTuple):
    """Rows that causes are tried on."""

    x_ND: Float[Tensor, "N D"]
    y_NE: Float[Tensor, "N E"]


class Sums:
    """Sums over rows, in float64."""

    def __init__(self, sae: SAE) -> None:
        self.sae = sae
        self.rows, self.l0 = 0, 0
        self.squared_error = self.squared_read = self.squared_y = self.squared_hat = 0.0
        self.vector_E = torch.zeros(sae.d_out, dtype=torch.float64, device=sae.W_dec.device)
        self.fires_F = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.W_dec.device)

    def add(self, x_ND: Tensor, y_NE: Tensor) -> None:
        y_hat_NE, code, _ = reconstruct_sparse(self.sae, x_ND)
        self.rows += len(x_ND)
        self.l0 += len(code.latents)
        self.fires_F += code.latents.bincount(minlength=self.sae.d_sae)
        self.squared_error += _square(y_NE - y_hat_NE)
        self.squared_read += _square(x_ND)
        self.squared_y += _square(y_NE)
        self.squared_hat += _square(y_hat_NE)
        self.vector_E += y_NE.double().sum(0)

    @property
    def fvu(self) -> float:
        variance = self.squared_y - float(self.vector_E.square().sum()) / self.rows
        return self.squared_error / variance if variance > 0 else math.nan


def _square(rows: Tensor) -> float:
    return float(rows.double().square().sum())


def pairs_of(store: Store, ends: Ends, sae: SAE, rows: int) -> Iterator[Some]:
    """What is read and written, a few thousand rows at a time."""
    for joint in store.joint_rows(ends.hooks, "train", spread=rows):
        x, y = (
            torch.cat([joint[hook] for hook in hooks], 1).to(sae.W_dec.device) for hooks in (ends.reads, ends.writes)
        )
        for part_x, part_y in zip(x.split(_AT_ONCE), y.split(_AT_ONCE), strict=True):
            yield Some(part_x, part_y)


def thinned(x_ND: Tensor, y_NE: Tensor, rows: int) -> Some:
    step = max(1, rows // _TRIED)
    return Some(x_ND[::step], y_NE[::step])


def joined(parts: Iterable[Some]) -> Some:
    return Some(*(torch.cat(column) for column in zip(*parts, strict=True)))


# -------------------------------------------------------------------------------------- what does not fit


def of_names(config: dict[str, Any], store: Store) -> Iterator[str]:
    """What the SAE says of itself that the store does not."""
    metadata, made = config.get("metadata", {}), store.manifest["identity"]
    stated = metadata.get("model_name")
    if stated and "model" in made and not same_model(stated, made["model"]["id"]):
        yield f"it states model {stated!r}, the store is of {made['model']['id']!r}: unless these are one model, figures mean nothing"
    if isinstance(metadata.get("prepend_bos"), bool) and metadata["prepend_bos"] != store.prepends_bos:
        told = "with" if metadata["prepend_bos"] else "without"
        yield f"it was trained on contexts that open {told} BOS, the store's do not"


def of_silence(seen: Sums, stated: float | None) -> Iterator[str]:
    silent = float((seen.fires_F == 0).double().mean())
    if not math.isfinite(seen.fvu):
        yield "what it writes, or reads, is not finite: its weights are damaged"
    # As many rows as would let every latent fire ten times, were all alike.
    if silent > _SILENT and seen.rows * (stated or seen.l0 / seen.rows) > 10 * seen.sae.d_sae:
        yield f"{silent:.0%} of its latents never fired: they are dead, or of another model, layer or text"


class _Trial(NamedTuple):
    """What the SAE does on some rows that are changed, and the cause that the change would mend."""

    fvu: float
    l0: float
    why: str
    writes: float
    """what was written was multiplied by"""


def causes(sae: SAE, ends: Ends, store: Store, some: Some, stated: float | None, doubtful: bool) -> Iterator[str]:
    """Why it reconstructs badly, or has another L0 than it states: the change that mends it best, of those that are tried.

    The store's other hooks are tried in any case: between neighbouring layers an SAE still reconstructs well.
    """
    now = _tried(sae, some, "")
    off = is_off(now.l0, stated)
    trials = [*_hooks(sae, ends, store)]
    if doubtful:
        trials += [*_scales(sae, some), *_normalisations(sae, some)]
    if isinstance(sae, JumpReLUSAE) and stated is not None and off:
        trials += _thresholds(sae, some, stated)
    better = [trial for trial in trials if trial.fvu < min(_MENDS * now.fvu, 1.0)]
    if off:  # which many changes of thresholds or scale mend, and few without harm
        better = [trial for trial in trials if not is_off(trial.l0, stated) and trial.fvu < _POOR] or better
    if better:
        best = min(better)
        yield f"{best.why}: there its FVU is {best.fvu:.3f} instead of {now.fvu:.3f}, its L0 {best.l0:.1f} instead of {now.l0:.1f}"
    elif not now.fvu < _POOR:
        yield (
            f"its FVU is {now.fvu:.3f}, and neither a factor nor another hook of the store mends that: it is of another "
            f"model, layer or place than {', '.join(ends.reads)}, or its files say other than they mean"
        )
    elif off:
        yield f"its L0 is {now.l0:.1f} where it states {stated:g}, and nothing that was tried mends that: another text, layer or threshold"


def _tried(
    sae: SAE, some: Some, why: str, reads: float = 1.0, writes: float | None = 1.0, how: Normalize = "none"
) -> _Trial:
    """Rows normalised (which is undone behind), or times `reads`, and what is written times `writes`; None for the factor that is best."""
    x_ND, scale, shift = normalized(some.x_ND, how)
    y_hat_NE, code, _ = reconstruct_sparse(sae, x_ND * reads)
    y_hat_NE = y_hat_NE * scale + shift
    if writes is None:  # in closed form
        writes = float((some.y_NE * y_hat_NE).sum() / y_hat_NE.square().sum())
    variance = _square(some.y_NE - some.y_NE.mean(0))
    fvu = _square(some.y_NE - writes * y_hat_NE) / variance if variance > 0 else math.nan
    return _Trial(fvu, len(code.latents) / len(x_ND), why, writes)


def _scales(sae: SAE, some: Some) -> Iterator[_Trial]:
    """Rows times the factor that is best: of powers of two and the one that brings their mean to b_dec, and between them.

    What is written goes back by the same; of what is no SAE, by the factor that is best.
    """
    norm = float(some.x_ND.square().sum(1).mean().sqrt())
    if not norm > 0:
        return

    def tried(factor: float, why: str = "") -> tuple[_Trial, float]:
        return _tried(sae, some, why, factor, 1 / factor if sae.tied else None), factor

    named = {
        math.sqrt(sae.d_in) / norm: "a mean squared norm of d_in, as by SAELens' expected_average_only_in",
        1 / norm: "a mean squared norm of 1, as by dictionary_learning",
    }
    start = [*named, *(2.0**power for power in _POWERS)]
    if sae.tied:  # in closed form
        mean_D = some.x_ND.mean(0)
        start.append(float(sae.b_dec @ mean_D / mean_D.square().sum()))
    best = min(tried(factor) for factor in start if factor > 0)
    for step in (2**0.5, 2**0.25, 2**0.125):
        best = min(best, tried(best[1] * step), tried(best[1] / step))
    trial, factor = best
    why = f"wrong scale: it was trained on rows times {factor:.3g}"
    why += next((f", which is {how}" for one, how in named.items() if 1 / _NEAR < factor / one < _NEAR), "")
    yield trial._replace(why=why if sae.tied else f"{why}, and what it writes is to be taken times {trial.writes:.3g}")


def _normalisations(sae: SAE, some: Some) -> Iterator[_Trial]:
    """Rows each brought to one length, or without their mean over dimensions, or both."""
    if not sae.tied or sae.normalize != "none":
        return
    yield _tried(
        sae, some, "wrong scale: it was trained on rows each brought to norm √d_in", how="constant_norm_rescale"
    )
    yield _tried(sae, some, "wrong scale: it was trained on rows behind a LayerNorm", how="layer_norm")
    mean_N1 = some.x_ND.mean(1, keepdim=True)
    centred = Some(some.x_ND - mean_N1, some.y_NE - mean_N1)
    yield _tried(
        sae, centred, "it was trained on rows without their mean over dimensions, as by center_writing_weights"
    )


def _hooks(sae: SAE, ends: Ends, store: Store) -> Iterator[_Trial]:
    """Other hooks of the store in the place of the one that it reads."""
    for hook in store.hooks if len(ends.reads) == 1 else ():
        if hook not in ends.reads and store.d_in(hook) == sae.d_in:
            other = Ends((hook,), (hook,) if ends.tied else ends.writes)
            some = joined(pairs_of(store, other, sae, _TRIED))
            yield _tried(sae, some, f"wrong layer or place: it says {ends.reads[0]}, and fits {hook}")


def _thresholds(sae: JumpReLUSAE, some: Some, stated: float) -> Iterator[_Trial]:
    """Thresholds times the factor that gives the L0 stated, in closed form: a quantile of pre-activations in their units."""
    pre_NF = sae.activations(normalized(some.x_ND, sae.normalize)[0])[1]
    thresholds_F = sae.threshold.clone()
    units_NF = torch.where((pre_NF > 0) & (thresholds_F > 0), pre_NF / thresholds_F, 0.0)
    wanted = min(round(stated * len(pre_NF)), units_NF.numel() - 1)
    factor = float(units_NF.flatten().topk(wanted + 1).values[-2:].mean())  # between the last to fire and the next
    if not factor > 0:
        return
    norm = float(some.x_ND.norm(dim=1).mean()) / math.sqrt(sae.d_in)
    why = f"thresholds off by a factor: these times {factor:.3g} give the L0 that it states"
    if 1 / _NEAR < factor / norm < _NEAR:
        why += (
            f". {norm:.3g} is the mean norm of rows over √d_in, by which SAELens before 6.54.9 left those of BatchTopK off "
            "where it trained with rescale_acts_by_decoder_norm"
        )
    sae.threshold.copy_(thresholds_F * factor)
    yield _tried(sae, some, why)
    sae.threshold.copy_(thresholds_F)

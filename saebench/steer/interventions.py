"""Interventions on the residual stream: one latent's direction turned up, down or off.

For a latent of activation a(x) and decoder row d, at strength c:

    add         x + c d
    clamp       x + (c − a(x)) d
    scale       x + (c − 1) a(x) d
    ablate      x − a(x) d
    orthogonal  x − (x·d̂) d̂ + c d

so that the SAE's error and everything else in x survive. An SAE that normalises its input has d multiplied by what undoes it at
each position. Several at one hook all read the x before any of them; their changes are summed, orthogonal ones come last.

Legend: B rows of a batch, L columns of a pass, D d_in, n edited vectors.
"""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saebench.index import FeatureIndex
from saebench.models import Edit, LanguageModel, check_hook, edits
from saebench.sae import SAE, latent_encoder
from saebench.sae.architectures import normalized

Mode = Literal["add", "clamp", "scale", "ablate", "orthogonal"]
Positions = Literal["all", "prompt", "generated"]
MOST = 1e9
_STRENGTH = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)([xn]?)", re.IGNORECASE)


class Where(NamedTuple):
    """The positions at which a latent of the same SAE is active above a value, before any intervention."""

    latent: int
    above: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Intervention:
    """One latent, one way to change it, and where."""

    sae: SAE
    hook: str
    """`blocks.LAYER.hook_KIND`, where the SAE reads"""
    latent: int
    mode: Mode = "add"
    strength: float = 0.0
    """raw, in units of the latent's activation (see `Units` for others); for `scale` a factor, for `ablate` without meaning"""
    positions: Positions | tuple[bool, ...] = "all"
    """`generated` begins with the first generated token's own vector; or a truth value for each token of the prompt, BOS included"""
    where: Where | None = None
    """of these positions only those"""
    bos: bool = False
    """whether BOS tokens and whatever else a text begins with are edited too: attention sinks, whose vectors are like no other"""
    longest: float = math.inf
    """vectors of a greater norm are left alone: sinks that are not BOS (`FeatureIndex.longest` says where they begin)"""
    random: int | None = None
    """a seed: a random direction as long as the latent's in its stead, everything else the same; a control"""
    instead: int | None = None
    """another latent, whose direction, as long as this one's, is taken in its stead; a control, too"""

    def __post_init__(self) -> None:
        if not 0 <= self.latent < self.sae.d_sae:
            raise ValueError(f"latent is {self.latent}; the SAE has 0 to {self.sae.d_sae - 1}")
        if self.where is not None and not 0 <= self.where.latent < self.sae.d_sae:
            raise ValueError(f"where names latent {self.where.latent}; the SAE has 0 to {self.sae.d_sae - 1}")
        if self.instead is not None and not 0 <= self.instead < self.sae.d_sae:
            raise ValueError(f"instead is latent {self.instead}; the SAE has 0 to {self.sae.d_sae - 1}")
        if not math.isfinite(self.strength):
            raise ValueError(f"strength is {self.strength}; expected a finite number")

    @property
    def changes_nothing(self) -> bool:
        """Whether it is the identity whatever x is."""
        return (self.mode == "add" and self.strength == 0) or (self.mode == "scale" and self.strength == 1)

    @property
    def reads(self) -> bool:
        """Whether the latent's own activation is part of the arithmetic."""
        return self.mode in ("clamp", "scale", "ablate")

    def negative(self) -> "Intervention":
        """The same with −c; for scale 2 − c and for ablate scale 2, which change x as much the other way."""
        if self.mode in ("scale", "ablate"):
            factor = self.strength if self.mode == "scale" else 0.0
            return dataclasses.replace(self, mode="scale", strength=2.0 - factor)
        return dataclasses.replace(self, strength=-self.strength)

    def direction(self) -> Float[Tensor, " D"]:
        """d, or what is taken in its stead."""
        d_D = self.sae.W_dec[self.latent].detach().float()
        if self.instead is not None:
            other_D = self.sae.W_dec[self.instead].detach().float()
            return other_D * (d_D.norm() / other_D.norm())
        if self.random is None:
            return d_D
        generator = torch.Generator().manual_seed(self.random * 1_000_003 + self.latent)
        other_D = torch.randn(len(d_D), generator=generator).to(d_D.device)
        return other_D * (d_D.norm() / other_D.norm())


# ------------------------------------------------------------------------------------------ units


@dataclass(frozen=True)
class Units:
    """What a strength of one latent is in others' units."""

    decoder_norm: float
    maximum: float | None = None
    """the latent's highest activation in the index"""
    median_norm: float | None = None
    """of the vectors at the hook"""

    def raw(self, strength: str | int | float, mode: Mode = "add") -> float:
        """The strength that is written `12`, `6x` (times the maximum) or `0.5n` (a vector of so many median norms).

        For `scale` it is a factor and has no unit. Raises ValueError for anything else, and for a unit that is not known here.
        """
        match = _STRENGTH.fullmatch(str(strength).strip())
        if match is None:
            raise ValueError(
                f"strength {strength!r} is not known; expected 12 (raw), 6x (times the latent's maximum) or 0.5n (of the median norm)"
            )
        value, unit = float(match[1]), match[2].lower()
        if not abs(value) <= MOST:
            raise ValueError(f"strength {strength!r} is beyond {MOST:g}; expected what a residual stream can hold")
        if not unit:
            return value
        if mode == "scale":
            raise ValueError(f"strength {strength!r} has a unit; what scale takes is a factor, such as 2")
        return value * self._in(unit)

    def all(self, raw: float) -> dict[str, float | None]:
        """A raw strength in every unit: `raw`, `max` and `norm`, None where that unit is not known."""
        found: dict[str, float | None] = {"raw": raw}
        for name, unit, known in (("max", "x", self.maximum), ("norm", "n", self.median_norm)):
            found[name] = raw / self._in(unit) if known else None
        return found

    def _in(self, unit: str) -> float:
        known = self.maximum if unit == "x" else self.median_norm
        if known is None:
            what = (
                "the latent's maximum is not known without an index"
                if unit == "x"
                else "the median norm is not known without an index and its store"
            )
            raise ValueError(f"{what}: run `saebench index`, or give a raw strength")
        if known == 0:
            raise ValueError(
                "the latent never fired in the index, so that its maximum is 0; give a strength in n or raw"
            )
        return known if unit == "x" else known / self.decoder_norm


def units_of(sae: SAE, latent: int, index: FeatureIndex | None = None) -> Units:
    """The units of a latent; without an index only the raw one, without its store not that of the norm."""
    if not 0 <= latent < sae.d_sae:
        raise ValueError(f"latent is {latent}; the SAE has 0 to {sae.d_sae - 1}")
    norm = float(sae.W_dec[latent].norm())
    if index is None:
        return Units(norm)
    median = index.store.norms(index.hook).median if index.has_store else None
    return Units(norm, float(index.columns["max"][latent]), median)


# ------------------------------------------------------------------------------------------ hooks


@contextlib.contextmanager
def steered(
    model: LanguageModel, interventions: Sequence[Intervention], *, prompt_length: int | None = None
) -> Iterator[None]:
    """The model under interventions, in every pass within the block that begins at a context's first token.

    Columns from `prompt_length` on are `generated`; by default none is. For passes with a KV cache use `generate`. Raises
    ValueError as `Editor` does.
    """
    editor = Editor(model, [interventions])
    editor.prompt_columns = prompt_length
    with editor.attached():
        yield


class Editor:
    """Interventions on a model, which may differ from row to row of a batch.

    `first_column`, `prompt_columns` and `padding` say where a pass stands in its texts; whoever runs passes sets them. Raises
    ValueError for an SAE that does not fit the model, a hook that it does not have, and an SAE on another device.
    """

    def __init__(
        self, model: LanguageModel, arms: Sequence[Sequence[Intervention]], arm_of_row: Sequence[int] | None = None
    ) -> None:
        self.model = model
        self.first_column = 0
        """of the pass: how many columns the KV cache holds"""
        self.prompt_columns: int | None = None
        """columns that are prompt, padding included; None where all are"""
        self.padding: Tensor | None = None
        """`[B]` columns of padding before each row's text"""
        self._bos = model.encoder.bos
        groups: dict[str, list[_Group]] = {}
        for number, arm in enumerate(arms):
            rows = None if arm_of_row is None else [row for row, its in enumerate(arm_of_row) if its == number]
            hooks = list(dict.fromkeys(one.hook for one in arm))
            for hook in hooks:
                mine = [one for one in arm if one.hook == hook and not one.changes_nothing]
                for one in mine:
                    _check(model, one)
                if mine and rows != []:
                    groups.setdefault(hook, []).append(_Group(mine, rows, model.device))
        functions: dict[str, Edit] = {hook: functools.partial(self._edit, its) for hook, its in groups.items()}
        self._attached = edits(model, functions)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """The hooks are on the model within the block, and off it after, whatever happens."""
        with self._attached():
            yield

    @torch.no_grad()
    def _edit(self, groups: "list[_Group]", value: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        value = value.clone()
        for group in groups:
            masks = [self._mask(one, group, value.shape[0], value.shape[1]) for one in group.interventions]
            places = torch.stack(masks).any(0).nonzero(as_tuple=True)
            if len(places[0]) == 0:
                continue
            rows = places[0] if group.rows is None else group.rows[places[0]]
            x_nD = value[rows, places[1]]
            value[rows, places[1]] = group.edited(x_nD.float(), [mask[places] for mask in masks]).to(value.dtype)
        return value

    def _mask(self, one: Intervention, group: "_Group", n_rows: int, n_columns: int) -> Bool[Tensor, "b L"]:
        """Where in the group's rows an intervention acts, as far as that is a question of position."""
        ids = self.model.passing.ids
        assert ids is not None
        rows = torch.arange(n_rows, device=ids.device) if group.rows is None else group.rows
        columns_L = self.first_column + torch.arange(n_columns, device=rows.device)
        padding_b = torch.zeros_like(rows) if self.padding is None else self.padding[rows]
        place_bL = columns_L - padding_b[:, None]
        mask_bL = place_bL >= (0 if one.bos else 1)
        if not one.bos and self._bos is not None:
            mask_bL &= ids[rows] != self._bos
        end = self.first_column + n_columns if self.prompt_columns is None else self.prompt_columns
        if one.positions == "generated":
            return mask_bL & (columns_L >= end)
        if one.positions == "all":
            return mask_bL
        mask_bL &= columns_L < end
        if one.positions != "prompt":
            lengths = set((end - padding_b).tolist())
            if lengths != {len(one.positions)}:
                raise ValueError(
                    f"the mask of positions has {len(one.positions)} values; the prompt has {', '.join(map(str, sorted(lengths)))} tokens, BOS included"
                )
            wanted = torch.tensor(one.positions, device=rows.device)
            mask_bL &= wanted[place_bL.clamp(0, len(wanted) - 1)]
        return mask_bL


class _Group:
    """The interventions at one hook on some rows (None: on all)."""

    def __init__(self, interventions: list[Intervention], rows: list[int] | None, device: torch.device) -> None:
        self.interventions = interventions
        self.rows = None if rows is None else torch.tensor(rows, device=device)
        self.directions = [one.direction() for one in interventions]
        wanted: dict[SAE, list[int]] = {}
        for one in interventions:
            latents = wanted.setdefault(one.sae, [])
            latents += [one.latent] * one.reads + ([one.where.latent] if one.where else [])
        self._encoders = {
            sae: (latent_encoder(sae, ids), {latent: column for column, latent in enumerate(ids)})
            for sae, latents in wanted.items()
            if (ids := sorted(set(latents)))
        }

    def edited(self, x_nD: Float[Tensor, "n D"], masks: list[Bool[Tensor, " n"]]) -> Float[Tensor, "n D"]:
        acts = {sae: (encode(x_nD), columns) for sae, (encode, columns) in self._encoders.items()}
        change_nD, last, norm_n = torch.zeros_like(x_nD), [], x_nD.norm(dim=1)
        for one, d_D, mask_n in zip(self.interventions, self.directions, masks, strict=True):
            mask_n = mask_n & (norm_n <= one.longest)
            if one.where is not None:
                acts_nG, columns = acts[one.sae]
                mask_n = mask_n & (acts_nG[:, columns[one.where.latent]] > one.where.above)
            scale = normalized(x_nD, one.sae.normalize)[1]
            c_n: Any = one.strength
            if one.reads:
                acts_nG, columns = acts[one.sae]
                act_n = acts_nG[:, columns[one.latent]]
                c_n = {"clamp": one.strength - act_n, "scale": (one.strength - 1) * act_n, "ablate": -act_n}[one.mode]
            coefficient_n = torch.as_tensor(c_n, device=x_nD.device) * mask_n
            change = coefficient_n[:, None] * scale * d_D
            if one.mode == "orthogonal":
                last.append((mask_n, torch.nn.functional.normalize(d_D, dim=0), change))
            else:
                change_nD += change
        x_nD = x_nD + change_nD
        for mask_n, unit_D, change in last:
            x_nD = x_nD - (mask_n * (x_nD @ unit_D))[:, None] * unit_D + change
        return x_nD


def _check(model: LanguageModel, one: Intervention) -> None:
    check_hook(model, one.hook)
    if one.sae.d_in != model.d_model:
        raise ValueError(
            f"the SAE is of d_in {one.sae.d_in}, but model {model.id!r} has {model.d_model}; it is of another model"
        )
    if one.sae.W_dec.device != model.device:
        raise ValueError(
            f"the SAE is on {one.sae.W_dec.device}, the model on {model.device}; move it there with sae.to(…)"
        )


def mask_of(positions: Sequence[int], length: int) -> tuple[bool, ...]:
    """The mask of some positions of a prompt of `length` tokens; negative ones count from its end."""
    if wrong := [place for place in positions if not -length <= place < length]:
        raise ValueError(f"position is {wrong[0]}; the prompt has tokens 0 to {length - 1}")
    wanted = np.zeros(length, bool)
    wanted[list(positions)] = True
    return tuple(wanted.tolist())

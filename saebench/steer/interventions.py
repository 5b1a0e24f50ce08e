"""Interventions on what a dictionary writes: one latent's direction turned up, down or off.

For a latent of activation a(x) and decoder row d, where x is read and y written, at strength c:

    add         y + c d
    clamp       y + (c − a(x)) d
    scale       y + (c − 1) a(x) d
    ablate      y − a(x) d
    orthogonal  y − (y·d̂) d̂ + c d

so that the error and everything else in y survive. An SAE writes what it reads. Where several hooks are written, each has its part of d;
of hooks of the stream the later ones see what was added before, too. An SAE that normalises its input has d multiplied by what undoes it at
each position. Several at one hook all read the x before any of them; their changes are summed, orthogonal ones come last.

Legend: B rows of a batch, L columns of a pass, D what is read, E what is written (at one hook), n edited vectors.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saebench.evaluate.attribution import Longest, massive
from saebench.models import Edit, LanguageModel, check_hook, depth, edits, widths_of
from saebench.sae import SAE, Ends, latent_encoder
from saebench.sae.architectures import normalized

Mode = Literal["add", "clamp", "scale", "ablate", "orthogonal"]
Positions = Literal["all", "prompt", "generated"]
_Reader = tuple[SAE, tuple[str, ...]]
"""An SAE and the hooks that it reads."""


class Where(NamedTuple):
    """The positions at which a latent of the same SAE is active above a value, before any intervention."""

    latent: int
    above: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Intervention:
    """One latent, one way to change it, and where."""

    sae: SAE
    ends: Ends
    """the hooks that the SAE reads and writes"""
    latent: int
    mode: Mode = "add"
    strength: float = 0.0
    """raw, in units of the latent's activation (`steer.units` for others); for `scale` a factor, for `ablate` without meaning"""
    positions: Positions | tuple[bool, ...] = "all"
    """`generated` begins with the first generated token's own vector; or a truth value for each token of the prompt, BOS included"""
    where: Where | None = None
    """of these positions only those"""
    bos: bool = False
    """whether BOS tokens and whatever else a text begins with are edited too: attention sinks, whose vectors are like no other"""
    longest: Longest = math.inf
    """where what is read is longer nothing is done: sinks that are not BOS (`FeatureIndex.longest` says where they begin)"""
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

    @property
    def needs_x(self) -> bool:
        """Whether nothing can be done before all is read."""
        return self.reads or self.where is not None or self.sae.normalize != "none"

    def longest_at(self, hook: str) -> float:
        """`longest` at a hook that is read."""
        return self.longest[self.ends.reads.index(hook)] if isinstance(self.longest, tuple) else self.longest

    def read_by(self, hook: str) -> tuple[str, ...]:
        """The hooks that are read by the time a pass comes to one."""
        return tuple(read for read in self.ends.reads if depth(read) <= depth(hook))

    def negative(self) -> "Intervention":
        """The same with −c; for scale 2 − c and for ablate scale 2, which change x as much the other way."""
        if self.mode in ("scale", "ablate"):
            factor = self.strength if self.mode == "scale" else 0.0
            return dataclasses.replace(self, mode="scale", strength=2.0 - factor)
        return dataclasses.replace(self, strength=-self.strength)

    def directions(self) -> dict[str, Float[Tensor, " E"]]:
        """d, or what is taken in its stead, as long at each hook written."""
        d_E = self.sae.W_dec[self.latent].detach().float()
        other_E = d_E
        if self.instead is not None:
            other_E = self.sae.W_dec[self.instead].detach().float()
        elif self.random is not None:
            generator = torch.Generator().manual_seed(self.random * 1_000_003 + self.latent)
            other_E = torch.randn(len(d_E), generator=generator).to(d_E.device)
        found: dict[str, Tensor] = {}
        for hook, part, other in zip(
            self.ends.writes, d_E.split(self.sae.parts), other_E.split(self.sae.parts), strict=True
        ):
            found[hook] = part if other_E is d_E else other * (part.norm() / other.norm().clamp(min=1e-30))
        return found


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
    ValueError for an SAE that does not fit the model, a hook that it does not have, an SAE on another device, and an activation that is asked
    for where it is not known yet: that of what writes before it has read all.
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
            mine = [one for one in arm if not one.changes_nothing]
            for one in mine:
                _check(model, one)
            if mine and rows != []:
                group = _Group(mine, rows, model.device)
                for hook in dict.fromkeys(hook for one in mine for hook in one.ends.hooks):
                    groups.setdefault(hook, []).append(group)
        functions: dict[str, Edit] = {hook: functools.partial(self._edit, hook, its) for hook, its in groups.items()}
        self._attached = edits(model, functions)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """The hooks are on the model within the block, and off it after, whatever happens."""
        with self._attached():
            yield

    @torch.no_grad()
    def _edit(self, hook: str, groups: "list[_Group]", value: Float[Tensor, "B L E"]) -> Float[Tensor, "B L E"]:
        if any(hook in group.writes for group in groups):
            value = value.clone()
        for group in groups:
            masks = [self._mask(one, group, value.shape[0], value.shape[1]) for one in group.interventions]
            places = torch.stack(masks).any(0).nonzero(as_tuple=True)
            if len(places[0]) == 0:
                continue
            rows = places[0] if group.rows is None else group.rows[places[0]]
            here_nE = value[rows, places[1]].float()
            if hook in group.read:
                group.read[hook] = here_nE
            if hook in group.writes:
                edited = group.edited(hook, here_nE, [mask[places] for mask in masks])
                value[rows, places[1]] = edited.to(value.dtype)
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
    """The interventions on some rows (None: on all)."""

    def __init__(self, interventions: list[Intervention], rows: list[int] | None, device: torch.device) -> None:
        self.interventions = interventions
        self.rows = None if rows is None else torch.tensor(rows, device=device)
        self.read: dict[str, Tensor] = {hook: torch.empty(0) for one in interventions for hook in one.ends.reads}
        """what is read at each hook, since a pass last came to it"""
        self.directions = [one.directions() for one in interventions]
        self.writes = {hook for parts in self.directions for hook in parts}
        wanted: dict[_Reader, list[int]] = {}
        for one in interventions:
            latents = wanted.setdefault((one.sae, one.ends.reads), [])
            latents += [one.latent] * one.reads + ([one.where.latent] if one.where else [])
        self._encoders = {
            reader: (latent_encoder(reader[0], ids), {latent: column for column, latent in enumerate(ids)})
            for reader, latents in wanted.items()
            if (ids := sorted(set(latents)))
        }

    def edited(self, hook: str, y_nE: Float[Tensor, "n E"], masks: list[Bool[Tensor, " n"]]) -> Float[Tensor, "n E"]:
        """What is written at a hook, changed; `masks` are those of the interventions."""
        acts: dict[_Reader, Tensor] = {}

        def act_of(one: Intervention, latent: int) -> Float[Tensor, " n"]:
            reader = one.sae, one.ends.reads
            encode, columns = self._encoders[reader]
            if reader not in acts:
                acts[reader] = encode(self._x(one.ends.reads))
            return acts[reader][:, columns[latent]]

        change_nE, last = torch.zeros_like(y_nE), []
        for one, parts, mask_n in zip(self.interventions, self.directions, masks, strict=True):
            if hook not in parts:
                continue
            d_E = parts[hook]
            for read in one.read_by(hook):
                mask_n = mask_n & ~massive(self.read[read], one.longest_at(read))
            if one.where is not None:
                mask_n = mask_n & (act_of(one, one.where.latent) > one.where.above)
            scale = normalized(self._x(one.ends.reads), one.sae.normalize)[1] if one.sae.normalize != "none" else 1.0
            c_n: Any = one.strength
            if one.reads:
                act_n = act_of(one, one.latent)
                c_n = {"clamp": one.strength - act_n, "scale": (one.strength - 1) * act_n, "ablate": -act_n}[one.mode]
            coefficient_n = torch.as_tensor(c_n, device=y_nE.device) * mask_n
            change = coefficient_n[:, None] * scale * d_E
            if one.mode == "orthogonal":
                last.append((mask_n, torch.nn.functional.normalize(d_E, dim=0), change))
            else:
                change_nE += change
        y_nE = y_nE + change_nE
        for mask_n, unit_E, change in last:
            y_nE = y_nE - (mask_n * (y_nE @ unit_E))[:, None] * unit_E + change
        return y_nE

    def _x(self, reads: tuple[str, ...]) -> Float[Tensor, "n D"]:
        return torch.cat([self.read[hook] for hook in reads], 1)


def check_widths(model: LanguageModel, sae: SAE, ends: Ends, name: str) -> None:
    """Raises ValueError where an SAE, called `name`, does not read and write as many numbers as a model has at its hooks."""
    for what, width, hooks in (("d_in", sae.d_in, ends.reads), ("d_out", sae.d_out, ends.writes)):
        found = widths_of(model, hooks).values()
        if width != sum(found):
            raise ValueError(
                f"{name} is of {what} {width}, but model {model.id!r} has {' + '.join(map(str, found))}; it is of another model"
            )


def _check(model: LanguageModel, one: Intervention) -> None:
    for hook in one.ends.hooks:
        check_hook(model, hook)
    check_widths(model, one.sae, one.ends, "the SAE")
    first = min(one.ends.writes, key=depth)
    if one.needs_x and (late := [hook for hook in one.ends.reads if hook not in one.read_by(first)]):
        raise ValueError(
            f"mode is {one.mode} of latent {one.latent}, which writes {first} before it has read {late[-1]}, so that its activation is not known there; "
            "expected add or orthogonal, and no `where`"
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

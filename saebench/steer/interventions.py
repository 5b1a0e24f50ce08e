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

What writes before it has read all (a crosscoder) takes a(x) from a pass of the same tokens in the model left alone (decision 35).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saebench.evaluate.attribution import Longest
from saebench.models import LanguageModel, depth, widths_of
from saebench.sae import SAE, Ends

Mode = Literal["add", "clamp", "scale", "ablate", "orthogonal"]
Positions = Literal["all", "prompt", "generated"]


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

    @functools.cached_property
    def looks_ahead(self) -> bool:
        """Whether it needs x, and writes before a pass has come to all of it."""
        needs_x = self.reads or self.where is not None or self.sae.normalize != "none"
        return needs_x and self.read_by(min(self.ends.writes, key=depth)) != self.ends.reads

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


def mask_of(positions: Sequence[int], length: int) -> tuple[bool, ...]:
    """The mask of some positions of a prompt of `length` tokens; negative ones count from its end."""
    if wrong := [place for place in positions if not -length <= place < length]:
        raise ValueError(f"position is {wrong[0]}; the prompt has tokens 0 to {length - 1}")
    wanted = np.zeros(length, bool)
    wanted[list(positions)] = True
    return tuple(wanted.tolist())


def check_widths(model: LanguageModel, sae: SAE, ends: Ends, name: str) -> None:
    """Raises ValueError where an SAE, called `name`, does not read and write as many numbers as a model has at its hooks."""
    for what, width, hooks in (("d_in", sae.d_in, ends.reads), ("d_out", sae.d_out, ends.writes)):
        found = widths_of(model, hooks).values()
        if width != sum(found):
            raise ValueError(
                f"{name} is of {what} {width}, but model {model.id!r} has {' + '.join(map(str, found))}; it is of another model"
            )

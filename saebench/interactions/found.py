"""What is found of a scalar: the interactions that count, how well they say what it does, and how far that depends on the way of masking."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from saebench.interactions.mobius import Split, Vector, orders

SALIENT = 0.05
"""of the size of the largest interaction, from where on one counts"""
_CURVE = 100  # interactions that the curve goes to

Kind = Literal["and", "or"]


class Interaction(NamedTuple):
    """A set of units, and what it adds to the scalar: where all of them are present (`and`), or any (`or`)."""

    kind: Kind
    """`and` of a set of one"""
    units: tuple[int, ...]
    strength: float
    agreed: bool | None = None
    """whether it counts under the other way of masking, too; None where that was not tried"""

    @property
    def order(self) -> int:
        return len(self.units)

    @property
    def size(self) -> float:
        """The standard deviation over all maskings of what it adds: an AND of ten shows in one masking of 1,024, whatever its strength."""
        return abs(self.strength) * _spread(self.order)


@dataclass(frozen=True)
class Interactions:
    """Why a scalar is what it is at the last token of a text; all but `split` and `values` as JSON (`to_json`)."""

    scalar: str
    tokens: tuple[int, ...]
    """up to the position that is explained"""
    pieces: tuple[str, ...]
    """the text of each"""
    units: tuple[tuple[int, ...], ...]
    """positions of each unit that was masked or present; all other tokens stay"""
    left_out: int
    """units near enough that were not among those that matter most"""
    way: str
    other: str | None
    """another way of masking, whose salient interactions were held against these"""
    whole: float
    """the scalar with nothing masked"""
    empty: float
    """with all units masked"""
    sets: tuple[Interaction, ...]
    """the salient ones, largest first"""
    curve: tuple[float, ...]
    """R² over all maskings of a constant and the k largest interactions, salient or not, from k = 0 on"""
    agreement: float | None
    """of the interactions that are salient under either way of masking, the share that are under both"""
    gap: float
    """by which share a sparser split could be less in L1 norm at most"""
    split: Split
    values: Vector
    """the scalar at each masking"""

    def text(self, unit: int) -> str:
        """What a unit says."""
        return "".join(self.pieces[place] for place in self.units[unit])

    def by_order(self) -> list[tuple[int, float, float]]:
        """(order, sum of the positive, of the negative strengths) of the salient interactions."""
        found = []
        for order in sorted({one.order for one in self.sets}):
            strengths = [one.strength for one in self.sets if one.order == order]
            found.append((order, sum((x for x in strengths if x > 0), 0.0), sum((x for x in strengths if x < 0), 0.0)))
        return found

    def lines(self, most: int = 12) -> list[str]:
        """As text, with at most so many sets."""
        shown = ["".join(self.pieces[-40:-1]), self.pieces[-1]]
        agreed = (
            ""
            if self.other is None
            else f"; * salient when masked by {self.other!r}, too: {self.agreement:.0%} of those salient by either"
        )
        rest = f", those that matter most of {len(self.units) + self.left_out}" if self.left_out else ""
        lines = [
            f"{self.scalar} at {shown[1]!r} behind {shown[0]!r}: {self.whole:.4g}, and {self.empty:.4g} with all {len(self.units)} units masked{rest}",
            *(self._line(one) for one in self.sets[:most]),
        ]
        if len(self.sets) > most:
            lines.append(f"and {len(self.sets) - most} more, to {SALIENT:.0%} of the size of the first")
        marks = ", ".join(f"{self.curve[k]:.3f} by {k}" for k in (5, 10, 20, 50) if k < len(self.curve))
        return [
            *lines,
            f"R² over {len(self.values):,} maskings: {marks or f'{self.curve[-1]:.3f} by all {len(self.curve) - 1}'}{agreed}",
        ]

    def _line(self, one: Interaction) -> str:
        told = f" {one.kind.upper()} ".join(repr(self.text(unit)) for unit in one.units)
        return f"{one.strength:+9.3g} {'*' if one.agreed else ' '} {told}"

    def to_json(self) -> dict[str, Any]:
        """All that is shown, as JSON."""
        said = ("scalar", "left_out", "way", "other", "whole", "empty", "agreement", "gap")
        return {
            **{name: getattr(self, name) for name in said},
            **{name: list(getattr(self, name)) for name in ("tokens", "pieces", "curve")},
            "units": [{"positions": list(places), "text": self.text(unit)} for unit, places in enumerate(self.units)],
            "sets": [{**one._asdict(), "units": list(one.units), "order": one.order, "size": one.size} for one in self.sets],
            "by_order": [list(row) for row in self.by_order()],
        }  # fmt: skip


def ranked(split: Split) -> tuple[Int[np.ndarray, " I"], Float[np.ndarray, " I"]]:
    """(which, strengths) of a split's interactions, largest first: S for an AND, 2^n + S for an OR."""
    strengths, count = np.concatenate([split.ands, split.ors]), orders(len(split.ands).bit_length() - 1)
    there = np.flatnonzero(np.concatenate([count > 0, count > 1]))
    which = there[np.argsort(-_sizes(strengths, count)[there], kind="stable")]
    return which, strengths[which]


def salient(split: Split) -> list[Interaction]:
    """Those above a share SALIENT of the size of the largest, largest first."""
    which, strengths = ranked(split)
    n = len(split.ands).bit_length() - 1
    found = [
        Interaction("or" if one >> n else "and", tuple(unit for unit in range(n) if one >> unit & 1), strength)
        for one, strength in zip(which.tolist(), strengths.tolist(), strict=True)
    ]
    return [one for one in found if one.size > SALIENT * found[0].size]


def curve(split: Split, v: Vector, most: int = _CURVE) -> Float[np.ndarray, " K"]:
    """R² over all maskings of a constant and the k largest interactions, k from 0 to `most`."""
    which, strengths = (column[:most, None] for column in ranked(split))
    sets, subsets = np.arange(len(v)), which % len(v)
    holds = np.where(which >= len(v), (sets & subsets) > 0, (sets & subsets) == subsets)
    rebuilt = np.concatenate([np.zeros((1, len(v))), (holds * strengths).cumsum(0)])
    return 1 - (v - rebuilt).var(1) / v.var()


def _spread(order: int | Int[np.ndarray, "*P"]) -> Any:
    """The standard deviation of an AND or OR of so many units over all maskings, each as likely as the next."""
    share = 0.5**order
    return (share * (1 - share)) ** 0.5


def _sizes(strengths: Float[np.ndarray, " Q"], count: Int[np.ndarray, " P"]) -> Float[np.ndarray, " Q"]:
    return np.abs(strengths) * np.tile(_spread(count), 2)


def agreed(sets: Sequence[Interaction], others: Sequence[Interaction]) -> tuple[tuple[Interaction, ...], float]:
    """(`sets`, each with whether it is among the others, the share of all of them that are in both)."""
    here, there = ({(one.kind, one.units) for one in some} for some in (sets, others))
    marked = tuple(one._replace(agreed=(one.kind, one.units) in there) for one in sets)
    return marked, len(here & there) / max(1, len(here | there))

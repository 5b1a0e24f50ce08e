"""What is found of a scalar: the interactions that count, how well they say what it does, and how far that depends on the way of masking."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from saebench.interactions.mobius import Split, Vector, orders, spread

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
        return abs(self.strength) * spread(self.order)


@dataclass(frozen=True)
class Explained:
    """Of what there are interactions."""

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
    whole: float
    """the scalar with nothing masked"""
    empty: float
    """with all units masked"""
    sets: tuple[Interaction, ...]
    """the salient ones, largest first"""

    def text(self, unit: int) -> str:
        """What a unit says."""
        return "".join(self.pieces[place] for place in self.units[unit])

    def _head(self, most: int) -> list[str]:
        shown = ["".join(self.pieces[-40:-1]), self.pieces[-1]]
        rest = f", those that matter most of {len(self.units) + self.left_out}" if self.left_out else ""
        lines = [
            f"{self.scalar} at {shown[1]!r} behind {shown[0]!r}: {self.whole:.4g}, and {self.empty:.4g} with all {len(self.units)} units masked{rest}",
            *(self._line(one) for one in self.sets[:most]),
        ]
        if len(self.sets) > most:
            lines.append(f"and {len(self.sets) - most} more, to {SALIENT:.0%} of the size of the first")
        return lines

    def _line(self, one: Interaction) -> str:
        told = f" {one.kind.upper()} ".join(repr(self.text(unit)) for unit in one.units)
        return f"{one.strength:+9.3g} {'*' if one.agreed else ' '} {told}"

    def _json(self, said: Sequence[str]) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in ("scalar", "left_out", "way", "whole", "empty", *said)},
            **{name: list(getattr(self, name)) for name in ("tokens", "pieces")},
            "units": [{"positions": list(places), "text": self.text(unit)} for unit, places in enumerate(self.units)],
            "sets": [{**one._asdict(), "units": list(one.units), "order": one.order, "size": one.size} for one in self.sets],
        }  # fmt: skip


@dataclass(frozen=True)
class Sampled(Explained):
    """Why a scalar is what it is, by some of the maskings of many units: a fit, not exact."""

    maskings: int
    """that were run"""
    held: int
    """of these, those that nothing was fitted to"""
    held_out: float
    """R² of all sets over them"""

    def lines(self, most: int = 12) -> list[str]:
        """As text, with at most so many sets."""
        fitted = f"a fit of ANDs to {self.maskings - self.held:,} of the 2^{len(self.units)} maskings, not exact"
        return [*self._head(most), f"R² over {self.held:,} held-out maskings: {self.held_out:.3f}, of {fitted}"]

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return self._json(("maskings", "held", "held_out"))


@dataclass(frozen=True)
class Interactions(Explained):
    """Why a scalar is what it is at the last token of a text; all but `split` and `values` as JSON (`to_json`)."""

    other: str | None
    """another way of masking, whose salient interactions were held against these"""
    curve: tuple[float, ...]
    """R² over all maskings of a constant and the k largest interactions, salient or not, from k = 0 on"""
    agreement: float | None
    """of the interactions that are salient under either way of masking, the share that are under both"""
    likeness: float | None
    """cosine of all interactions under the two ways, by what each adds: 1 where they are the same, 0 where nothing is"""
    gap: float
    """by which share another split could be less in the norm it is chosen by, at most"""
    split: Split
    values: Vector
    """the scalar at each masking"""

    def by_order(self) -> list[tuple[int, float, float]]:
        """(order, sum of the positive, of the negative strengths) of the salient interactions."""
        found = []
        for order in sorted({one.order for one in self.sets}):
            strengths = [one.strength for one in self.sets if one.order == order]
            found.append((order, sum((x for x in strengths if x > 0), 0.0), sum((x for x in strengths if x < 0), 0.0)))
        return found

    def shares(self) -> list[float]:
        """Σ |strength| of the sets of k units over that of all sets, salient or not, for k from 1 on."""
        count, strengths = orders(len(self.units)), np.abs(self.split.ands) + np.abs(self.split.ors)
        return (np.bincount(count, strengths)[1:] / strengths.sum()).tolist()

    def lines(self, most: int = 12) -> list[str]:
        """As text, with at most so many sets."""
        agreed = (
            ""
            if self.other is None
            else f"; * salient when masked by {self.other!r}, too: {self.agreement:.0%} of those salient by either; likeness of all {self.likeness:.2f}"
        )
        marks = ", ".join(f"{self.curve[k]:.3f} by {k}" for k in (5, 10, 20, 50) if k < len(self.curve))
        return [
            *self._head(most),
            f"R² over {len(self.values):,} maskings: {marks or f'{self.curve[-1]:.3f} by all {len(self.curve) - 1}'}{agreed}",
        ]

    def to_json(self) -> dict[str, Any]:
        """All that is shown, as JSON."""
        return self._json(("other", "agreement", "likeness", "gap")) | {
            "curve": list(self.curve),
            "by_order": [list(row) for row in self.by_order()],
            "shares": self.shares(),
        }


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
    return counting(found)


def counting(found: Sequence[Interaction]) -> list[Interaction]:
    """Of sets, largest first, those that count beside the first."""
    return [one for one in found if one.size > SALIENT * found[0].size]


def curve(split: Split, v: Vector, most: int = _CURVE) -> Float[np.ndarray, " K"]:
    """R² over all maskings of a constant and the k largest interactions, k from 0 to `most`."""
    which, strengths = (column[:most, None] for column in ranked(split))
    sets, subsets = np.arange(len(v)), which % len(v)
    holds = np.where(which >= len(v), (sets & subsets) > 0, (sets & subsets) == subsets)
    rebuilt = np.concatenate([np.zeros((1, len(v))), (holds * strengths).cumsum(0)])
    return 1 - (v - rebuilt).var(1) / v.var()


def _sizes(strengths: Float[np.ndarray, " Q"], count: Int[np.ndarray, " P"]) -> Float[np.ndarray, " Q"]:
    return np.abs(strengths) * np.tile(spread(count), 2)


def agreed(sets: Sequence[Interaction], others: Sequence[Interaction]) -> tuple[tuple[Interaction, ...], float]:
    """(`sets`, each with whether it is among the others, the share of all of them that are in both)."""
    here, there = ({(one.kind, one.units) for one in some} for some in (sets, others))
    marked = tuple(one._replace(agreed=(one.kind, one.units) in there) for one in sets)
    return marked, len(here & there) / max(1, len(here | there))


def likeness(split: Split, other: Split) -> float:
    """The cosine of two splits of as many units, each interaction signed and by its size; 0 where one has none."""
    sizes = [
        np.concatenate([one.ands, one.ors]) * np.tile(spread(orders(len(one.ands).bit_length() - 1)), 2)
        for one in (split, other)
    ]
    length = float(np.linalg.norm(sizes[0]) * np.linalg.norm(sizes[1]))
    return float(sizes[0] @ sizes[1]) / length if length else 0.0

"""Interactions that come again: sets of tokens that count at several examples of a latent, by what their members have in common.

A member is told by its token, by a class of it, and by how many tokens before it lies: a set of two examples is the same where all of its
members can be told alike.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from saebench.interactions.found import Interaction, Interactions
from saebench.labels.places import Conjunction, Member, Places

_LARGEST = 6  # sets of an example, and units of one: more say nothing that anyone would read
_MOST_UNITS = 3
_LEAST = 2  # examples, from which on a set transfers
_SHOWN = 5


class Pattern(NamedTuple):
    """What sets of several examples have in common."""

    kind: str
    """`and` or `or`"""
    raises: bool
    """whether the latent is stronger with it"""
    own: Conjunction
    """what is said of the token that the latent fires on, which is never masked; nothing where it differs"""
    members: Conjunction
    """of an OR, any of which is enough"""


class Transferred(NamedTuple):
    """The patterns of a latent, with the sets that each is of: (example, place among its sets)."""

    patterns: dict[Pattern, set[tuple[int, int]]]
    share: float
    """of the strength of all salient sets of the examples; NaN where there are none"""
    shown: list[Pattern]
    """the few that say most, no two of the same sets"""


def transferred(found: Sequence[Interactions], places: Places) -> Transferred:
    """What comes again in at least two of some examples, of their largest sets of at most three units."""
    seen: dict[Pattern, set[tuple[int, int]]] = defaultdict(set)
    for number, one in enumerate(found):
        for place, each in enumerate(one.sets[:_LARGEST]):
            for pattern in _patterns(one, each, places):
                seen[pattern].add((number, place))
    again = {pattern: sets for pattern, sets in seen.items() if len({example for example, _ in sets}) >= _LEAST}
    strength = _strength(found)
    share = sum(strength[one] for one in set().union(*again.values())) / sum(strength.values()) if found else math.nan
    return Transferred(again, share, _telling(again, strength, places))


def by_order(found: Sequence[Interactions], alone: float = 0.0) -> tuple[float, ...]:
    """Strength as shares of all: with all masked, and that of salient sets of one, two, three and more units; none without strength.

    Examples count by their activation, and `alone` is the activation at those where no masking changes it. Near the threshold of a latent strengths
    are many times the activation and cancel out, so that examples are shared out each by itself.
    """
    total = np.array([alone, 0.0, 0.0, 0.0])
    for one in found:
        own = np.zeros(4)
        own[0] = abs(one.empty)
        for each in one.sets:
            own[min(each.order, 3)] += abs(each.strength)
        total += own / own.sum() * abs(one.whole)
    return tuple((total / total.sum()).tolist()) if total.any() else ()


def _strength(found: Sequence[Interactions]) -> dict[tuple[int, int], float]:
    """The strength of each set, as a share of that of its example, which counts by its activation."""
    return {
        (number, place): abs(each.strength) / sum(abs(other.strength) for other in one.sets) * max(abs(one.whole), 1e-9)
        for number, one in enumerate(found)
        for place, each in enumerate(one.sets)
    }


def _patterns(one: Interactions, each: Interaction, places: Places) -> Iterator[Pattern]:
    """All that can be said of a set of an example."""
    if each.order > _MOST_UNITS:
        return
    last = len(one.tokens) - 1
    own = [(), *((fact,) for fact in places.facts(one.tokens[-1], 0))]
    told = [places.facts(one.tokens[one.units[unit][-1]], last - one.units[unit][-1]) for unit in each.units]
    for members, mine in itertools.product(itertools.product(*told), own):
        if len(set(members)) == len(members):
            yield Pattern(each.kind, each.strength > 0, mine, tuple(sorted(members, key=_furthest)))


def _furthest(member: Member) -> tuple[int, int]:
    return -(member.place or 10**6), member.what


def _telling(
    again: dict[Pattern, set[tuple[int, int]]], strength: dict[tuple[int, int], float], places: Places
) -> list[Pattern]:
    """By how strong their sets are and how much is said of them; of patterns of the same sets the first."""

    def weight(pattern: Pattern) -> float:
        said = [places.particular(member) for member in (*pattern.own, *pattern.members)]
        own = 0 if pattern.own else -1
        return sum(strength[one] for one in again[pattern]) * float(np.mean(said) + own)

    shown: list[Pattern] = []
    covered: set[tuple[int, int]] = set()
    for pattern in sorted(again, key=weight, reverse=True):
        if len(again[pattern] - covered) >= _LEAST:
            shown.append(pattern)
            covered |= again[pattern]
        if len(shown) == _SHOWN:
            break
    return shown


def conjunctions(again: Transferred, most: int = 1000) -> list[Conjunction]:
    """Literals that a rule may be made of: every AND with what is said of the token itself, and every member of an OR; of most examples first."""
    counted: dict[Conjunction, int] = {}
    for pattern, sets in again.patterns.items():
        parts = [pattern.members] if pattern.kind == "and" else [(member,) for member in pattern.members]
        for part in parts:
            literal = (*pattern.own, *part)
            counted[literal] = max(counted.get(literal, 0), len({example for example, _ in sets}))
    return sorted(counted, key=lambda literal: -counted[literal])[:most]

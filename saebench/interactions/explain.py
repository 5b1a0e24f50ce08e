"""From a scalar at a position of a text to its interactions: what is masked, and what all maskings say."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Int

from saebench.interactions.found import Interactions, agreed, curve, likeness, salient
from saebench.interactions.masking import Mask, Masked
from saebench.interactions.mobius import Vector, split
from saebench.interactions.scalars import Scalar
from saebench.models import LanguageModel
from saebench.pieces import show_text
from saebench.runlog import progress

MOST = 12
"""units whose every masking is run"""
_CONSTANT = 1e-5  # of the scalar's size: less is rounding


class Unmoved(ValueError):
    """A scalar that no masking changes, or with nothing before it to mask."""


class Silent(ValueError):
    """A latent that does not fire where it is to be explained."""


def interactions(
    model: LanguageModel,
    ids: Int[np.ndarray, " L"],
    scalar: Scalar,
    mask: Mask,
    other: Mask | None = None,
    *,
    n: int = 10,
    reach: int = 32,
    words: bool = False,
    step: Callable[[int, int], object] | None = None,
) -> Interactions:
    """The AND-OR interactions of the units of a text behind a scalar at its last token.

    That token, the first and special ones are never masked. `step` hears how many of all maskings are done, and may raise to end it
    (default: a bar after a second). Raises ValueError for more than 12 units, a text without one, a latent that does not fire there, and a scalar that no masking changes.
    """
    check_n(n)
    tokens = torch.as_tensor(ids, device=model.device).long()
    units = units_before(model, ids, words)[-reach:]
    if not units:
        raise Unmoved(
            f"there is nothing to mask before token {len(ids) - 1}: the first token, special ones and that one stay; choose a later position"
        )
    chosen = that_matter(Masked(model, tokens, units, scalar, mask), n) if len(units) > n else units
    masks = [one for one in (mask, other) if one is not None]
    total, done = len(masks) * 2 ** len(chosen), 0
    with progress(total, "maskings", unit="", shown=step is None, delay=1.0) as bar:

        def heard(more: int) -> None:
            nonlocal done
            done += more
            bar.update(more)
            if step is not None:
                step(done, total)

        found = [Masked(model, tokens, chosen, scalar, one).every(heard) for one in masks]
    v = found[0]
    _check_values(model, ids, scalar, v, mask)
    splits = [split(each) for each in found]
    sets, agreement, alike = tuple(salient(splits[0])), None, None
    if other is not None:
        sets, agreement = agreed(sets, salient(splits[1]))
        alike = likeness(*splits)
    return Interactions(
        scalar=scalar.name,
        tokens=tuple(map(int, ids)),
        pieces=tuple(show_text([model.pieces[int(token)] for token in ids])),
        units=tuple(map(tuple, chosen)),
        left_out=len(units) - len(chosen),
        way=mask.way,
        other=None if other is None else other.way,
        whole=float(v[-1]),
        empty=float(v[0]),
        sets=sets,
        curve=tuple(curve(splits[0], v).tolist()),
        agreement=agreement,
        likeness=alike,
        gap=splits[0].gap,
        split=splits[0],
        values=v,
    )


def check_n(n: int) -> None:
    """Raises ValueError unless so many units can be masked in every combination."""
    if not 1 <= n <= MOST:
        raise ValueError(
            f"n is {n}, with 2^{n} maskings; expected 1 to {MOST}, which are run exactly: those that matter most are chosen, "
            "of tokens or, with words, of words; or look for ANDs of few units by some maskings (sparse), up to 100 units"
        )


def _check_values(model: LanguageModel, ids: Int[np.ndarray, " L"], scalar: Scalar, v: Vector, mask: Mask) -> None:
    at = f"{scalar.name} at token {len(ids) - 1} ({model.pieces.text(ids[-1:].tolist())!r})"
    if scalar.fires and v[-1] <= 0:
        raise Silent(f"{at} is 0: it does not fire there; choose a position at which it does")
    if np.ptp(v) <= _CONSTANT * np.abs(v).max():
        raise Unmoved(
            f"{at} is {v[-1]:.4g} whatever is masked by {mask.way!r}: it depends on that token or on what lies before the {len(v).bit_length() - 1} "
            "units; mask more of them (n, reach), or mask in another way"
        )


def units_before(model: LanguageModel, ids: Int[np.ndarray, " L"], words: bool) -> list[list[int]]:
    """Positions of each unit before the last token, in order. What belongs to the last token's word is masked with none."""
    pieces = show_text([model.pieces[int(token)] for token in ids])
    special = model.encoder.special
    units: list[list[int]] = []
    for place, token in enumerate(ids.tolist()):
        before = pieces[place - 1]
        goes_on = words and pieces[place][:1].isalnum() and (before[-1:].isalnum() or before == " ")
        if goes_on and units and units[-1][-1] == place - 1:
            units[-1].append(place)
        elif place > 0 and token not in special:
            units.append([place])
    return [unit for unit in units if unit[-1] < len(ids) - 1]


def that_matter(masked: Masked, n: int) -> list[list[int]]:
    """The n units that change the scalar most when masked alone, as members of an AND do, or when present alone, as those of an OR do."""
    count = len(masked.units)
    alone = np.eye(count, dtype=bool)
    rows = np.concatenate([np.ones((1, count), bool), ~alone, np.zeros((1, count), bool), alone])
    without, only = masked.values(rows).reshape(2, count + 1)
    matter = np.maximum(np.abs(without[1:] - without[0]), np.abs(only[1:] - only[0]))
    return [masked.units[unit] for unit in sorted(np.argsort(-matter, kind="stable")[:n].tolist())]

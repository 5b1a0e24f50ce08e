"""Interactions of up to a hundred units by some of their maskings: ANDs of few units, found by ProxySPEX (Butler et al. 2025) of shapiq.

Nothing is exact here: how well they say what the scalar does is measured on maskings that they were not found by.
"""

import warnings
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from saebench.interactions.explain import MOST, that_matter, units_before
from saebench.interactions.found import Interaction, Sampled, counting
from saebench.interactions.masking import Mask, Masked
from saebench.interactions.scalars import Scalar
from saebench.models import LanguageModel
from saebench.pieces import show_text
from saebench.runlog import progress

MOST_SPARSE = 100
"""units of which some maskings are run"""
LEAST_MASKINGS = 100
"""fewer say nothing of so many units"""
_HELD_OUT = 0.2  # of the maskings
_TOGETHER = 64  # maskings between two reports


def check_sparse(n: int, maskings: int, order: int) -> None:
    """Raises ValueError unless ANDs of up to `order` of n units can be looked for by so many maskings, with shapiq at hand."""
    if not MOST < n <= MOST_SPARSE:
        raise ValueError(
            f"n is {n}; expected {MOST + 1} to {MOST_SPARSE} with sparse: up to {MOST} every masking is run"
        )
    if maskings < LEAST_MASKINGS:
        raise ValueError(f"maskings is {maskings}; expected {LEAST_MASKINGS} or more")
    if not 1 <= order <= 5:
        raise ValueError(f"order is {order}; expected 1 to 5, units of an AND at most")
    try:
        import lightgbm  # noqa: F401  # pyright: ignore[reportMissingImports]
        import shapiq  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            "interactions of many units are found with shapiq and lightgbm: pip install 'saebench[interactions]'"
        ) from error


def sparse_interactions(
    model: LanguageModel,
    ids: Int[np.ndarray, " L"],
    scalar: Scalar,
    mask: Mask,
    *,
    n: int = 60,
    reach: int = 100,
    words: bool = False,
    maskings: int = 1024,
    order: int = 3,
    step: Callable[[int, int], object] | None = None,
) -> Sampled:
    """ANDs of at most `order` of up to n units of a text behind a scalar at its last token, by so many maskings, half of the units in each.

    A fifth of them is held out. `step` is as of `interactions`. Raises ValueError as `check_sparse` does, for a text with so few units that
    all maskings can be run, a latent that does not fire there, and a scalar that is the same in all of them.
    """
    check_sparse(n, maskings, order)
    tokens = torch.as_tensor(ids, device=model.device).long()
    units = units_before(model, ids, words)[-reach:]
    if len(units) <= MOST:
        raise ValueError(
            f"there are {len(units)} units before token {len(ids) - 1}, of which every masking can be run; leave out sparse"
        )
    chosen = that_matter(Masked(model, tokens, units, scalar, mask), n) if len(units) > n else units
    masked, count = Masked(model, tokens, chosen, scalar, mask), len(chosen)
    empty, whole = masked.values(np.repeat([[False], [True]], count, 1)).tolist()
    if scalar.fires and whole <= 0:
        raise ValueError(
            f"{scalar.name} at token {len(ids) - 1} is 0: it does not fire there; choose a position at which it does"
        )
    held = np.random.default_rng(0).random((int(maskings * _HELD_OUT), count)) < 0.5
    done, total = 0, maskings
    with progress(total, "maskings", unit="", shown=step is None, delay=1.0) as bar:

        def values(present_Bn: Bool[np.ndarray, "B n"]) -> Float[np.ndarray, " B"]:
            nonlocal done
            found = []
            for start in range(0, len(present_Bn), _TOGETHER):
                found.append(masked.values(present_Bn[start : start + _TOGETHER]))
                done += len(found[-1])
                bar.update(len(found[-1]))
                if step is not None:
                    step(done, total)
            return np.concatenate(found)

        v = values(held)
        if not v.std() > 1e-5 * max(abs(whole), float(np.abs(v).max())):
            raise ValueError(
                f"{scalar.name} at token {len(ids) - 1} is the same in {len(v)} maskings of {count} units by {mask.way!r}: "
                "mask fewer of them (n), or mask in another way"
            )
        strengths = _proxyspex(values, count, maskings - len(held), order)
    rebuilt = sum(x * held[:, list(members)].all(1) for members, x in strengths.items())
    sets = [Interaction("and", members, x) for members, x in strengths.items() if members]
    return Sampled(
        scalar=scalar.name,
        tokens=tuple(map(int, ids)),
        pieces=tuple(show_text([model.pieces[int(token)] for token in ids])),
        units=tuple(map(tuple, chosen)),
        left_out=len(units) - count,
        way=mask.way,
        whole=whole,
        empty=empty,
        sets=tuple(counting(sorted(sets, key=lambda one: -one.size))),
        maskings=maskings,
        held_out=float(1 - ((v - rebuilt) ** 2).mean() / v.var()),
        held=len(held),
    )


def _proxyspex(
    values: Callable[[Bool[np.ndarray, "B n"]], Float[np.ndarray, " B"]], n: int, budget: int, order: int
) -> dict[tuple[int, ...], float]:
    """Strength by set, and of the empty one the constant: the sum of ANDs up to an order that is nearest over all maskings."""
    from shapiq import ProxySPEX  # pyright: ignore[reportMissingImports]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that columns do not have
        found = ProxySPEX(n=n, index="FBII", max_order=order, random_state=0).approximate(budget, values)
    return {tuple(map(int, members)): float(found.values[place]) for members, place in found.interaction_lookup.items()}

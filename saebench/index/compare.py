"""Compare two SAEs of one hook: which latents of one the other has too, has split, or lacks.

Legend: F latents of one SAE, G of the other, D d_in.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saebench.index.derive import affordable, at, first_of_each, together
from saebench.index.reader import FeatureIndex
from saebench.metrics import assignment
from saebench.sae import SAE

SAME = 0.7  # cosine of decoder rows from which two latents that are each other's nearest are one
NEAR = 0.5  # below it a latent has no counterpart, above it a latent of the other SAE may be part of it
KINDS = ("dead", "matched", "split", "related", "alone")
_VALUES = 2**22
_CELLS = 2**28


class Side(NamedTuple):
    """What one SAE's latents find in the other. Dead latents on either side find nothing and are not found."""

    kinds: np.ndarray
    """`[F]` places in KINDS: matched (each other's nearest, at SAME or more, and neither is split; as many on either side),
    split (nearest to two or more latents of the other, at NEAR or more), alone (no latent of the other at NEAR or more: missing there, or new here), related (the rest)"""
    nearest: np.ndarray
    """`[F]` the other's latent whose decoder row is nearest"""
    cosines: np.ndarray
    """`[F]` its cosine"""
    partners: np.ndarray
    """`[F]` the other's latent that fires on the same rows most, by Jaccard index; -1 where none does"""
    jaccard: np.ndarray
    """`[F]` its Jaccard index, on rows that both indexes sampled"""


def compare(left: FeatureIndex, left_sae: SAE, right: FeatureIndex, right_sae: SAE) -> tuple[Side, Side]:
    """(what `left` finds in `right`, what `right` finds in `left`).

    Raises ValueError when the two were not indexed on the same rows of the same hook.
    """
    for what, mine, theirs in (
        ("hook", left.ends, right.ends),
        ("store", left.identity["store"], right.identity["store"]),
    ):
        if mine != theirs:
            raise ValueError(f"{left.path} and {right.path} differ in {what}: {mine} and {theirs}; index both on one")
    if not left.complete or not right.complete:
        raise ValueError(
            f"{right.path if left.complete else left.path} is not complete; finish it with `saebench index`"
        )
    alive = ~left.flagged("dead"), ~right.flagged("dead")
    there, back = _nearest(left_sae, right_sae, *alive), _nearest(right_sae, left_sae, *alive[::-1])
    by_rows = _partners(left, right)
    return (
        Side(_kinds(*there, *back, alive[0]), *there, *by_rows[0]),
        Side(_kinds(*back, *there, alive[1]), *back, *by_rows[1]),
    )


class Matching(NamedTuple):
    """Living latents of two SAEs in pairs, one to one; P of them, as many as the smaller of the two has."""

    left: np.ndarray
    """`[P]` ids"""
    right: np.ndarray
    """`[P]` ids of those that they are matched with"""
    cosines: np.ndarray
    """`[P]` of what the two write; their mean is PW-MCC"""
    best: np.ndarray
    """each latent's largest cosine with any of the other SAE: of both, or of a sample's"""
    sampled: bool
    """whether the left latents are a sample, and those of the right all that there are"""


def one_to_one(
    left_FD: Float[Tensor, "F D"],
    right_GD: Float[Tensor, "G D"],
    alive_F: Bool[np.ndarray, " F"] | None = None,
    alive_G: Bool[np.ndarray, " G"] | None = None,
    seed: int = 0,
) -> Matching:
    """The matching of decoder rows with the largest sum of signed cosines, dead latents left out.

    Of more than 2^28 cosines (16,384 latents each) as many of the left latents as leave no more, by chance, are matched with all
    of the right ones: fewer compete for each, so that the mean comes out somewhat high.
    Raises ValueError where nothing of one is alive.
    """
    left, right = (
        np.arange(len(rows)) if alive is None else np.flatnonzero(alive)
        for rows, alive in ((left_FD, alive_F), (right_GD, alive_G))
    )
    if not len(left) or not len(right):
        raise ValueError(f"{len(left)} and {len(right)} latents are alive; expected some of each to be matched")
    if sampled := len(left) * len(right) > _CELLS:
        left = np.sort(np.random.default_rng(seed).choice(left, max(1, _CELLS // len(right)), replace=False))
    normalize = torch.nn.functional.normalize
    cosine_FG = normalize(left_FD.detach()[left], dim=1) @ normalize(right_GD.detach()[right], dim=1).T
    rows, columns = assignment(cosine_FG)
    best = cosine_FG.amax(1) if sampled else torch.cat([cosine_FG.amax(1), cosine_FG.amax(0)])
    return Matching(
        left[rows.cpu().numpy()],
        right[columns.cpu().numpy()],
        cosine_FG[rows, columns].double().cpu().numpy(),
        best.double().cpu().numpy(),
        sampled,
    )


def _nearest(left: SAE, right: SAE, alive_F: np.ndarray, alive_G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ids, cosines) `[F]` of the nearest living decoder rows of `right`."""
    left_FD, right_GD = (torch.nn.functional.normalize(sae.W_dec.detach(), dim=1) for sae in (left, right))
    step = max(1, _VALUES // right.d_sae)
    ids, cosines = [], []
    for block_BD in left_FD.split(step):
        cosine_BG = block_BD @ right_GD.T
        cosine_BG[:, torch.from_numpy(~alive_G)] = -1.0
        best = cosine_BG.max(1)
        ids.append(best.indices)
        cosines.append(best.values)
    return torch.cat(ids).cpu().numpy(), np.where(alive_F, torch.cat(cosines).cpu().numpy(), 0.0)


def _kinds(
    nearest: np.ndarray, cosines: np.ndarray, back: np.ndarray, back_cosines: np.ndarray, alive: np.ndarray
) -> np.ndarray:
    mutual = (back[nearest] == np.arange(len(nearest))) & (cosines >= SAME)
    split = np.bincount(back[back_cosines >= NEAR], minlength=len(nearest)) >= 2
    other_split = np.bincount(nearest[cosines >= NEAR], minlength=len(back)) >= 2
    conditions = [~alive, mutual & ~split & ~other_split[nearest], split, cosines < NEAR]
    return np.select(
        conditions, [KINDS.index(kind) for kind in ("dead", "matched", "split", "alone")], KINDS.index("related")
    )


def _partners(left: FeatureIndex, right: FeatureIndex) -> list[tuple[np.ndarray, np.ndarray]]:
    """For either side (ids, Jaccard indexes) of the latents that fire together most."""
    samples = [index.sample("train") for index in (left, right)]
    common = np.intersect1d(samples[0].rows, samples[1].rows)
    first, second = (part.take(np.isin(part.rows, common)) for part in samples)
    both_few = np.intersect1d(affordable(first).rows, affordable(second).rows)
    first, second = (part.take(np.isin(part.rows, both_few)) for part in (first, second))
    found = []
    for mine, theirs, n_mine, n_theirs in (
        (first, second, left.d_sae, right.d_sae),
        (second, first, right.d_sae, left.d_sae),
    ):
        fires, other_fires = (
            np.bincount(mine.latents, minlength=n_mine),
            np.bincount(theirs.latents, minlength=n_theirs),
        )
        ids, values = [], []
        for start, n_block, cells, both in together(mine, theirs, n_mine, n_theirs):
            i, j = cells // n_theirs, cells % n_theirs
            jaccard = both / (fires[i + start] + other_fires[j] - both)
            best, there = first_of_each(i, -jaccard, n_block, 1)
            ids.append(np.where(there, at(j, best), -1)[:, 0])
            values.append(np.where(there, at(jaccard, best), 0.0)[:, 0])
        found.append((np.concatenate(ids), np.concatenate(values)))
    return found

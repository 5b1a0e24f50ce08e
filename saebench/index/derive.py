"""From evidence to what is shown: ten intervals of strength, tokens, companions, flags.

Legend: F latents, P buckets of positions, R sampled rows, M firings on them.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from einops import rearrange
from scipy import sparse

from saebench.index.evidence import (
    N_BINS,
    PER_BIN,
    Evidence,
    Sample,
    bin_edges,
    hashed,
    rows_of,
    rows_of_top,
    values_of_top,
)
from saebench.index.memory import give_back
from saebench.runlog import progress

INTERVALS = 10
TOKENS = 50
COMPANIONS = 20
MIN_TOGETHER = 5  # sampled rows on which two latents fire for PMI to be given
MAX_PAIRS = 10**9  # firings of two latents on one row that are counted; rows beyond are left out
DENSE = 0.1
SHARE = 0.9  # of firings on one token, or in a twentieth of the positions, for a flag
MIN_FIRINGS = 20  # in the sample, for those flags
_CELLS = 2**18  # pairs of latents held at once
_PARTS = 16  # of the latents, whose tokens are counted at once
FLAGS = ("dead", "dense", "single_token", "position_bound")


def derive(evidence: Evidence, sample: Sample, tokens: np.ndarray, scale: float) -> dict[str, dict[str, np.ndarray]]:
    """The columns that come from the rows, by group and name, but for companions.

    `tokens` `[R]` are those of the sampled rows.
    """
    d_sae, n_rows, fires = len(evidence.counts), int(evidence.position_rows.sum()), evidence.fires
    in_sample = sample.fires(d_sae)
    by_token = token_counts(sample.latents, np.repeat(tokens, np.diff(sample.offsets)), d_sae)
    first, second = evidence.moments(scale) / np.maximum(fires, 1)
    strongest = values_of_top(evidence.top)
    groups = {
        "latents": {
            "fires": fires,
            "density": fires / max(n_rows, 1),
            "mean": first,
            "std": np.sqrt(np.maximum(second - first**2, 0)),
            "max": strongest[:, 0],
            "massive": evidence.massive,
            "in_sample": in_sample,
            "flags": flags(fires, by_token["counts"], in_sample, evidence.positions, evidence.position_rows),
        },
        "top": {"rows": rows_of_top(evidence.top), "values": strongest},
        "intervals": intervals(evidence, scale),
        "random": {"rows": rows_of(evidence.random), "values": evidence.random_values},
        "histogram": {"counts": evidence.counts},
        "positions": {"counts": evidence.positions, "rows": evidence.position_rows},
        "tokens": by_token,
    }
    give_back()
    return groups


def intervals(evidence: Evidence, scale: float) -> dict[str, np.ndarray]:
    """Firings of each latent in up to ten equal intervals of log strength, the last of which ends at its maximum.

    `edges [F, 11]`, `counts [F, 10]`, and `rows`, `values [F, 10, 5]` of examples, -1 where there are fewer.
    A latent that fires in fewer than ten quarter octaves has as many intervals.
    """
    d_sae = len(evidence.counts)
    fires = evidence.counts > 0
    lowest = fires.argmax(1)
    n_bins = np.where(fires.any(1), N_BINS - fires[:, ::-1].argmax(1) - lowest, 0)
    n_intervals = np.minimum(n_bins, INTERVALS)
    offset = np.arange(N_BINS) - lowest[:, None]
    interval = offset * n_intervals[:, None] // np.maximum(n_bins, 1)[:, None]
    interval = np.where((offset >= 0) & (offset < n_bins[:, None]), interval, INTERVALS)  # the last is nowhere
    cells = np.arange(d_sae)[:, None] * (INTERVALS + 1) + interval
    counts = np.bincount(cells.ravel(), evidence.counts.ravel(), d_sae * (INTERVALS + 1)).astype(np.int64)
    # An interval begins at the first bin that is mapped to it.
    starts = -(-np.arange(INTERVALS + 1) * n_bins[:, None] // np.maximum(n_intervals, 1)[:, None])
    edges = bin_edges(scale)[np.minimum(lowest[:, None] + np.minimum(starts, n_bins[:, None]), N_BINS)]
    edges = np.minimum(edges, values_of_top(evidence.top)[:, :1])
    rows = np.full((d_sae, INTERVALS, PER_BIN), -1)
    values = np.zeros((d_sae, INTERVALS, PER_BIN), np.float32)
    step = 4096
    for first in range(0, d_sae, step):
        part = slice(first * N_BINS, (first + step) * N_BINS)
        keys, strengths = evidence.strata[part].ravel(), evidence.strata_values[part].ravel()
        cell = np.repeat((cells[first : first + step] - first * (INTERVALS + 1)).ravel(), PER_BIN)
        order = np.lexsort((keys, cell))
        same = (np.diff(cell[order]) == 0) & (np.diff(keys[order] >> 32) == 0) & (rows_of(keys[order[1:]]) >= 0)
        order = np.delete(order, np.flatnonzero(same) + 1)  # a passage that lies in two of the interval's bins
        n_cells = len(interval[first : first + step]) * (INTERVALS + 1)
        bounds = np.searchsorted(cell[order], np.arange(n_cells + 1))
        place = bounds[:-1, None] + np.arange(PER_BIN)
        place = rearrange(place, "(f i) n -> f i n", i=INTERVALS + 1)[:, :-1]
        there = place < rearrange(bounds[1:], "(f i) -> f i 1", i=INTERVALS + 1)[:, :-1]
        chosen = order[np.minimum(place, len(order) - 1)]
        rows[first : first + step] = np.where(there, rows_of(keys[chosen]), -1)
        values[first : first + step] = np.where(rows[first : first + step] >= 0, strengths[chosen], 0.0)
    return {
        "edges": edges,
        "counts": rearrange(counts, "(f i) -> f i", f=d_sae)[:, :INTERVALS],
        "rows": rows,
        "values": values,
    }


def token_counts(latents: np.ndarray, tokens: np.ndarray, d_sae: int) -> dict[str, np.ndarray]:
    """The tokens that each latent fires on most: `ids`, `counts [F, 50]`, -1 and 0 where there are fewer.

    `latents` and `tokens` `[M]` are those of each firing. Among equals the lower id comes first.
    """
    n_vocab = int(tokens.max(initial=0)) + 1
    step = -(-d_sae // _PARTS)
    ids, counts = [], []
    for first in range(0, d_sae, step):
        inside = (latents >= first) & (latents < first + step)
        cells, times = np.unique(
            (latents[inside].astype(np.int64) - first) * n_vocab + tokens[inside], return_counts=True
        )
        best, there = first_of_each(cells // n_vocab, -times, min(step, d_sae - first), TOKENS)
        ids.append(np.where(there, at(cells % n_vocab, best), -1).astype(np.int32))
        counts.append(np.where(there, at(times, best), 0))
    return {"ids": np.concatenate(ids), "counts": np.concatenate(counts)}


def companions(sample: Sample, d_sae: int) -> dict[str, np.ndarray]:
    """The latents that fire together with each, by pointwise mutual information and by Jaccard index.

    PMI is log(R n_ij / (n_i n_j)), given where n_ij is at least 5; Jaccard n_ij / (n_i + n_j - n_ij).
    Returns for both ids `[F, 20]` (-1 where there are fewer) and values, and the number of `rows` counted.
    """
    sample = affordable(sample)
    fires = sample.fires(d_sae)
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("pmi_ids", "pmi", "jaccard_ids", "jaccard")}
    bar = progress(d_sae, "companions", "latent", delay=1.0)
    for first, n_block, cells, both in together(sample, sample, d_sae, d_sae):
        bar.update(n_block)
        i, j = cells // d_sae, cells % d_sae
        pmi = np.log(len(sample.rows) * both / (fires[i + first] * fires[j]))
        jaccard = both / (fires[i + first] + fires[j] - both)
        for name, score, given in (("pmi", pmi, both >= MIN_TOGETHER), ("jaccard", jaccard, both > 0)):
            given &= i + first != j
            best, there = first_of_each(i[given], -score[given], n_block, COMPANIONS)
            found[f"{name}_ids"].append(np.where(there, at(j[given], best), -1).astype(np.int32))
            found[name].append(np.where(there, at(score[given], best), 0).astype(np.float32))
    bar.close()
    return {name: np.concatenate(parts) for name, parts in found.items()} | {"rows": np.array(len(sample.rows))}


def affordable(sample: Sample) -> Sample:
    """Those rows of lowest hash whose pairs of firings are not too many to count."""
    order = np.argsort(hashed(sample.rows))
    pairs = np.diff(sample.offsets)[order] ** 2
    chosen = np.zeros(len(order), bool)
    chosen[order[: np.searchsorted(pairs.cumsum(), MAX_PAIRS, "right")]] = True
    return sample.take(chosen)


def together(
    left: Sample, right: Sample, d_left: int, d_right: int
) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """How often latents of `left` and of `right`, samples of the same rows, fire on one row.

    For each block of latents of `left`: (first, how many, cells `i * d_right + j` that occur, how often).
    """
    assert np.array_equal(left.rows, right.rows)
    by_latent, by_row = firing(left, d_left).tocsc().T, firing(right, d_right, np.int32)
    step = max(1, _CELLS // d_right)
    for first in range(0, d_left, step):
        block = by_latent[first : first + step]
        counts = block @ by_row
        counts.sort_indices()
        rows = np.repeat(np.arange(block.shape[0]), np.diff(counts.indptr))
        yield first, block.shape[0], rows * d_right + counts.indices, counts.data.astype(np.int64)


def firing(sample: Sample, d_sae: int, dtype: type = np.int8) -> Any:
    """Which latents fire on which rows: ones in a CSR matrix `[R, F]`."""
    shape = (len(sample.rows), d_sae)
    return sparse.csr_array((np.ones(len(sample.latents), dtype), sample.latents, sample.offsets), shape=shape)


def flags(
    fires: np.ndarray, tokens: np.ndarray, in_sample: np.ndarray, positions: np.ndarray, by_position: np.ndarray
) -> np.ndarray:
    """Bits of FLAGS for each latent, `[F]` uint8.

    `tokens` `[F, 50]` counts by token among `in_sample` `[F]` firings; `positions` `[F, P]` firings and
    `by_position` `[P]` rows by position. Position-bound: nine tenths of the firings in buckets, the best
    first, that hold at most a twentieth of the rows.
    """
    n_rows = int(by_position.sum())
    density = positions / np.maximum(by_position, 1)
    order = np.argsort(-density, axis=1, kind="stable")
    rows = np.cumsum(by_position[order], 1) / max(n_rows, 1)
    share = np.cumsum(np.take_along_axis(positions, order, 1), 1) / np.maximum(fires, 1)[:, None]
    bound = ((rows <= 0.05) & (share >= SHARE)).any(1) & (fires >= MIN_FIRINGS)
    single = (tokens[:, 0] >= SHARE * in_sample) & (in_sample >= MIN_FIRINGS)
    columns = (fires == 0, fires > DENSE * n_rows, single, bound)
    return np.bitwise_or.reduce([column.astype(np.uint8) << bit for bit, column in enumerate(columns)])


def first_of_each(groups: np.ndarray, order_by: np.ndarray, n_groups: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Places `[n_groups, size]` of the smallest of each group, and which of them there are; ties as they come."""
    order = np.lexsort((order_by, groups))
    bounds = np.searchsorted(groups[order], np.arange(n_groups + 1))
    place = bounds[:-1, None] + np.arange(size)
    there = place < bounds[1:, None]
    return at(order, place), there


def at(values: np.ndarray, place: np.ndarray) -> np.ndarray:
    """`values[place]`, anything where there is no such place."""
    return values[np.minimum(place, len(values) - 1)] if len(values) else np.zeros(place.shape, values.dtype)

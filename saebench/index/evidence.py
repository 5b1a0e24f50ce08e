"""What one pass over a store gathers of each latent: sums, extremes and samples.

A unit is a fixed stretch of whole contexts. Its `Summary` depends on the unit alone, and adding
summaries commutes exactly: counts and fixed-point sums are integers, extremes and samples are the
largest values and the smallest hashes. So neither the order of units nor the number of workers shows
in the result. Legend: F latents, N firings in a unit, S contexts in a unit.

Firings in order of strength and samples in order of hash are both kept as sorted int64 keys: the
high half decides (bits of the activation, which for positive floats sort as the numbers do; or the
hash), the low half is the row. A passage that is repeated counts once in a list of examples, in whatever
document: firings whose last few tokens are the same have the same `text`, of which the hash is made, too.
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

TOP = 20  # strongest firings, one of each context
PER_BIN = 5  # samples of each bin of strength
RANDOM = 10  # samples of all firings
PASSAGE = 8  # tokens, up to the one that a latent fires on, by which a passage is known again
OCTAVES = (-10, 6)  # of strength, relative to `scale`; what lies outside counts in the first or last bin
BINS_PER_OCTAVE = 4
N_BINS = (OCTAVES[1] - OCTAVES[0]) * BINS_PER_OCTAVE
MAX_ROWS = 2**32
_FIXED = (2.0**20, 2.0**28)  # steps in `scale` and in `scale`², in which Σ and Σ² are counted
_ENTRIES = 2**18  # of a sample, turned into wider numbers at once
_NOTHING = np.int64(2**63 - 1)  # a sample's place not yet taken


class Unit(NamedTuple):
    """The firings of whole contexts, special tokens and massive rows left out."""

    first_row: int  # in the store
    n_rows: int
    context: int
    rows: np.ndarray  # [N] within the unit, ascending
    latents: np.ndarray  # [N]
    values: np.ndarray  # [N] float32, positive
    keep: np.ndarray  # [n_rows] neither a special token nor massive
    positions: np.ndarray  # [n_rows] within the context
    texts: np.ndarray  # [n_rows] hash of the last tokens (`passages`)
    massive: np.ndarray  # [M] latents of the firings on massive rows


class Summary(NamedTuple):
    """What `Evidence.add` takes of a unit; F latents, samples not yet compared with those of other units."""

    counts: np.ndarray  # [F, N_BINS]
    sums: np.ndarray  # [F, 2] in fixed point
    positions: np.ndarray  # [F, P]
    position_rows: np.ndarray  # [P]
    top_cells: np.ndarray  # latent of each context's strongest firing of it
    top_keys: np.ndarray
    top_texts: np.ndarray
    massive: np.ndarray  # [F] firings on massive rows
    cells: np.ndarray  # [N] latent * N_BINS + bin
    keys: np.ndarray  # [N] hash and row
    values: np.ndarray  # [N]


class Sample(NamedTuple):
    """All that fires on rows chosen by their hash: row i has entries `offsets[i]` to `offsets[i + 1]`."""

    rows: np.ndarray  # [R] ascending
    offsets: np.ndarray  # [R + 1]
    latents: np.ndarray  # [M], of the smallest unsigned type that holds them
    values: np.ndarray  # [M]

    def fires(self, d_sae: int) -> np.ndarray:
        """`[F]` rows of the sample on which each latent fires."""
        counts = np.zeros(d_sae, np.int64)
        for start in range(0, len(self.latents), _ENTRIES):  # bincount makes int64 of what it is given
            counts += np.bincount(self.latents[start : start + _ENTRIES], minlength=d_sae)
        return counts

    def take(self, chosen: np.ndarray) -> "Sample":
        """The rows that a mask `[R]` names."""
        if chosen.all():
            return self
        counts = np.diff(self.offsets)[chosen]
        entries = np.repeat(chosen, np.diff(self.offsets))
        return Sample(self.rows[chosen], _offsets(counts), self.latents[entries], self.values[entries])

    def stretch(self, first: int, stop: int) -> "Sample":
        """Rows number `first` to `stop` of the sample, their entries not copied."""
        offsets = self.offsets[first : stop + 1]
        entries = slice(offsets[0], offsets[-1])
        return Sample(self.rows[first:stop], offsets - offsets[0], self.latents[entries], self.values[entries])

    @classmethod
    def joined(cls, parts: "list[Sample]") -> "Sample":
        """One sample of parts, whatever their order; one of them, joined earlier, may lie on both sides of others."""
        if len(parts) == 1:
            return parts[0]
        begins = sorted(part.rows[0] for part in parts if len(part.rows))
        cuts = [np.unique([0, *np.searchsorted(part.rows, begins), len(part.rows)]) for part in parts]
        parts = [
            part.stretch(a, b) for part, at in zip(parts, cuts, strict=True) for a, b in itertools.pairwise(at.tolist())
        ]
        parts.sort(key=lambda part: part.rows[0])
        if not parts:
            return cls(np.zeros(0, np.int64), np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
        counts = np.concatenate([np.diff(part.offsets) for part in parts])
        columns = [np.concatenate([getattr(part, name) for part in parts]) for name in ("rows", "latents", "values")]
        return cls(columns[0], _offsets(counts), columns[1], columns[2])


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), counts.cumsum()])


def bins_of(values: np.ndarray, scale: float) -> np.ndarray:
    """The bin of strength of each activation: quarter octaves of value / scale."""
    octave = np.log2(values / np.float32(scale)) - OCTAVES[0]
    return np.clip(np.floor(octave * BINS_PER_OCTAVE), 0, N_BINS - 1).astype(np.int64)


def bin_edges(scale: float) -> np.ndarray:
    """`[N_BINS + 1]` activations between which the bins lie, from 0 to infinity."""
    return np.array([0.0, *(scale * 2.0 ** np.linspace(*OCTAVES, N_BINS + 1)[1:-1]), np.inf])


def hashed(rows: np.ndarray, salt: int | np.ndarray = 0) -> np.ndarray:
    """uint64 that looks random in every bit (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = rows.astype(np.uint64) + np.asarray(salt, np.uint64) * np.uint64(0xD1B54A32D192ED03)
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def position_edges(context: int) -> np.ndarray:
    """First positions of the buckets 1, 2, 3, 4, 6, 8, 12, …: two to the octave."""
    edges = [0, 1, 2, 3]
    while 2 * edges[-2] < context:
        edges.append(2 * edges[-2])
    return np.array([edge for edge in edges if edge < context])


def passages(tokens: np.ndarray, positions: np.ndarray, docs: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """A hash of the last PASSAGE tokens at each of some rows in a row, uint32.

    None reaches beyond the first of its context or document, or a special token: what stands before is of another text.
    """
    total, within = np.zeros(len(tokens), np.uint64), np.ones(len(tokens), bool)
    for back in range(PASSAGE):
        if back:
            within &= (positions >= back) & (docs == np.roll(docs, back)) & np.roll(keep, back)
        total += np.where(within, hashed(np.roll(tokens, back), back + 1), np.uint64(0))
    return (total >> np.uint64(32)).astype(np.uint32)


def _sample_keys(rows: np.ndarray, texts: np.ndarray, latents: np.ndarray) -> np.ndarray:
    """31 bits of the text's hash over 32 bits of row, another draw for each latent."""
    high = hashed(texts, latents + 1) >> np.uint64(33)
    return ((high << np.uint64(32)) | rows.astype(np.uint64)).astype(np.int64)


def rows_of(keys: np.ndarray) -> np.ndarray:
    """Rows of sample keys; -1 where there is none."""
    return np.where(keys == _NOTHING, -1, keys & 0xFFFFFFFF)


def rows_of_top(keys: np.ndarray) -> np.ndarray:
    """Rows of strength keys, in which lower rows sort higher; -1 where there is none."""
    return np.where(keys == 0, -1, 0xFFFFFFFF - (keys & 0xFFFFFFFF))


def values_of_top(keys: np.ndarray) -> np.ndarray:
    return (keys >> 32).astype(np.int32).view(np.float32)


def sample(unit: Unit, below: int) -> Sample:
    """The rows of a unit whose hash is under `below`."""
    rows = np.arange(unit.first_row, unit.first_row + unit.n_rows)
    all_rows = Sample(rows, _offsets(np.bincount(unit.rows, minlength=unit.n_rows)), unit.latents, unit.values)
    return all_rows.take((hashed(rows) < np.uint64(below)) & unit.keep)


def summarise(unit: Unit, d_sae: int, scale: float) -> Summary:
    """Reduce a unit to what is added up."""
    latents = unit.latents.astype(np.int64)
    rows = unit.rows.astype(np.int64) + unit.first_row
    cells = latents * N_BINS + bins_of(unit.values, scale)
    strength = (unit.values.view(np.int32).astype(np.int64) << 32) | (0xFFFFFFFF - rows)
    strongest = np.zeros(unit.n_rows // unit.context * d_sae, np.int64)
    np.maximum.at(strongest, unit.rows // unit.context * d_sae + latents, strength)
    fired = np.flatnonzero(strongest)

    edges = position_edges(unit.context)
    bucket = np.searchsorted(edges, unit.positions, "right") - 1
    sums = [
        np.bincount(latents, unit.values.astype(np.float64) ** power, d_sae) * (step / scale**power)
        for power, step in enumerate(_FIXED, 1)
    ]
    return Summary(
        counts=np.bincount(cells, minlength=d_sae * N_BINS).reshape(d_sae, N_BINS),
        sums=np.rint(np.stack(sums, 1)).astype(np.int64),
        positions=np.bincount(latents * len(edges) + bucket[unit.rows], minlength=d_sae * len(edges)).reshape(
            d_sae, -1
        ),
        position_rows=np.bincount(bucket[unit.keep], minlength=len(edges)),
        top_cells=fired % d_sae,
        top_keys=strongest[fired],
        top_texts=unit.texts[rows_of_top(strongest[fired]) - unit.first_row],
        massive=np.bincount(unit.massive, minlength=d_sae),
        cells=cells,
        keys=_sample_keys(rows, unit.texts[unit.rows], latents),
        values=unit.values,
    )


@dataclass
class Evidence:
    """Running totals over units."""

    counts: np.ndarray  # [F, N_BINS] firings by strength
    sums: np.ndarray  # [F, 2] Σ and Σ² in fixed point
    positions: np.ndarray  # [F, P] firings by position
    position_rows: np.ndarray  # [P] rows by position
    massive: np.ndarray  # [F] firings on massive rows, which count in nothing else
    top: np.ndarray  # [F, TOP] strength keys, descending; 0 where there is none
    top_texts: np.ndarray  # [F, TOP]
    strata: np.ndarray  # [F * N_BINS, PER_BIN] sample keys, ascending
    strata_values: np.ndarray
    random: np.ndarray  # [F, RANDOM]
    random_values: np.ndarray

    @classmethod
    def empty(cls, d_sae: int, context: int) -> "Evidence":
        n_positions = len(position_edges(context))
        return cls(
            counts=np.zeros((d_sae, N_BINS), np.int64),
            sums=np.zeros((d_sae, 2), np.int64),
            positions=np.zeros((d_sae, n_positions), np.int64),
            position_rows=np.zeros(n_positions, np.int64),
            massive=np.zeros(d_sae, np.int64),
            top=np.zeros((d_sae, TOP), np.int64),
            top_texts=np.zeros((d_sae, TOP), np.uint32),
            strata=np.full((d_sae * N_BINS, PER_BIN), _NOTHING),
            strata_values=np.zeros((d_sae * N_BINS, PER_BIN), np.float32),
            random=np.full((d_sae, RANDOM), _NOTHING),
            random_values=np.zeros((d_sae, RANDOM), np.float32),
        )

    def add(self, unit: Summary) -> None:
        self.counts += unit.counts
        self.sums += unit.sums
        self.positions += unit.positions
        self.position_rows += unit.position_rows
        self.massive += unit.massive
        stronger = unit.top_keys > self.top[unit.top_cells, -1]
        _merge_top(
            self.top, self.top_texts, unit.top_cells[stronger], unit.top_keys[stronger], unit.top_texts[stronger]
        )
        _keep_smallest(self.strata, self.strata_values, unit.cells, unit.keys, unit.values)
        _keep_smallest(self.random, self.random_values, unit.cells // N_BINS, unit.keys, unit.values)

    @property
    def fires(self) -> np.ndarray:
        """`[F]` rows on which each latent fires."""
        return self.counts.sum(1)

    def moments(self, scale: float) -> np.ndarray:
        """Σ and Σ² of each latent's activations, `[2, F]` float64."""
        return (self.sums / np.array(_FIXED) * np.array([scale, scale**2])).T


def _keep_smallest(
    kept: np.ndarray, kept_values: np.ndarray, cells: np.ndarray, keys: np.ndarray, values: np.ndarray
) -> None:
    """Merge sample keys into the sorted rows `[cell, size]` of `kept`, with their values; of one text the lowest row."""
    smaller = keys < kept[cells, -1]
    cells, keys, values = cells[smaller], keys[smaller], values[smaller]
    touched, cells = _with_kept(kept, cells)
    keys = np.concatenate([kept[touched].ravel(), keys])
    order = np.lexsort((keys, cells))
    place = _first_of_each(
        order[~_again(cells[order], keys[order] >> 32, keys[order] == _NOTHING)], cells, kept, touched
    )
    kept[touched] = keys[place]
    kept_values[touched] = np.concatenate([kept_values[touched].ravel(), values])[place]


def _merge_top(
    kept: np.ndarray, kept_texts: np.ndarray, cells: np.ndarray, keys: np.ndarray, texts: np.ndarray
) -> None:
    """Merge strength keys into the sorted rows `[cell, size]` of `kept`, with their texts; of one text the strongest."""
    touched, cells = _with_kept(kept, cells)
    keys = np.concatenate([kept[touched].ravel(), keys])
    texts = np.concatenate([kept_texts[touched].ravel(), texts])
    order = np.lexsort((-keys, texts, cells))
    order = order[~_again(cells[order], texts[order], keys[order] == 0)]
    order = order[np.lexsort((-keys[order], cells[order]))]
    place = _first_of_each(order, cells, kept, touched)
    kept[touched], kept_texts[touched] = keys[place], texts[place]


def _with_kept(kept: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(cells that are to change, the cell of each entry that they have and of each new one)."""
    touched = np.unique(cells)
    return touched, np.concatenate([np.repeat(touched, kept.shape[1]), cells])


def _again(cells: np.ndarray, texts: np.ndarray, nothing: np.ndarray) -> np.ndarray:
    """Which of entries sorted by cell and text are of the same text as the one before."""
    same = (np.diff(cells) == 0) & (np.diff(texts) == 0) & ~nothing[1:]
    return np.concatenate([np.zeros(min(1, len(cells)), bool), same])


def _first_of_each(order: np.ndarray, cells: np.ndarray, kept: np.ndarray, touched: np.ndarray) -> np.ndarray:
    """Of each cell the first entries in an order, as many as it keeps: what it kept were all different, so it has enough."""
    first = np.searchsorted(cells[order], touched)
    return order[first[:, None] + np.arange(kept.shape[1])]

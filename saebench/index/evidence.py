"""What one pass over a store gathers of each latent: sums, extremes and samples.

A unit is a fixed stretch of whole contexts. Its `Summary` depends on the unit alone, and adding
summaries commutes exactly: counts and fixed-point sums are integers, extremes and samples are the
largest values and the smallest hashes. So neither the order of units nor the number of workers shows
in the result. Legend: F latents, N firings in a unit, S contexts in a unit.

Firings in order of strength and samples in order of hash are both kept as sorted int64 keys: the
high half decides (bits of the activation, which for positive floats sort as the numbers do; or the
hash), the low half is the row. A passage that is repeated counts once in a list of examples, in whatever
document: firings whose last few tokens are the same have the same `text`, of which the hash is made, too.

What a list of examples has only gets better, so a summary leaves out what could not enter the lists as they are
while it is made, and those that make summaries may look at them while others are added.
"""

import itertools
from collections.abc import Callable
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
_LIMB = 2.0**32  # each sum is a number below it, and how many of it there are: Σ² would not fit into 64 bits
_LARGEST = 2.0**17  # of an activation / scale: the sums of MAX_ROWS of them fit
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


class Entries(NamedTuple):
    """Firings that may enter lists of examples, by list and the best first; keys of which the smallest are the best."""

    cells: np.ndarray  # [n] number of the list
    keys: np.ndarray  # [n]
    carried: np.ndarray  # [n] what is kept with the key

    def take(self, chosen: np.ndarray) -> "Entries":
        return Entries(*(column[chosen] for column in self))


class Summary(NamedTuple):
    """What `Evidence.add` takes of a unit; F latents, N firings."""

    cells: np.ndarray  # [N] latent * N_BINS + bin
    sums: np.ndarray  # [F, 2, 2] in fixed point, in limbs
    positions: np.ndarray  # [N] latent * P + bucket
    position_rows: np.ndarray  # [P]
    massive: np.ndarray  # [M] latents of the firings on massive rows
    top: Entries  # each context's strongest firing of a latent
    strata: Entries
    random: Entries


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

    def of_lowest_hash(self, n: int) -> "Sample":
        """At most `n` of its rows, wherever they lie."""
        chosen = np.zeros(len(self.rows), bool)
        chosen[np.argsort(hashed(self.rows))[:n]] = True
        return self.take(chosen)

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


def _strength_keys(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Less than 0, so that the strongest come first; of equal strengths the lowest row. What is kept is the negative."""
    return -((values.view(np.int32).astype(np.int64) << 32) | (0xFFFFFFFF - rows))


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


def summarise(unit: Unit, scale: float, so_far: "Evidence") -> Summary:
    """Reduce a unit to what is added up, and to what may enter the examples that there are so far.

    Raises ValueError for an activation whose square is too large to be added up.
    """
    if not (strongest := unit.values.max(initial=0)) < _LARGEST * scale:
        raise ValueError(
            f"latent {unit.latents[unit.values.argmax()]} has an activation of {strongest:.3g}; expected less than "
            f"{_LARGEST * scale:.3g}, {_LARGEST:,.0f} times the length of a usual vector of the store. Give the SAE decoder rows of norm 1"
        )
    d_sae, latents = len(so_far.counts), unit.latents.astype(np.int64)
    rows = unit.rows.astype(np.int64) + unit.first_row
    cells = latents * N_BINS + bins_of(unit.values, scale)
    texts = unit.texts[unit.rows]
    keys = _sample_keys(rows, texts, latents)
    edges = position_edges(unit.context)
    bucket = np.searchsorted(edges, unit.positions, "right") - 1
    sums = [
        np.bincount(latents, unit.values.astype(np.float64) ** power, d_sae) * (step / scale**power)
        for power, step in enumerate(_FIXED, 1)
    ]
    fixed = np.rint(np.stack(sums, 1))
    high = np.floor(fixed / _LIMB)
    return Summary(
        cells=cells,
        sums=np.stack([fixed - high * _LIMB, high], 2).astype(np.int64),
        positions=latents * len(edges) + bucket[unit.rows],
        position_rows=np.bincount(bucket[unit.keep], minlength=len(edges)),
        massive=unit.massive,
        top=_strongest(unit, Entries(latents, _strength_keys(rows, unit.values), texts), so_far.top),
        strata=_entering(Entries(cells, keys, unit.values), so_far.strata),
        random=_entering(Entries(latents, keys, unit.values), so_far.random),
    )


@dataclass
class Evidence:
    """Running totals over units."""

    counts: np.ndarray  # [F, N_BINS] firings by strength
    sums: np.ndarray  # [F, 2, 2] Σ and Σ² in fixed point, each in limbs: so many, and so many times _LIMB
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
            sums=np.zeros((d_sae, 2, 2), np.int64),
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
        np.add.at(self.counts.reshape(-1), unit.cells, 1)
        self.sums += unit.sums
        np.add.at(self.positions.reshape(-1), unit.positions, 1)
        self.position_rows += unit.position_rows
        np.add.at(self.massive, unit.massive, 1)
        _insert(unit.top, self.top, self.top_texts, -1, lambda keys, texts: texts)
        _insert(unit.strata, self.strata, self.strata_values, 1, lambda keys, values: keys >> 32)
        _insert(unit.random, self.random, self.random_values, 1, lambda keys, values: keys >> 32)

    @property
    def fires(self) -> np.ndarray:
        """`[F]` rows on which each latent fires."""
        return self.counts.sum(1)

    def moments(self, scale: float) -> np.ndarray:
        """Σ and Σ² of each latent's activations, `[2, F]` float64."""
        return (self.sums @ np.array([1.0, _LIMB]) / np.array(_FIXED) * np.array([scale, scale**2])).T


def _entering(entries: Entries, kept: np.ndarray) -> Entries:
    """Those sample keys that would enter the rows `[cell, size]` of `kept`, of one text the lowest row."""
    entries = entries.take(entries.keys < kept[entries.cells, -1])
    entries = entries.take(np.lexsort((entries.keys, entries.cells)))
    return entries.take(_first(entries.cells, entries.keys >> 32))


def _strongest(unit: Unit, entries: Entries, kept: np.ndarray) -> Entries:
    """Those of all firings of a unit that would enter `kept`, the strongest of a latent in each context."""
    near = np.flatnonzero(entries.keys < -kept[entries.cells, -1])
    entries, contexts = entries.take(near), unit.rows[near] // unit.context
    order = np.lexsort((entries.keys, contexts, entries.cells))
    entries = entries.take(order[_first(entries.cells[order], contexts[order])])
    return entries.take(np.lexsort((entries.keys, entries.cells)))


def _first(*columns: np.ndarray) -> np.ndarray:
    """`[n]` where any of some columns is not what it was one before."""
    changes = [np.ones(min(1, len(columns[0])), bool), np.any([np.diff(column) != 0 for column in columns], axis=0)]
    return np.concatenate(changes)


def _insert(
    entries: Entries,
    kept: np.ndarray,
    kept_carried: np.ndarray,
    sign: int,
    text: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> None:
    """Put entries in their places in the rows `[cell, size]` of `kept`, keys times `sign`; of one text the best stays.

    One entry of each cell at a time. `text` tells of keys and what is carried with them which are of one passage.
    """
    place = np.arange(kept.shape[1])
    while True:
        entries = entries.take(entries.keys < sign * kept[entries.cells, -1])
        if not len(entries.cells):
            return
        first = _first(entries.cells)
        cells = entries.cells[first]
        keys, carried = entries.keys[first, None], entries.carried[first, None]
        old, old_carried = sign * kept[cells], kept_carried[cells]
        same = text(old, old_carried) == text(keys, carried)
        gone = np.where(same.any(1), same.argmax(1), place[-1])[:, None]  # what makes room
        at = (old < keys).sum(1, keepdims=True)  # beyond `gone` where the same text is there, and better: all stays
        stays = (place < at) | (place > gone)
        kept[cells] = sign * np.where(stays, old, np.where(place == at, keys, np.roll(old, 1, axis=1)))
        kept_carried[cells] = np.where(
            stays, old_carried, np.where(place == at, carried, np.roll(old_carried, 1, axis=1))
        )
        entries = entries.take(~first)

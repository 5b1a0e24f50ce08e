"""All latents of an SAE as one table: sorted, filtered and searched in memory, a page at a time."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saebench.index import FeatureIndex
from saebench.index.derive import FLAGS
from saebench.index.explanations import Explanation
from saebench.index.meaning import Meaning
from saebench.index.names import Names
from saebench.index.needs import Needs
from saebench.index.notes import Note, Notes
from saebench.steer.scores import Scores

HEADINGS = {
    "density": ("density", "share of tokens on which it fires"),
    "max": ("max", "its strongest activation, in units of the residual stream"),
    "mean": ("mean", "mean of its non-zero activations"),
    "name_f1": ("F1", "of its name, or of the candidate nearest to being one, in telling where it fires, on held-out tokens"),
    "name_detection": ("detection", "balanced accuracy of the same in telling windows in which it fires, on held-out documents; chance is 0.5"),
    "contextuality": ("context", "share of its strength that several tokens make together: 0 of a detector of its token; known of latents that `saebench interactions` explained"),
    "rule_f1": ("rule", "F1 of its rule, on held-out tokens"),
    "tokens_f1": ("tokens", "F1 of its list of tokens, on held-out tokens"),
    "output": ("output", "probability that its top logit tokens gain when it is clamped: how well it steers"),
    "nearest_cosine": ("nearest", "cosine of the nearest other decoder row"),
    "encoder_cosine": ("enc·dec", "cosine of its encoder and decoder rows"),
    "logit_std": ("logits σ", "standard deviation of its direct effects on all logits"),
    "decoder_norm": ("‖d‖", "norm of its decoder row"),
}  # fmt: skip
"""Columns that can be sorted by, with what they mean, in the order of every page."""
MAX_SIZE = 1000
BY_MEANING = "~"
_SEARCHED_TOKENS = 10


@dataclass(frozen=True, kw_only=True)
class Query:
    """Which latents, in which order."""

    text: str = ""
    """words that must all occur in name, tags, note, what rule and list name (`token` and `after` are how they do), or top tokens; a number finds the latent itself, and those that have
    it as a word of their name, tags, note, rule or list. After a `~`: names that mean something like it come first"""
    sort: str = "latent"
    """`latent`, or a name of HEADINGS"""
    descending: bool = False
    least_density: float = 0.0
    most_density: float = 1.0
    least_detection: float = 0.0
    """of the name"""
    having: tuple[str, ...] = ()
    """flags, any of which a latent must have; `labelled` and `explained` count as such"""
    without: tuple[str, ...] = ()
    """flags that it must not have"""
    among: tuple[int, ...] | None = None
    """these latents alone, as of a list"""
    page: int = 0
    size: int = 50

    def __post_init__(self) -> None:
        if not 1 <= self.size <= MAX_SIZE:
            raise ValueError(f"size is {self.size}; expected 1 to {MAX_SIZE} rows")


class Found(NamedTuple):
    """A page of the table."""

    latents: np.ndarray
    total: int
    """latents that match, on all pages"""
    page: int
    """the page asked for, or the last there is"""


class LatentTable:
    """The columns of an index with the scores and notes beside it."""

    def __init__(
        self,
        index: FeatureIndex,
        notes: Notes,
        scores: Scores | None = None,
        judged: dict[int, Explanation] | None = None,
        problem: str = "",
        embedder: Path | None = None,
        needs: dict[int, Needs] | None = None,
    ) -> None:
        """`problem` is what is wrong with what lies beside the index, and was left out; `embedder` a folder with what gives names a meaning."""
        self.index, self.notes, self.problem, self.embedder = index, notes, problem, embedder
        self._meant: tuple[Any, Meaning] | None = None
        self.needs = needs or {}
        self.names = Names(index, notes, judged, self.needs)
        """what each latent is called"""
        self.columns = index.columns | {name: self.names.columns[name] for name in ("name_f1", "name_detection")}
        self.estimated = np.zeros(index.d_sae, bool)
        """`[F]` whose output score is an estimate of the screen"""
        if self.needs:
            self.columns["contextuality"] = np.full(index.d_sae, np.nan)
            self.columns["contextuality"][list(self.needs)] = [one.contextuality for one in self.needs.values()]
        if scores is not None:
            self.columns["output"] = scores.output
            self.estimated |= ~scores.measured

    @property
    def sortable(self) -> dict[str, tuple[str, str]]:
        return {name: heading for name, heading in HEADINGS.items() if name in self.columns}

    def order(self, query: Query) -> np.ndarray:
        """Every latent that matches, ties in order of their numbers, latents without the figure last.

        Raises ValueError for a column or flag that is not there.
        """
        chosen = np.flatnonzero(self._matches(query))
        if query.text.startswith(BY_MEANING):
            likeness = self._likeness(query.text.removeprefix(BY_MEANING))[chosen]
            best = np.argsort(-likeness, kind="stable")
            chosen = chosen[best[~np.isnan(likeness[best])]]
            if query.sort == "latent":
                return chosen[::-1] if query.descending else chosen
        if query.sort == "latent":
            return chosen[::-1] if query.descending else chosen
        if query.sort not in self.sortable:
            raise ValueError(f"sort is {query.sort!r}; expected latent, {', '.join(self.sortable)}")
        values = self.columns[query.sort][chosen].astype(np.float64)
        return chosen[np.argsort(-values if query.descending else values, kind="stable")]

    def find(self, query: Query) -> Found:
        """A page of them."""
        order = self.order(query)
        page = max(0, min(query.page, (len(order) - 1) // query.size))
        return Found(order[page * query.size : (page + 1) * query.size], len(order), page)

    def beside(self, query: Query, latent: int) -> tuple[int | None, int | None]:
        """The latents before and after one in the order of a query; by number where it does not match the query."""
        order = self.order(query)
        places = np.flatnonzero(order == latent)
        if not len(places):
            return (latent - 1 if latent > 0 else None), (latent + 1 if latent + 1 < self.index.d_sae else None)
        place = int(places[0])
        return (
            int(order[place - 1]) if place > 0 else None,
            int(order[place + 1]) if place + 1 < len(order) else None,
        )

    def _matches(self, query: Query) -> np.ndarray:
        density = self.columns["density"]
        chosen = (density >= query.least_density) & (density <= query.most_density)
        if query.least_detection > 0:
            chosen &= self.columns["name_detection"] >= query.least_detection
        if query.among is not None:
            chosen &= np.isin(np.arange(self.index.d_sae), query.among)
        if query.having:
            chosen &= np.logical_or.reduce([self._flagged(flag) for flag in query.having])
        for flag in query.without:
            chosen &= ~self._flagged(flag)
        if not query.text.startswith(BY_MEANING) and (words := query.text.lower().split()):
            noted = {latent: _words(note) for latent, note in self.notes.items()}
            whole = {word: re.compile(rf"(?<![\w.]){word}(?!\w)") for word in words if word.isdecimal()}
            for latent in np.flatnonzero(chosen):
                note = noted.get(int(latent), "")
                text, names = f"{self._texts[latent]} {note}", f"{latent} {self.names.searched(int(latent))} {note}"
                chosen[latent] = all(whole[word].search(names) if word in whole else word in text for word in words)
        return chosen

    def _likeness(self, text: str) -> np.ndarray:
        """How near each name is to a text in meaning; names are read again where you have named some meanwhile."""
        if self.embedder is None:
            raise ValueError(
                f"what comes after {BY_MEANING} is searched by meaning, with a static embedding model: `saebench app --embedder DIR`"
            )
        noted = tuple(self.notes.items())
        if self._meant is None or self._meant[0] != noted:
            names = (self.names[latent] for latent in range(self.index.d_sae))
            self._meant = noted, Meaning(self.embedder, [name.text if name.explained else "" for name in names])
        return self._meant[1].likeness(text)

    def _flagged(self, flag: str) -> np.ndarray:
        if flag == "labelled":
            labelled = np.zeros(self.index.d_sae, bool)
            labelled[[latent for latent, _ in self.notes.items()]] = True
            return labelled
        if flag == "explained":
            return self.names.columns["explained"].astype(bool)
        if flag not in FLAGS:
            raise ValueError(f"flag is {flag!r}; expected labelled, explained, {', '.join(FLAGS)}")
        return self.index.flagged(flag)

    @cached_property
    def _texts(self) -> list[str]:
        """What the search looks at of each latent, but for notes."""
        tops = self.index.top_logits
        fires_on = self.index.top_tokens[:, :_SEARCHED_TOKENS]
        known = {int(token) for part in (tops, fires_on) if part is not None for token in np.unique(part) if token >= 0}
        ids = np.array(sorted(known), np.int64)
        pieces = dict(zip(ids.tolist(), (piece.lower() for piece in self.index.pieces(ids)), strict=True))
        rows = fires_on if tops is None else np.concatenate([fires_on, tops[:, :_SEARCHED_TOKENS]], 1)
        return [
            f"{self.names.searched(latent).lower()} {' '.join(pieces[token] for token in row if token >= 0)}"
            for latent, row in enumerate(rows.tolist())
        ]


def _words(note: Note) -> str:
    return " ".join((note.label, *note.tags, note.text)).lower()

"""What a latent is called: the best of its candidates by held-out score, chosen on one half of the held-out documents and shown with the score of the other.

The one place that decides it: the table, the pages, the search, the steering bench and every export ask here.
"""

from functools import cached_property
from typing import NamedTuple

import numpy as np

from saebench.index.explanations import Explanation
from saebench.index.needs import Needs
from saebench.index.notes import Note, Notes
from saebench.index.reader import FeatureIndex
from saebench.index.rules import named_by
from saebench.view.tokens import alone

LEAST_F1, LEAST_DETECTION = 0.3, 0.6
"""held-out scores below either of which a candidate names nothing (decision 32)"""
_SHOWN_TOKENS = 5
SOURCES = {
    "yours": "written by you",
    "judge": "an explanation by a model",
    "rule": "a rule of literals",
    "tokens": "a list of tokens",
    "interactions": "a rule made of interactions that several examples have",
    "": "unexplained",
}
"""Where a name may come from, with what that means."""


class Name(NamedTuple):
    """What a latent is called, and how well that tells where it fires."""

    text: str
    """to be escaped; of one that is unexplained, the tokens it fires on most"""
    source: str
    """a key of SOURCES"""
    f1: float
    """per token on the second half of the held-out documents; NaN where not measured"""
    detection: float
    """balanced accuracy over windows, there; NaN where not measured"""

    @property
    def explained(self) -> bool:
        return self.source != ""

    @property
    def scored(self) -> str:
        """`F1 0.62, detection 0.81`; empty where neither is known."""
        known = {"F1": self.f1, "detection": self.detection}
        return ", ".join(f"{what} {value:.2f}" for what, value in known.items() if not np.isnan(value))


class Names:
    """The names of all latents of an index; with notes, a judge's explanations and what is known to be needed, where there are any."""

    def __init__(
        self,
        index: FeatureIndex,
        notes: Notes | None = None,
        judged: dict[int, Explanation] | None = None,
        needs: dict[int, Needs] | None = None,
    ) -> None:
        self.index, self.notes, self.judged = index, notes, judged or {}
        self.rules = {latent: one.rule for latent, one in (needs or {}).items() if one.rule is not None}
        """those that are made of interactions"""

    def __getitem__(self, latent: int) -> Name:
        note = Note() if self.notes is None else self.notes[latent]
        found = self._found(latent)
        return found if not note.label else Name(note.label, "yours", found.f1, found.detection)

    def _found(self, latent: int) -> Name:
        """The name that measures best, whatever you call it."""
        which, f1, detection = (column[latent].item() for column in self._chosen)
        judged = self.judged.get(latent)
        if judged is not None and (shown := _better(judged)) is not None:
            return Name(judged.text, "judge", float("nan"), shown)
        if f1 >= LEAST_F1 and not detection < LEAST_DETECTION:
            source = _CANDIDATES[which]
            text = self.rules[latent].text if source == "interactions" else self._texts[source][latent]
            return Name(text, source, f1, detection)
        return Name(self._tokens(latent), "", f1, detection)

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """`[d_sae]` what can be sorted by: `name_f1`, `name_detection` of the candidate that is taken or would be, and `explained`."""
        _, f1, detection = self._chosen
        detection = detection.copy()
        explained = (f1 >= LEAST_F1) & ~(detection < LEAST_DETECTION)
        for latent in self.judged:
            name = self._found(latent)
            explained[latent] = name.explained
            if name.source == "judge":
                detection[latent] = name.detection
        return {"name_f1": f1, "name_detection": detection, "explained": explained}

    @cached_property
    def _chosen(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(which of `_CANDIDATES` was better on the first half, its F1 and its detection on the second), `[d_sae]` each."""
        nothing = np.full(self.index.d_sae, np.nan)
        first = np.stack([self.index.first_f1(what) for what in ("rules", "lists")])
        which = np.where(np.nan_to_num(first[1], nan=-1) >= np.nan_to_num(first[0], nan=-1), 1, 0)
        columns = self.index.columns
        f1, detection = (
            np.choose(which, [columns.get(f"{name}_{figure}", nothing) for name in _CANDIDATES[:2]]).astype(np.float64)
            for figure in ("f1", "detection")
        )
        best = np.nan_to_num(first, nan=-1).max(0)
        for latent, rule in self.rules.items():
            if rule.first_f1 > best[latent]:
                which[latent], f1[latent], detection[latent] = 2, rule.f1, rule.detection
        return which, f1, detection

    @cached_property
    def _texts(self) -> dict[str, list[str]]:
        return {"rule": self.index.described("rules"), "tokens": self.index.described("lists")}

    @cached_property
    def _named(self) -> list[str]:
        return [" ".join(map(named_by, texts)) for texts in zip(*self._texts.values(), strict=True)]

    def _tokens(self, latent: int) -> str:
        """The tokens that a latent without a name fires on most."""
        ids = self.index.top_tokens[latent, :_SHOWN_TOKENS]
        return " ".join(piece.strip() or alone(piece) for piece in self.index.pieces(ids[ids >= 0]))

    def searched(self, latent: int) -> str:
        """All that was said of a latent, for the search: what rules name, without the grammar that all share; candidates that lost, too."""
        judged = self.judged.get(latent)
        needed = self.rules.get(latent)
        return f"{self._named[latent]} {'' if needed is None else named_by(needed.text)} {'' if judged is None else judged.text}"


_CANDIDATES = ("rule", "tokens", "interactions")


def _better(judged: Explanation) -> float | None:
    """The detection of an explanation that tells windows of the first half better than rule and list do; None where it does not, or names nothing."""
    if judged.detection is None or not judged.text:
        return None
    first, shown = (half.score for half in judged.detection)
    others = [halves[0].score or 0.0 for halves in (judged.rule, judged.tokens) if halves is not None]
    if first is None or shown is None or shown < LEAST_DETECTION or first <= max([0.5, *others]):
        return None
    return shown

"""The rules and lists of tokens of an index: what they say, how well, and where they hold on other texts."""

import json
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from saebench.index.rules import MINIMUM, holding
from saebench.labels import Stream, Stretch, label, labeller_of
from saebench.pieces import TokenBytes

_PARTS = ("any", "only", "but")  # of a rule


class Rule(NamedTuple):
    """What a latent fires on, as literals in words, fitted on training documents and scored on held-out ones; NaN where rows are too few.

    Definitions stand with `saebench.index.rules.SCORE`.
    """

    text: str
    fit_f1: float
    first_f1: float
    precision: float
    recall: float
    f1: float
    detection: float
    null: float
    hard_negative: float
    score_rows: int


class Ruled:
    """The part of an index that knows of rules."""

    d_sae: int
    complete: bool
    _file: Any
    _tokenizer: Any

    def _rule(self, what: str, latent: int) -> Rule | None:
        """A latent's rule (`rules`) or its list of tokens (`lists`)."""
        if f"{what}/fit_f1" not in self._data or np.isnan(self._data[f"{what}/fit_f1"][latent]):
            return None
        found = {name: self._data[f"{what}/{name}"][latent] for name in Rule._fields if f"{what}/{name}" in self._data}
        text = found.pop("text").decode(errors="replace")
        return Rule(**{"text": text, "first_f1": math.nan} | {name: value.item() for name, value in found.items()})

    def _no_rule(self, latent: int) -> str:
        """Why a latent has no rule; empty where it has one."""
        if not self.complete:
            return "rules come last, and the index is not complete"
        if not json.loads(self._file.attrs["settings"]).get("rules", True):
            return "the index was made with --no-rules"
        if "rules/fit_f1" not in self._data:
            return "the store has no tokenizer, or no held-out rows to score it on"
        if not np.isnan(self._data["rules/fit_f1"][latent]):
            return ""
        fires = self._data["rules/fit_rows"][latent]
        few = f"it fires on {fires} rows of the fit, fewer than {MINIMUM}"
        return few if fires < MINIMUM else "nothing that is labelled holds twice where it fires"

    def described(self, what: str) -> list[str]:
        """The rule (`rules`), or the list of tokens (`lists`), of every latent in words, empty where it has none."""
        if f"{what}/fit_f1" not in self._data:
            return [""] * self.d_sae
        known = ~np.isnan(self._data[f"{what}/fit_f1"][:])
        texts = self._data[f"{what}/text"].asstr("utf-8", errors="replace")[:]
        return [text if has else "" for text, has in zip(texts, known, strict=True)]

    def first_f1(self, what: str) -> np.ndarray:
        """`[d_sae]` F1 of every latent's rule or list on the first half of the held-out documents, by which a name is chosen.

        Where it fires too little there, that of the fit; of an index without halves that of all held-out documents.
        """
        path = next((path for name in ("first_f1", "f1") if (path := f"{what}/{name}") in self._data), None)
        if path is None:
            return np.full(self.d_sae, np.nan)
        found, fit = self._data[path][:], self._data[f"{what}/fit_f1"][:]
        return np.where(np.isnan(found), fit, found)

    def holds(self, latent: int, texts: Sequence[np.ndarray], what: str = "rules") -> list[np.ndarray] | None:
        """`[n]` where the latent's rule, or its list of tokens, holds on each of some texts, by token ids; None where it has none.

        Nor is there one to apply where its literals are another labeller's than there is now: they may hold elsewhere.
        """
        if self._rule(what, latent) is None or not self.applies(what, latent):
            return None
        rule = self._structure(what, latent)
        numbers = np.unique(np.concatenate([rule[name].ravel() for name in _PARTS]))
        numbers = numbers[numbers >= 0]
        for name in _PARTS:
            rule[name] = np.where(rule[name] >= 0, np.searchsorted(numbers, rule[name]), -1)
        lengths = [len(tokens) for tokens in texts]
        tokens = np.concatenate([np.zeros(0, np.int64), *texts])
        places = np.concatenate([np.zeros(0, np.int64), *map(np.arange, lengths)])
        keep = ~np.isin(tokens, [] if self._tokenizer is None else self._tokenizer.all_special_ids)
        stream = Stream(tokens, np.repeat(np.arange(len(texts)), lengths), places, keep)
        names, of, _ = self._literals
        labellers = [labeller_of(name) for name in dict.fromkeys(of[number] for number in numbers)]
        stretch = Stretch(stream, self._bytes.all(), {}, np.arange(len(tokens)))
        held = label([stretch], labellers, only=[names[number] for number in numbers]).holds
        return np.split(holding(held, rule), np.cumsum(lengths)[:-1])

    def applies(self, what: str, latent: int) -> bool:
        """Whether the literals of a latent's rule or list are those of the labellers that there are now."""
        if "literals/names" not in self._data:
            return False
        _, of, versions = self._literals
        rule = self._structure(what, latent)
        numbers = np.concatenate([rule[name].ravel() for name in _PARTS])
        return all(self._version_now(of[number]) == versions[number] for number in numbers[numbers >= 0])

    def _version_now(self, labeller: str) -> str:
        try:
            return labeller_of(labeller).version
        except ValueError:  # what it is made of is not here
            return ""

    def _structure(self, what: str, latent: int) -> np.void:
        parts = {name: self._data[f"{what}/{name}"][latent] for name in _PARTS}
        shapes = [(name, "<i4", part.shape) for name, part in parts.items()]  # of before, with fewer alternatives
        return np.array([tuple(parts.values())], shapes)[0]

    @cached_property
    def _literals(self) -> tuple[list[str], list[str], list[str]]:
        """(name, labeller, its version) of the literals that rules are made of."""
        names, of, versions = (
            self._data[f"literals/{name}"].asstr("utf-8", errors="replace")[:].tolist()
            for name in ("names", "labeller", "version")
        )
        return names, of, versions

    @cached_property
    def literals_now(self) -> dict[str, str]:
        """The literals that rules are made of, each with its labeller, but for those of labellers that are others now."""
        if "literals/names" not in self._data:
            return {}
        now = {labeller: self._version_now(labeller) for labeller in set(self._literals[1])}
        return {name: of for name, of, version in zip(*self._literals, strict=True) if now[of] == version}

    def literals_of(self, what: str, latent: int) -> list[str]:
        """Those of a latent's rule or list, by name."""
        if self._rule(what, latent) is None:
            return []
        names, rule = self._literals[0], self._structure(what, latent)
        numbers = np.concatenate([rule[name].ravel() for name in _PARTS])
        return [name for one in numbers[numbers >= 0] if (name := names[one]) in self.literals_now]

    @cached_property
    def _data(self) -> dict[str, Any]:
        """Every column by its path: h5py takes longer to find one than to read a row of it."""
        found: dict[str, Any] = {}
        self._file.visititems(lambda path, column: found.update({path: column}))
        return found

    @cached_property
    def _bytes(self) -> TokenBytes:
        return TokenBytes(self._tokenizer)

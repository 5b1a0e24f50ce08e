"""`saebench interactions`: what latents need beside the token they fire on, from the interactions at examples of all strengths.

Of each latent: how its strength is shared among sets of one, two and more tokens, which sets several examples have, and the rule that they
make, fitted on training rows and scored on held-out ones as rules are.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from scipy import sparse

from saebench.config import Count, differences
from saebench.files import writing
from saebench.index import FeatureIndex
from saebench.index.explain import labelled_rows, streams
from saebench.index.grow import fit_rules
from saebench.index.needs import Needed, Needs, Set, needs_path, read_needed, write_needed
from saebench.index.reader import Example
from saebench.index.ruled import Rule
from saebench.index.rules import MINIMUM, Matrix, Rows, describe, rows_in, score_rules
from saebench.interactions.explain import Silent, Unmoved, check_n, interactions
from saebench.interactions.found import Interactions
from saebench.interactions.masking import Way, mask_of
from saebench.interactions.run import corpus_counts
from saebench.interactions.scalars import activation
from saebench.interactions.transfer import Pattern, Transferred, by_order, conjunctions, transferred
from saebench.labels import Stretch, labeller_of
from saebench.labels.places import Conjunction, Places
from saebench.pieces import TokenBytes
from saebench.runlog import Interrupt, interruptible, progress
from saebench.sae.hub import SaePath
from saebench.steer import Bench, open_bench

log = logging.getLogger(__name__)
_SAVE_SECONDS = 20.0
_LEAST_BEFORE = 3  # tokens before an example, BOS among them


@dataclass(frozen=True, kw_only=True)
class InteractionsConfig:
    """Of which latents of an indexed SAE, and what is masked at each example."""

    sae: SaePath
    """SAE directory, indexed"""
    latents: tuple[Count, ...] = ()
    """numbers of latents (default: those of --sample)"""
    sample: Count = 50
    """how many latents, by chance, of those that fire often enough for a rule; a larger sample has the smaller one in it"""
    all: bool = False
    """all of these in place of a sample"""
    examples: Count = 6
    """of each latent, spread over its intervals of strength"""
    misses: Count = 2
    """tokens on which it often fires, and is silent: what keeps it from firing there"""
    n: Count = 6
    """tokens that are masked at each, those that matter most"""
    reach: Count = 32
    """tokens before it among which these are"""
    way: Way = "unattended"
    """what a masked token is: left out of attention, a neutral token, or the corpus' mean embedding"""
    seed: int = 0
    """of the choice of latents, and of misses"""
    index: Path | None = None
    """index file (default: index/NAME.h5 beside the folder saes/ that holds the SAE)"""
    store: Path | None = None
    """activation store (default: the one that was indexed)"""
    device: str | None = None
    """cuda, mps or cpu (default: the first at hand)"""

    def __post_init__(self) -> None:
        check_n(self.n)
        for name in ("sample", "examples", "reach"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if self.latents and self.all:
            raise ValueError("--latents and --all are both given; expected one: which latents are explained")

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the result."""
        return {name: getattr(self, name) for name in ("examples", "misses", "n", "reach", "way", "seed")}


def survey(config: InteractionsConfig) -> tuple[Bench, dict[int, Needs]] | None:
    """Find what latents need, and write it to `needs_path`; None where Ctrl-C ended it early: the same call goes on.

    Raises ValueError for an SAE without a complete index, one without held-out rows or tokenizer, a latent that there is not, a file
    that is of another index or other settings, and as `open_bench` and `mask_of` do.
    """
    bench = open_bench(config.sae, index=config.index, store=config.store, device=config.device)
    index = bench.index
    if index is None or not index.complete:
        raise ValueError(f"{config.sae} has no complete index; make it with `saebench index --sae {config.sae}`")
    if wrong := [latent for latent in config.latents if latent >= index.d_sae]:
        raise ValueError(f"latent is {wrong[0]}; the SAE has 0 to {index.d_sae - 1}")
    with writing(needs_path(index.path)), interruptible() as interrupt:
        found = _begun(index, config)
        surveyor = _Surveyor(config, bench, interrupt)
        wanted = list(config.latents) or surveyor.candidates()[: None if config.all else config.sample].tolist()
        todo, saved = [latent for latent in wanted if latent not in found.latents], time.monotonic()
        bar = progress(
            len(wanted), f"interactions {config.sae.name}", "latent", len(wanted) - len(todo), shown=bool(todo)
        )
        try:
            with bar:
                for latent in todo:
                    found.latents[latent] = surveyor(latent)
                    bar.update()
                    if time.monotonic() - saved > _SAVE_SECONDS:
                        write_needed(index, found)
                        saved = time.monotonic()
        except _Stopped:
            log.warning("stopped after %d of %d latents; the same command continues", bar.n, len(wanted))
            return None
        finally:
            if todo and found.latents:
                write_needed(index, found)
    return bench, {latent: found.latents[latent] for latent in wanted}


def _begun(index: FeatureIndex, config: InteractionsConfig) -> Needed:
    """What an earlier call with the same settings left."""
    earlier = read_needed(index)
    if earlier is None:
        return Needed(config.settings, {})
    if changed := differences(earlier.settings, config.settings):
        raise ValueError(
            f"{needs_path(index.path)} was made otherwise: {', '.join(changed)}; give the same settings, or move the file away"
        )
    return earlier


class _Stopped(Exception):
    """The user asked for an end in the middle of a latent."""


class _Surveyor:
    """All that latents of an SAE are surveyed with."""

    def __init__(self, config: InteractionsConfig, bench: Bench, interrupt: Interrupt) -> None:
        assert bench.index is not None
        self._config, self._bench, self._index, self._interrupt = config, bench, bench.index, interrupt
        tokenizer = self._index.store.tokenizer()
        if tokenizer is None:
            raise ValueError(f"{self._index.store.folder} has no tokenizer, by which tokens are told; harvest again")
        self._mask = mask_of(bench.model, config.way, corpus_counts(bench))
        self._texts = TokenBytes(tokenizer).all()
        self._numbers = {name: number for number, name in enumerate(self._index.literals_now)}
        self._labellers = [labeller_of(name) for name in dict.fromkeys(self._index.literals_now.values())]
        if not self._numbers:
            what = "has no literals of rules, or those of earlier labellers"
            log.warning(
                "%s %s: no rule is made of interactions; `saebench index` makes it anew", self._index.path, what
            )
        self._fit, self._fit_places = self._rows("train")
        self._score, self._score_places = self._rows("validation")

    def _rows(self, split: str) -> tuple[Rows, Places]:
        """(what fires, and which literals of the index hold, on the sampled rows of a split; the tokens before each)."""
        index, sample = self._index, self._index.sample(split)
        if not len(sample.rows):
            raise ValueError(f"{index.path} has no {split} rows to make rules of; harvest with --validation-tokens")
        names = index.store.document_names()
        stretches = (
            Stretch(stream, self._texts, names, wanted) for wanted, stream in streams(index.store, split, sample.rows)
        )
        places = Places(self._texts, stretches)
        _, rows = labelled_rows(
            index.store, split, sample, index.d_sae, self._texts, self._labellers, list(self._numbers)
        )
        return rows, places

    def candidates(self) -> Int[np.ndarray, " n"]:
        """Latents that fire often enough for a rule, in random order."""
        often = np.flatnonzero(np.diff(self._fit.firing.indptr) >= MINIMUM)
        return np.random.default_rng(self._config.seed).permutation(often)

    def __call__(self, latent: int) -> Needs:
        """Explain a latent. Raises _Stopped where the user asked for an end."""
        random = np.random.default_rng([self._config.seed, latent])
        at, alone = self._explained(latent, self._examples(latent))
        misses, _ = self._explained(latent, self._near_misses(latent, random), fires=False)
        again = transferred(at, self._fit_places)
        pool = conjunctions(transferred([*at, *misses], self._fit_places))
        return Needs(
            examples=len(at) + len(alone),
            misses=len(misses),
            by_order=by_order(at, sum(alone, 0.0)),
            share=again.share,
            sets=tuple(_said(pattern, again, at, self._fit_places) for pattern in again.shown),
            rule=self._rule(latent, pool) if pool and self._applies(latent) else None,
        )

    def _examples(self, latent: int) -> list[Example]:
        """Examples of several strengths, the strongest first."""
        of = self._index[latent]
        intervals = [interval.examples for interval in reversed(of.intervals)]
        drawn = [of.top, *intervals[::2], *intervals[1::2]]
        spread = [some[turn] for turn in range(max(map(len, drawn))) for some in drawn if turn < len(some)]
        return list({example.row: example for example in spread}.values())

    def _near_misses(self, latent: int, random: np.random.Generator) -> list[Example]:
        """Rows at random, of tokens on which it often fires, where it is silent."""
        often = self._index.top_tokens[latent, :8]
        silent = np.isin(self._fit.tokens, often[often >= 0])
        silent[rows_in(self._fit.firing, latent)] = False
        rows = self._index.sample("train").rows[np.flatnonzero(silent)]
        return [Example(row, 0.0) for row in random.permutation(rows.astype(np.int64)).tolist()]

    def _explained(
        self, latent: int, some: list[Example], fires: bool = True
    ) -> tuple[list[Interactions], list[float]]:
        """(interactions at the first of some examples that have tokens before them, activations where no masking makes a difference)."""
        scalar = activation(self._bench.sae, self._bench.ends, latent)._replace(fires=fires)
        config, found, alone = self._config, [], []
        most = config.examples if fires else config.misses
        for example in some[: 2 * most]:
            if len(found) + len(alone) >= most:
                break
            context = self._index.context_of(example.row)
            ids = context.tokens[: context.peak + 1].astype(np.int64)
            if len(ids) <= _LEAST_BEFORE:
                continue
            try:
                found.append(
                    interactions(
                        self._bench.model, ids, scalar, self._mask, n=config.n, reach=config.reach, step=self._heard
                    )
                )
            except Unmoved:
                alone.append(example.value)
            except Silent:  # by the rounding of a store's rows, or of types
                continue
        return found, alone

    def _applies(self, latent: int) -> bool:
        """Whether a rule can be made of the latent's own literals: of sets of a few examples alone it says little."""
        return bool(self._numbers) and all(self._index.applies(what, latent) for what in ("rules", "lists"))

    def _heard(self, done: int, total: int) -> None:
        if self._interrupt.requested:
            raise _Stopped

    def _rule(self, latent: int, pool: list[Conjunction]) -> Rule | None:
        """The latent's rule grown anew with some conjunctions beside its literals and tokens, and its held-out scores; None where it takes none of them."""
        known = list(
            dict.fromkeys(name for what in ("rules", "lists") for name in self._index.literals_of(what, latent))
        )
        names = [*known, *map(self._fit_places.said, pool)]

        def rows(of: Rows, places: Places) -> Rows:
            own = of.literals[:, [self._numbers[name] for name in known]]
            several: Matrix = sparse.csc_array(np.stack([places.holds(one) for one in pool], 1))
            places.forget()
            return of._replace(firing=of.firing[:, [latent]], literals=sparse.hstack([own, several], "csc"))

        rules, _ = fit_rules(rows(self._fit, self._fit_places), np.zeros(len(names), bool), workers=1)
        used = np.concatenate([rules[name].ravel() for name in ("any", "only", "but")])
        if used.max() < len(known):
            return None
        scores = score_rules(rules, rows(self._score, self._score_places), workers=1)[0]
        figures = {name: scores[name].item() for name in scores.dtype.names}
        return Rule(text=_in_words(rules[0], names, len(known)), fit_f1=float(rules["fit_f1"][0]), **figures)


def _in_words(rule: np.void, names: list[str], known: int) -> str:
    """A rule of which literals from number `known` on are conjunctions, each said by itself."""
    plain, several = rule.copy(), [names[one] for one in rule["any"] if one >= known]
    plain["any"][plain["any"] >= known] = -1
    plain["only"], plain["but"] = -1, -1
    only = [f"only {names[rule['only']]}"] if rule["only"] >= 0 else []
    but = [f"not {names[one]}" for one in rule["but"] if one >= 0]
    return "; ".join([*filter(None, [describe(plain, names)]), *several, *only, *but])


def _said(pattern: Pattern, again: Transferred, at: list[Interactions], places: Places) -> Set:
    sets = [at[number].sets[place].strength / at[number].whole for number, place in again.patterns[pattern]]
    parts = [places.said((member,)) for member in pattern.members]
    own = [places.said(pattern.own)] if pattern.own else []
    text = " and ".join([*own, *parts]) if pattern.kind == "and" else " and ".join([*own, " or ".join(parts)])
    return Set(text, float(np.mean(sets)), len({number for number, _ in again.patterns[pattern]}))

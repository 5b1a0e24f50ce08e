"""`saebench explain`: a judge explains latents, and is held to it on held-out windows, beside controls, rules and token lists.

A judge is never asked unless one is named. Before the first call the plan is said; a server, which gets texts of the store, is asked
only with --yes. Answers are kept by what was asked, so that the same command goes on where it ended.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from saebench.config import Count, differences, flat
from saebench.files import locked
from saebench.index import FeatureIndex, IndexConfig, open_feature_index
from saebench.index.explanations import (
    JUDGE,
    Explained,
    Explanation,
    explanations_path,
    read_explained,
    read_neuronpedia,
    write_explained,
)
from saebench.index.export import names_there
from saebench.index.notes import Notes
from saebench.judge.chat import Answers, Judge, Prompt, ask, is_remote, open_judge
from saebench.judge.prompts import EXPLANATION_TOKENS, explain_prompt, marked, read_explanation
from saebench.judge.trials import Subject, answered, circle, claimed, trials
from saebench.judge.windows import HeldOut, examples
from saebench.runlog import interruptible, progress
from saebench.sae import load_sae
from saebench.sae.hub import SaePath

log = logging.getLogger(__name__)

_LETTERS = 4  # of a token, for the estimate
_NOT_YET = "an explanation of the usual length, which there is not yet, of latent {}"  # for the estimate


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """Which latents of an indexed SAE to have explained, by whom."""

    sae: SaePath
    """SAE directory, indexed"""
    judge: str | None = None
    """MODEL@URL of an OpenAI-compatible server, to which texts of the store are sent (key: OPENAI_API_KEY), or the directory of a chat model"""
    latents: tuple[Count, ...] = ()
    """numbers of latents (default: those of --top)"""
    top: Count = 20
    """how many latents, of those that are not dense and fire in enough held-out windows"""
    by: Literal["chance", "density"] = "chance"
    """which of them come first: drawn by --seed, as an SAE is judged by, or those that fire most often"""
    examples: Count = 16
    """training examples that an explanation is made from"""
    windows: Count = 10
    """held-out windows of each half of the documents that it is scored on: so many in which the latent fires, and as many in which not"""
    per_call: Count = 5
    """windows in one question"""
    concurrency: Count = 4
    """calls to a server at once"""
    yes: bool = False
    """send texts of the store to the server, as the plan says"""
    imported: Path | None = None
    """upload body of Neuronpedia, or a folder of them: its explanations in place of the judge's, its hand-written ones as labels"""
    model_id: str | None = None
    """the model's name there (default: as `export` writes it)"""
    source: str | None = None
    """the SAE's name there (default: as `export` writes it)"""
    seed: int = 0
    """of the choice of windows, and of latents"""
    store: Path | None = None
    """activation store (default: the one that was indexed)"""
    index: Path | None = None
    """index file (default: index/NAME.h5 beside the folder saes/ that holds the SAE)"""
    device: str | None = None
    """cuda or cpu for a judge in a directory (default: cuda where it is at hand)"""

    def __post_init__(self) -> None:
        if self.judge is None and self.imported is None:
            raise ValueError("there is nobody to ask: give --judge MODEL@URL or a directory, or --imported FILE")
        for name in ("top", "examples", "windows", "per_call", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")


def explain(config: ExplainConfig) -> dict[int, Explanation] | None:
    """Explain and score latents, and write them to `explanations_path`; None where Ctrl-C ended it early: the same call goes on.

    What the same judge has explained with the same settings before stays in the file. Raises ValueError for a judge that there is not or
    that does not answer, a server without `yes`, an index that is not complete or has no held-out rows, a latent that the SAE lacks, and
    where the file is of another judge, other settings or another index.
    """
    path = config.index or IndexConfig(sae=config.sae).path
    with open_feature_index(path, sae=config.sae, store=config.store) as index:
        if not index.complete:
            raise ValueError(f"{path} is not complete; finish it with `saebench index --sae {config.sae}`")
        folder = path.with_suffix(".judge")
        with locked(folder, other="--index"):
            taken = None if config.imported is None else _taken(config, index)
            if config.judge is None:
                if taken:
                    write_explained(index, _begun(index, None, {"imported": _hash(taken)})._replace(latents=taken))
                return taken
            judge = open_judge(config.judge, config.device, config.concurrency)
            settings = {name: getattr(config, name) for name in ("examples", "windows", "per_call", "seed")}
            found = _begun(index, judge.identity, settings | {"imported": _hash(taken)})
            subjects = _subjects(config, index, taken)
            answers = Answers(folder / "answers.jsonl", judge.identity)
            log.info("%s", "\n".join(_plan(config, index, judge, answers, subjects, taken)))
            if is_remote(config.judge) and not config.yes:
                raise ValueError(
                    f"nothing was sent to {judge.about} yet; read the plan, and give --yes to have it sent"
                )
            try:
                finished = _judged(config, judge, answers, subjects, taken, found.latents)
            finally:
                if found.latents:
                    write_explained(index, found)
        return {subject.latent: found.latents[subject.latent] for subject in subjects} if finished else None


def _begun(index: FeatureIndex, judge: dict[str, str] | None, settings: dict[str, Any]) -> Explained:
    """What an earlier call with the same judge and settings left; texts that nobody has scored give way to scored ones."""
    earlier = read_explained(index)
    if earlier is None or earlier.judge is None:
        return Explained(judge, settings, {})
    old, new = (
        flat({"judge": who or {"model": None}, **how})
        for who, how in ((earlier.judge, earlier.settings), (judge, settings))
    )
    if changed := differences(old, new):
        raise ValueError(
            f"{explanations_path(index.path)} has explanations that were made otherwise: {', '.join(changed)}; "
            "give the same judge and settings, or move the file away"
        )
    return earlier


def _taken(config: ExplainConfig, index: FeatureIndex) -> dict[int, Explanation]:
    """The explanations of the file named, of each latent the first; hand-written ones become labels where there is none yet."""
    assert config.imported
    files = sorted(config.imported.glob("*.json")) if config.imported.is_dir() else [config.imported]
    if not files or not files[0].exists():
        raise ValueError(f"{config.imported} is no file, or has no *.json in it; name what to take explanations from")
    model_id, source = names_there(index, config.sae)
    said = read_neuronpedia(files, config.model_id or model_id, config.source or source, index.d_sae)
    notes = Notes(index.path.with_suffix(".notes.json"), index.identity["sae"], index.d_sae)
    taken: dict[int, Explanation] = {}
    labels = 0
    for latent, texts in sorted(said.items()):
        for text, method in texts:
            note = notes[latent]
            if method == "hand-written" and not note.label:
                notes.write(latent, note._replace(label=text), seen=note)
                labels += 1
            elif method not in ("hand-written", "saebench-rule"):
                taken.setdefault(latent, Explanation(text, method))
    log.info("%s: %d labels and %d explanations taken", config.imported, labels, len(taken))
    return taken


def _hash(taken: dict[int, Explanation] | None) -> str | None:
    return None if taken is None else xxhash.xxh3_128_hexdigest(json.dumps(sorted(taken.items())).encode())


# ------------------------------------------------------------------------------------- what is asked


def _subjects(config: ExplainConfig, index: FeatureIndex, taken: dict[int, Explanation] | None) -> list[Subject]:
    held_out = HeldOut(index)
    latents = _wanted(config, index, held_out, taken)
    shown = examples(index, load_sae(config.sae), latents, config.examples)
    subjects = []
    with progress(len(latents), f"draw windows of {config.sae.name}", "latent", delay=1.0) as bar:
        for latent, passages in zip(latents, shown, strict=True):
            text = explain_prompt([(marked(each.pieces, each.fires), each.strength) for each in passages])
            halves = held_out.draw(latent, config.windows, config.seed)
            subjects.append(Subject(latent, Prompt(text, EXPLANATION_TOKENS), halves))
            bar.update()
    return subjects


def _wanted(
    config: ExplainConfig, index: FeatureIndex, held_out: HeldOut, taken: dict[int, Explanation] | None
) -> list[int]:
    for latent in config.latents:
        if latent >= index.d_sae:
            raise ValueError(f"latent is {latent}; {config.sae} has 0 to {index.d_sae - 1}")
    fires = index.columns["fires"]
    asked = list(dict.fromkeys(config.latents))
    if not asked:
        order = np.random.default_rng(config.seed).permutation(index.d_sae)
        if config.by == "density":
            order = np.argsort(-fires, kind="stable")
        asked = order[~index.flagged("dense")[order]].tolist()
    able = (latent for latent in asked if fires[latent] and (taken is None or latent in taken))
    if config.latents:
        latents = list(able)
        if left := [latent for latent in asked if latent not in latents]:
            log.info("left out, as they never fire or the file has nothing of them: %s", ", ".join(map(str, left)))
    else:
        latents = list(islice((latent for latent in able if held_out.often(latent)), config.top))
    if not latents:
        raise ValueError(
            "none of these latents can be explained: they fire never, or in too few held-out windows, or the file has nothing of them; "
            "choose others with --latents"
        )
    return latents


def _text(subject: Subject, answers: Answers, taken: dict[int, Explanation] | None) -> str:
    """The explanation of a latent; empty where it was not asked for yet, or the judge has none."""
    if taken is not None:
        return taken[subject.latent].text
    return read_explanation(answers[subject.prompt]) if subject.prompt in answers else ""


def _plan(
    config: ExplainConfig, index: FeatureIndex, judge: Judge, answers: Answers, subjects: Sequence[Subject],
    taken: dict[int, Explanation] | None,
) -> list[str]:  # fmt: skip
    """What it comes to, in lines of text."""
    prompts = [] if taken is not None else [subject.prompt for subject in subjects]
    texts = {each.latent: _text(each, answers, taken) or _NOT_YET.format(each.latent) for each in subjects}
    for three in circle(subjects):
        for trial in trials(texts, *three, config.per_call).values():
            prompts += [quiz.prompt for half in trial for quiz in half]
    prompts = list(dict.fromkeys(prompts))
    todo = [prompt for prompt in prompts if prompt not in answers]
    read, written = sum(len(prompt.text) for prompt in todo) // _LETTERS, sum(prompt.limit for prompt in todo)
    remote = config.judge is not None and is_remote(config.judge)
    goes = f"texts of {index.store.folder} are sent there" if remote else "no text leaves this machine"
    return [
        f"{config.sae.name}: {len(subjects)} latents, explained and scored by {judge.about}; {goes}",
        f"  calls   {len(todo):,}, and {len(prompts) - len(todo):,} are answered already",
        f"  tokens  about {read:,} to read and at most {written:,} to write (an estimate, by {_LETTERS} characters a token)",
    ]


# -------------------------------------------------------------------------------------- what is found


def _judged(
    config: ExplainConfig, judge: Judge, answers: Answers, subjects: Sequence[Subject], taken: dict[int, Explanation] | None,
    found: dict[int, Explanation],
) -> bool:  # fmt: skip
    """Ask what is to be asked and fill in `found`, latent by latent; False where Ctrl-C ended it early."""
    with interruptible() as interrupt:
        if taken is None:
            prompts = [subject.prompt for subject in subjects]
            with progress(len(prompts), "explain", "latent", delay=1.0) as bar:
                if not ask(judge, answers, prompts, interrupt, bar.update):
                    return False
        texts = {subject.latent: _text(subject, answers, taken) for subject in subjects}
        found |= {latent: Explanation("", JUDGE) for latent, text in texts.items() if not text}
        three_by_three = circle([subject for subject in subjects if texts[subject.latent]])
        with progress(len(three_by_three), "score", "latent", delay=1.0) as bar:
            for before, subject, after in three_by_three:
                tried = trials(texts, before, subject, after, config.per_call)
                prompts = [quiz.prompt for trial in tried.values() for half in trial for quiz in half]
                if not ask(judge, answers, prompts, interrupt, lambda _: None):
                    return False
                latent = subject.latent
                found[latent] = Explanation(
                    texts[latent],
                    JUDGE if taken is None else taken[latent].method,
                    **{name: answered(trial, answers) for name, trial in tried.items()},
                    partners=(before.latent, after.latent) if before.latent != latent else None,
                    rule=claimed(subject, "by_rule"),
                    tokens=claimed(subject, "by_tokens"),
                )
                bar.update()
    return True

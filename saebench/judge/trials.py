"""How an explanation is tried: questions about held-out windows, with the right answers, and the tally of a judge's.

Detection asks in which windows a latent fires, fuzzing whether the tokens that are marked are those on which it does (Paulo et al.
2024, arXiv:2410.13928). The controls are detection by the text of another latent, and in the windows of another one.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from saebench.index.explanations import Halves, Tally
from saebench.judge.chat import Answers, Prompt
from saebench.judge.prompts import ANSWER_TOKENS, detect_prompt, fuzz_prompt, marked, read_verdicts
from saebench.judge.windows import Kind, Window


class Subject(NamedTuple):
    """A latent with what it is explained from, and the windows of each half that it is scored on."""

    latent: int
    prompt: Prompt
    halves: tuple[list[Window], list[Window]]


class Quiz(NamedTuple):
    """Some windows in one prompt, and what each counts as: the right answer is yes for an active one."""

    prompt: Prompt
    kinds: list[Kind]


Trial = tuple[list[Quiz], list[Quiz]]
"""the quizzes of each half"""


def circle(subjects: Sequence[Subject]) -> list[tuple[Subject, Subject, Subject]]:
    """Each with the one before and the one after it, which are its partners in the controls; a single one with itself."""
    n = len(subjects)
    return [(subjects[i - 1], subject, subjects[(i + 1) % n]) for i, subject in enumerate(subjects)]


def trials(texts: dict[int, str], before: Subject, subject: Subject, after: Subject, per_call: int) -> dict[str, Trial]:
    """The trials of a latent by their names in `Explanation`; one that has no partner is tried without controls.

    `texts` are the explanations by latent. What a latent's control of other windows asks, the control of other explanations asks of
    the next latent, so that both cost one call.
    """
    text = texts[subject.latent]
    first, second = subject.halves
    found = {
        "detection": (_detection(text, first, per_call), _detection(text, second, per_call)),
        "fuzzing": (_fuzzing(text, first, per_call), _fuzzing(text, second, per_call)),
    }
    if before.latent != subject.latent:
        other, (there, beyond) = texts[before.latent], after.halves
        found["other_explanation"] = (_detection(other, first, per_call), _detection(other, second, per_call))
        found["other_windows"] = (_detection(text, there, per_call), _detection(text, beyond, per_call))
    return found


def _detection(text: str, windows: Sequence[Window], per_call: int) -> list[Quiz]:
    asked = [(marked(window.pieces, np.zeros(len(window.pieces), bool)), window.kind) for window in windows]
    return [
        Quiz(
            Prompt(detect_prompt(text, [passage for passage, _ in some]), ANSWER_TOKENS * len(some)),
            [k for _, k in some],
        )
        for some in _batches(asked, per_call)
    ]


def _fuzzing(text: str, windows: Sequence[Window], per_call: int) -> list[Quiz]:
    """Every window in which the latent fires is asked about twice, far apart: with the right marks, and with as many others."""
    active = [window for window in windows if window.kind == "active" and window.decoy.any()]
    asked: list[tuple[str, Kind]] = []
    for turn in (0, 1):
        for number, window in enumerate(active, turn):
            right = number % 2 == 0
            asked.append(
                (marked(window.pieces, window.fires if right else window.decoy), "active" if right else "hard")
            )
    return [
        Quiz(
            Prompt(fuzz_prompt(text, [passage for passage, _ in some]), ANSWER_TOKENS * len(some)), [k for _, k in some]
        )
        for some in _batches(asked, per_call)
    ]


def _batches(asked: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [asked[start : start + size] for start in range(0, len(asked), size)]


def answered(trial: Trial, answers: Answers) -> Halves:
    """The tally of each half of a trial whose prompts are all answered."""
    first, second = (
        tally(
            [
                (kind, verdict)
                for quiz in quizzes
                for kind, verdict in zip(quiz.kinds, read_verdicts(answers[quiz.prompt], len(quiz.kinds)), strict=True)
            ]
        )
        for quizzes in trial
    )
    return first, second


def claimed(subject: Subject, by: str) -> Halves | None:
    """The tally of what a window's field `by_rule` or `by_tokens` says of it; None where it says nothing."""
    first, second = subject.halves
    if any(getattr(window, by) is None for window in (*first, *second)):
        return None
    return tally([(w.kind, getattr(w, by)) for w in first]), tally([(w.kind, getattr(w, by)) for w in second])


def tally(verdicts: Sequence[tuple[Kind, bool | None]]) -> Tally:
    """Of windows by kind, and what was said of each."""
    counts = dict.fromkeys(Tally._fields, 0)
    for kind, verdict in verdicts:
        if verdict is None:
            counts["unusable"] += 1
        else:
            counts[kind] += 1
            counts[f"{kind}_right"] += verdict == (kind == "active")
    return Tally(**counts)

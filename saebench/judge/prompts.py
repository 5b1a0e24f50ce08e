"""What a judge is asked, and how its answers are read.

Explanations are made from passages with the firing tokens marked (Bills et al. 2023, "Language models can explain neurons in language
models") and scored by detection and fuzzing (Paulo et al. 2024, arXiv:2410.13928). A passage is a JSON string on a line of its
own, so that nothing in a text can pass for the next passage, or for a question.
"""

import json
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

TEXT_LIMIT = 512
"""characters of an explanation: Neuronpedia takes no more"""
EXPLANATION_TOKENS = 100
"""that the judge may write of an explanation, and of an answer for each window"""
ANSWER_TOKENS = 12

_UNIT = "A unit inside a language model is active on some tokens of a text and silent on all others."
_EXPLAIN = (
    f"{_UNIT} Below are passages in which it is active, from strong to weak. The tokens on which it is active stand between << and "
    ">>, and the number before a passage says how strong it gets there, from 1 to 10.\n\n"
    "{passages}\n\n"
    "What is it active on? Answer with one line of at most 20 words: a description by which someone else could tell in a new text "
    "where it is active. Be as specific as all passages allow, and look at what stands before the marks, too. Do not repeat the "
    "passages, and do not mention the unit."
)
_DETECT = (
    f"{_UNIT} It is said to be active on: {{text}}\n\n"
    "Below are numbered passages. Is it active anywhere in each of them, if what is said is right?\n\n"
    "{passages}\n\n"
    "Answer with one line for each passage, its number and yes or no, such as `1: yes`, and with nothing else."
)
_FUZZ = (
    f"{_UNIT} It is said to be active on: {{text}}\n\n"
    "Below are numbered passages with some tokens between << and >>. In some of them these are the tokens on which it is active, in "
    "others not. Are the marks of each passage right, if what is said is right?\n\n"
    "{passages}\n\n"
    "Answer with one line for each passage, its number and yes or no, such as `1: yes`, and with nothing else."
)


def explain_prompt(passages: Sequence[tuple[str, int]]) -> str:
    """For an explanation from (marked passage, strength from 1 to 10)."""
    lines = [f"{strength}: {json.dumps(passage, ensure_ascii=False)}" for passage, strength in passages]
    return _EXPLAIN.format(passages="\n".join(lines))


def detect_prompt(text: str, passages: Sequence[str]) -> str:
    """Does a latent that is explained by `text` fire in each of some passages?"""
    return _DETECT.format(text=text, passages=_numbered(passages))


def fuzz_prompt(text: str, passages: Sequence[str]) -> str:
    """Are the tokens that are marked in each of some passages those on which it fires?"""
    return _FUZZ.format(text=text, passages=_numbered(passages))


def _numbered(passages: Sequence[str]) -> str:
    lines = (f"{number}: {json.dumps(passage, ensure_ascii=False)}" for number, passage in enumerate(passages, 1))
    return "\n".join(lines)


def marked(pieces: Sequence[str], marks: Bool[np.ndarray, " n"]) -> str:
    """The text of some tokens, each stretch of marked ones between << and >>; such marks of the text itself are drawn apart."""
    opens, shuts = marks & ~np.roll(marks, 1), marks & ~np.roll(marks, -1)
    opens[:1], shuts[-1:] = marks[:1], marks[-1:]
    text = "".join(
        "\ue000" * bool(opening) + piece + "\ue001" * bool(shutting)
        for piece, opening, shutting in zip(pieces, opens, shuts, strict=True)
    )
    text = text.replace("<<", "< <").replace(">>", "> >")
    return text.replace("\ue000", "<<").replace("\ue001", ">>")


def read_explanation(answer: str) -> str:
    """The first line of an answer, without what some judges put around it; empty where there is none."""
    for line in _said(answer).splitlines():
        line = re.sub(r"^(explanation|description|answer)\s*:", "", line.strip(" \t*#`\"'"), flags=re.IGNORECASE)
        if line := line.strip(" \t*#`\"'"):
            return line[:TEXT_LIMIT]
    return ""


def read_verdicts(answer: str, n: int) -> list[bool | None]:
    """Yes or no of n passages; None where an answer says neither, or both."""
    said: list[set[str]] = [set() for _ in range(n)]
    for number, verdict in re.findall(r"(?<![\d.])(\d{1,4})\W{1,5}(yes|no)\b", _said(answer).lower()):
        if 1 <= int(number) <= n:
            said[int(number) - 1].add(verdict)
    return [verdicts == {"yes"} if len(verdicts) == 1 else None for verdicts in said]


def _said(answer: str) -> str:
    """Without the thoughts that some models write before their answer."""
    return re.sub(r"<think>.*?(</think>|$)", "", answer, flags=re.DOTALL)

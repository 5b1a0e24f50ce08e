"""Strings from elsewhere inside Markdown: shown as they are, whatever they hold."""

import re

_MARKUP = re.compile(r"([\\`*_\[\]<>$:#~|&{}!]|^[-+=]|(?<=\d)[.)](?=\s|$))")


def plain(text: str) -> str:
    """The text with every character that could be markup escaped (CommonMark 0.31, 2.4), on one line."""
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """The text as a code span, with a fence that it does not hold (CommonMark 0.31, 6.1)."""
    text = " ".join(text.split()) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text[0] == "`" or text[-1] == "`" else ""
    return f"{fence}{pad}{text}{pad}{fence}"

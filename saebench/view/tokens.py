"""Tokens and activations -> escaped HTML: for the report, the exported page and the app.

Strength shows twice, as a background of one hue and as the weight of an underline, so that colour is not the
only signal; the exact value appears on hover and on keyboard focus, and the peak carries it as a badge.
"""

import html
from collections.abc import Sequence
from typing import NamedTuple

CSS = """
.sb-text, .sb-page { color-scheme: inherit; --sb-ink: light-dark(#1c2024, #eceef1); --sb-faint: light-dark(#5b6370, #a3acb8);
  --sb-hue: light-dark(#e87722, #b45309); --sb-line: light-dark(#a84b06, #fbbf24); --sb-change: light-dark(#1d4ed8, #93b4ff);
  --sb-paper: light-dark(#ffffff, #14171a); --sb-rule: light-dark(#d9dce1, #343a41); --sb-tint: light-dark(#f5f1ea, #20252b);
  --sb-bar: light-dark(#d97706, #f59e0b); }
.sb-text { font: 13px/1.9 ui-monospace, "Cascadia Mono", "DejaVu Sans Mono", Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; direction: ltr; color: var(--sb-ink); margin: 0; }
.sb-t { unicode-bidi: isolate; position: relative; border-radius: 2px; }
.sb-on { background: color-mix(in srgb, var(--sb-hue) calc(12% + 60% * var(--a)), transparent); padding: 1px 0;
  border-bottom: calc(1px + 3px * var(--a)) solid var(--sb-line); }
.sb-change .sb-on { background: color-mix(in srgb, var(--sb-change) calc(6% + 40% * var(--a)), transparent);
  border-bottom-color: var(--sb-change); }
.sb-change .sb-on.sb-down { background: color-mix(in srgb, var(--sb-hue) calc(6% + 40% * var(--a)), transparent);
  border-bottom: calc(1px + 3px * var(--a)) dashed var(--sb-line); }
.sb-t[data-pick] { cursor: pointer; } .sb-t.chosen { outline: 2px solid var(--sb-ink); outline-offset: 1px; }
.sb-t.massive { outline: 1px dashed var(--sb-ink); outline-offset: 1px; }
.sb-t:focus-visible { outline: 2px solid var(--sb-line); outline-offset: 1px; }
.sb-t[data-v]:hover::after, .sb-t[data-v]:focus::after { content: attr(data-v); position: absolute; left: 0; top: 1.6em; z-index: 2;
  background: var(--sb-ink); color: var(--sb-paper); font-size: 11px; line-height: 1.5; padding: 1px 6px; border-radius: 3px;
  white-space: nowrap; }
.sb-space:not(.sb-on) { color: var(--sb-faint); }
.sb-apart::before { content: "\\25C6"; color: var(--sb-change); font-size: 10px; padding-right: 2px; }
.sb-badge { font-size: 10px; font-weight: 600; vertical-align: super; color: var(--sb-line); padding-left: 1px; }
"""
_CONTROL = {code: chr(0x2400 + code) for code in range(32)} | {127: "\u2421"}  # pictures of control characters
_PICTURES = _CONTROL | {ord("\n"): "\u21b5", ord("\t"): "\u2192"}  # on one line
_CONTROL |= {ord("\n"): "\u21b5\n", ord("\t"): "\u2192\t"}


def visible(text: str) -> str:
    """Control characters as pictures, line breaks too."""
    return text.translate(_PICTURES)


def alone(piece: str) -> str:
    """A token on its own, outside any text: its spaces too as pictures."""
    return visible(piece).replace(" ", "\u00b7")


def token_html(
    piece: str, value: float, maximum: float, *, peak: bool = False, pick: str = "", title: str = "", kind: str = ""
) -> str:
    """One token; `value` / `maximum` is its strength, and 0 or less leaves it plain.

    `pick` is what a click on it picks, `title` is shown in place of the value, `kind` is a further class.
    """
    shown = piece.replace(" ", "\u00b7") if piece and not piece.strip(" ") else piece
    text = html.escape(shown.translate(_CONTROL))
    on = value > 0
    classes = " ".join(["sb-t", *(["sb-on"] if on else []), *([] if piece.strip() else ["sb-space"]), *kind.split()])
    said = html.escape(title or (number(value) if on else ""), quote=True)
    strength = min(1.0, value / maximum) if maximum > 0 else 1.0
    attributes = f' style="--a:{strength:.3f}"' if on else ""
    if said:
        name = html.escape(shown.strip() or "white space", quote=True)
        attributes += f' data-v="{said}" aria-label="{name}: {said}"'
    if pick:
        attributes += f' data-pick="{html.escape(pick, quote=True)}" role="button"'
    if said or pick:
        attributes += ' tabindex="0"'
    badge = f'<span class="sb-badge">{number(value)}</span>' if peak and on else ""
    return f'<span class="{classes}"{attributes}>{text}</span>{badge}'


class Unit(NamedTuple):
    """A token of a text, or several that make one character (`saebench.pieces.show_text`)."""

    text: str
    places: range

    def strongest(self, values: Sequence[float]) -> int:
        """The place whose value, of one per token of the text, is the largest."""
        return max(self.places, key=lambda place: values[place])

    def named(self, name: str) -> str:
        """The name, and of how many tokens it is the largest."""
        return name if len(self.places) == 1 or not name else f"{name}, the most of {len(self.places)} tokens"


def units(pieces: Sequence[str]) -> list[Unit]:
    """What is drawn as one: each token with the empty ones behind it, whose bytes end its last character."""
    starts = [place for place, piece in enumerate(pieces) if piece or place == 0]
    ends = [*starts[1:], len(pieces)]
    return [Unit(pieces[start], range(start, end)) for start, end in zip(starts, ends, strict=True)] if pieces else []


def text_html(pieces: Sequence[str], values: Sequence[float], maximum: float, *, peak: int | None = None) -> str:
    """A line of tokens; `peak` is the place of the one that carries its value as a badge. Raises ValueError for unequal numbers."""
    if len(pieces) != len(values):
        raise ValueError(f"there are {len(pieces)} tokens and {len(values)} values; expected one of each")
    spans = []
    for unit in units(pieces):
        value = float(values[unit.strongest(values)])
        title = unit.named(number(value) if value > 0 else "")
        spans.append(token_html(unit.text, value, maximum, peak=peak in unit.places, title=title))
    return f'<div class="sb-text">{"".join(spans)}</div>'


def number(value: float) -> str:
    """Three significant figures."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")

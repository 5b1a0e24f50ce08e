"""Tokens and activations -> escaped HTML: for the report, the exported page and the app.

Strength shows twice, as a background of one hue and as the weight of an underline, so that colour is not the
only signal; the exact value appears on hover and on keyboard focus, and the peak carries it as a badge.
"""

import html
from collections.abc import Sequence

CSS = """
.sb-text { font: 13px/1.9 ui-monospace, "Cascadia Mono", "DejaVu Sans Mono", Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; direction: ltr; color: var(--sb-ink); margin: 0; }
.sb-text, .sb-page { --sb-ink: #1c2024; --sb-faint: #6b7280; --sb-hue: 232, 119, 34; --sb-line: #b45309;
  --sb-paper: #ffffff; --sb-rule: #d9dce1; }
@media (prefers-color-scheme: dark) { .sb-text, .sb-page { --sb-ink: #eceef1; --sb-faint: #9aa3af; --sb-hue: 180, 83, 9;
  --sb-line: #fbbf24; --sb-paper: #14171a; --sb-rule: #343a41; } }
.sb-t { unicode-bidi: isolate; position: relative; border-radius: 2px; }
.sb-on { background: rgba(var(--sb-hue), calc(0.12 + 0.6 * var(--a))); padding: 1px 0;
  border-bottom: calc(1px + 3px * var(--a)) solid var(--sb-line); }
.sb-on:focus { outline: 2px solid var(--sb-line); outline-offset: 1px; }
.sb-on:hover::after, .sb-on:focus::after { content: attr(data-v); position: absolute; left: 0; top: 1.6em; z-index: 2;
  background: var(--sb-ink); color: var(--sb-paper); font-size: 11px; line-height: 1.5; padding: 1px 6px; border-radius: 3px;
  white-space: nowrap; }
.sb-space { color: var(--sb-faint); }
.sb-badge { font-size: 10px; font-weight: 600; vertical-align: super; color: var(--sb-line); padding-left: 1px; }
"""
_CONTROL = {code: chr(0x2400 + code) for code in range(32)} | {127: "\u2421"}  # pictures of control characters
_CONTROL |= {ord("\n"): "\u21b5\n", ord("\t"): "\u2192\t"}


def token_html(piece: str, value: float, maximum: float, *, peak: bool = False) -> str:
    """One token; `value` / `maximum` is its strength, and 0 or less leaves it plain."""
    shown = piece.replace(" ", "\u00b7") if piece and not piece.strip(" ") else piece
    text = html.escape(shown.translate(_CONTROL))
    space = " sb-space" if not piece.strip() else ""
    if value <= 0:
        return f'<span class="sb-t{space}">{text}</span>'
    strength = min(1.0, value / maximum) if maximum > 0 else 1.0
    badge = f'<span class="sb-badge">{number(value)}</span>' if peak else ""
    return (
        f'<span class="sb-t sb-on" tabindex="0" style="--a:{strength:.3f}" data-v="{number(value)}" '
        f'aria-label="{html.escape(shown.strip() or "white space", quote=True)}: {number(value)}">{text}</span>{badge}'
    )


def text_html(pieces: Sequence[str], values: Sequence[float], maximum: float, *, peak: int | None = None) -> str:
    """A line of tokens; `peak` is the place of the one that carries its value as a badge."""
    spans = (
        token_html(piece, float(value), maximum, peak=place == peak)
        for place, (piece, value) in enumerate(zip(pieces, values, strict=True))
    )
    return f'<div class="sb-text">{"".join(spans)}</div>'


def number(value: float) -> str:
    """Three significant figures."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")

"""Small bar charts as SVG, for pages that carry no script: one hue for activations, two for changes."""

import html
from collections.abc import Mapping, Sequence

CSS = """
.sb-bars { --sb-bar: light-dark(#d97706, #f59e0b); --sb-down: light-dark(#2563eb, #7da2ff); width: 100%; max-width: 340px; height: 64px; display: block; }
.sb-bars rect { fill: var(--sb-bar); } .sb-bars rect.down { fill: var(--sb-down); }
.sb-bars rect.mark { fill: var(--sb-ink); }
.sb-axis { display: flex; justify-content: space-between; max-width: 340px; font-size: 11px; color: var(--sb-faint); font-variant-numeric: tabular-nums; }
.sb-bars line { stroke: currentColor; stroke-opacity: .35; }
"""
_HEIGHT = 48.0


def bars(
    heights: Sequence[float],
    labels: Sequence[str],
    name: str,
    *,
    down: Sequence[bool] | None = None,
    marks: Mapping[int, str] | None = None,
    axis: Sequence[str] = (),
) -> str:
    """Bars of equal width, each with its label on hover.

    `down` tells those in the second hue, `marks` names places among them, `axis` is written below from left to right.
    """
    tallest = max(max(heights, default=0.0), 1e-30)
    parts = []
    for place, (height, label) in enumerate(zip(heights, labels, strict=True)):
        size = max(_HEIGHT * height / tallest, 0.75) if height > 0 else 0.0
        kind = ' class="down"' if down is not None and down[place] else ""
        parts.append(
            f'<rect{kind} x="{place * 10}" y="{_HEIGHT - size:.2f}" width="9" height="{size:.2f}">'
            f"<title>{html.escape(label)}</title></rect>"
        )
    for place, label in (marks or {}).items():
        parts.append(
            f'<rect class="mark" x="{place * 10 + 3}" y="0" width="3" height="{_HEIGHT}"><title>{html.escape(label)}</title></rect>'
        )
    width = max(len(heights) * 10, 10)
    below = f'<div class="sb-axis">{"".join(f"<span>{html.escape(end)}</span>" for end in axis)}</div>' if axis else ""
    return (
        f'<svg class="sb-bars" viewBox="0 0 {width} {_HEIGHT + 1}" preserveAspectRatio="none" role="img" '
        f'aria-label="{html.escape(name, quote=True)}">{"".join(parts)}'
        f'<line x1="0" x2="{width}" y1="{_HEIGHT + 0.5}" y2="{_HEIGHT + 0.5}"/></svg>{below}'
    )

"""Interactions of tokens as brackets over the text: what is needed together above it, what is enough in any one below, and how well the largest say it."""

import html
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go

from saebench.view import grid
from saebench.view.tokens import alone, number, visible

CSS = """
.sb-sets { direction: rtl; overflow-x: auto; padding: 2px 0 6px; }
.sb-sets:focus-visible { outline: 2px solid var(--sb-line); outline-offset: 2px; }
.sb-sets > div { direction: ltr; display: grid; width: max-content; padding: 0 4px; margin-right: auto; column-gap: 5px; row-gap: 3px;
  font: 13px/1.5 ui-monospace, "Cascadia Mono", "DejaVu Sans Mono", Menlo, Consolas, monospace; }
.sb-sets .text { white-space: pre; text-align: center; unicode-bidi: isolate; color: var(--sb-faint); padding: 3px 0; }
.sb-sets .text.unit { color: var(--sb-ink); padding: 3px 2px; } .sb-sets .text.last { color: var(--sb-ink); outline: 2px solid var(--sb-ink); border-radius: 2px; padding: 3px 2px; }
.sb-sets .band { background: var(--sb-tint); border-radius: 3px; }
.sb-set, .sb-member { --sb-of: var(--sb-bar); } .sb-set.down, .sb-member.down { --sb-of: light-dark(#2563eb, #7da2ff); }
.sb-set { display: flex; flex-direction: column; justify-content: flex-end; gap: 3px; text-align: center; font: 10px/12px system-ui, sans-serif;
  font-variant-numeric: tabular-nums; white-space: nowrap; color: var(--sb-ink); }
.sb-set::after { content: ""; height: 7px; border: solid var(--sb-of); border-width: 1px 1px 0; }
.sb-set.or { flex-direction: column-reverse; } .sb-set.or::after { border-width: 0 1px 1px; }
.sb-set.apart::after { border-style: dashed; }
.sb-member { height: var(--w); background: var(--sb-of); align-self: end; margin-bottom: calc(7px - var(--w) / 2); border-radius: 1px; }
.sb-member.or { align-self: start; margin: calc(7px - var(--w) / 2) 0 0; }
.sb-member.apart { background: repeating-linear-gradient(90deg, var(--sb-of) 0 4px, transparent 4px 7px); }
.sb-key { display: inline-block; width: 18px; height: 5px; border-radius: 1px; margin: 0 4px 2px 10px; background: var(--sb-of); align-self: auto; }
"""
_THICK = (2.0, 8.0)  # pixels of a set of no strength, and of the strongest
_REST = 16  # characters of what is not masked between two units that are shown
_UNIT = 24  # and of a unit
NOTHING = "⋯"
"""in the place of a token that ends the character of the one before"""


class _Column(NamedTuple):
    text: str
    title: str
    kind: str = ""


def brackets_html(found: Mapping[str, Any], most: int) -> str:
    """The `most` largest sets of `Interactions.to_json`, each over the units that are its members.

    A set's line runs from its first unit to its last, thick at its members by strength, in the colour of its sign, and broken where it does not
    count under the other way of masking. The larger a set, the nearer it is to the text; the token that is explained is framed.
    """
    columns, at = _columns(found)
    sets = found["sets"][:most]
    strongest = max((abs(one["strength"]) for one in sets), default=0.0) or 1.0
    above, below = (_lanes([one for one in sets if one["kind"] == kind], at) for kind in ("and", "or"))
    text_row = len(above) + 1
    rows = text_row + len(below)
    parts = [
        f'<i class="band" style="grid-area:1/{column + 1}/{rows + 1}/{column + 2}"></i>'
        for column in sorted(at.values())
    ]
    parts += [
        f'<span class="text {column.kind}" style="grid-area:{text_row}/{place}" title="{_quoted(column.title)}">{html.escape(column.text)}</span>'
        for place, column in enumerate(columns, 1)
    ]
    for lanes, way in ((above, -1), (below, 1)):
        for away, lane in enumerate(lanes, 1):
            parts += [_set_html(one, found, at, text_row + way * away, strongest) for one in lane]
    name = f"{found['scalar']}: {len(sets)} sets of tokens"
    return (
        f'<div class="sb-sets" tabindex="0" role="group" aria-label="{_quoted(name)}"><div style="grid-template-columns:repeat({len(columns)},auto)">'
        f"{''.join(parts)}</div></div>{_key(found, sets)}"
    )


def sets_html(found: Mapping[str, Any], most: int) -> str:
    """The same sets in words, a row each."""
    tried = found["other"] is not None
    columns = [
        grid.Column("", "strength", "by how much it is higher where they are present"), grid.Column("", "tokens", text=True),
        grid.Column("", "order", "how many they are"), grid.Column("", "size", "standard deviation over all maskings of what it adds"),
        *([grid.Column("", f"{found['other']}, too", "whether it counts under the other way of masking")] if tried else []),
    ]  # fmt: skip
    rows = [
        grid.Row([
            _signed(one["strength"]), _whole(in_words(one, found)), str(one["order"]), number(one["size"]),
            *(["yes" if one["agreed"] else "no"] if tried else []),
        ])
        for one in found["sets"][:most]
    ]  # fmt: skip
    return grid.grid_html(columns, rows, "sets of tokens")


def in_words(one: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """`·import AND ·os`."""
    units = (alone(found["units"][unit]["text"]) or NOTHING for unit in one["units"])
    return f" {one['kind'].upper()} ".join(units)


def rebuilt(curve: Sequence[float], most: int) -> go.Figure:
    """R² over all maskings of a constant and the k largest sets, by k, with the number that is shown marked."""
    figure = go.Figure(
        go.Scatter(
            x=list(range(len(curve))), y=list(curve), mode="lines", line={"color": "#D55E00"},
            hovertemplate="%{x} largest sets: R² %{y:.3f}<extra></extra>",
        )
    )  # fmt: skip
    shown = min(most, len(curve) - 1)
    figure.add_scatter(
        x=[shown], y=[curve[shown]], mode="markers", marker={"color": "#0072B2", "size": 9}, hoverinfo="skip"
    )
    figure.update_layout(
        template="plotly_white", height=210, margin={"l": 60, "r": 20, "t": 10, "b": 45}, showlegend=False
    )
    figure.update_xaxes(title="largest sets", rangemode="tozero")
    figure.update_yaxes(title="R² over all maskings", range=[min(0.0, *curve), 1.02])
    return figure


def _columns(found: Mapping[str, Any]) -> tuple[list[_Column], dict[int, int]]:
    """(what is drawn side by side, the column of each unit): units, what stays between them in short, and the token that is explained."""
    of = {place: unit for unit, one in enumerate(found["units"]) for place in one["positions"]}
    pieces, last = found["pieces"], len(found["pieces"]) - 1
    columns, at = [], {}
    for unit, places in itertools.groupby(
        range(len(pieces)), lambda place: len(of) if place == last else of.get(place, -1)
    ):
        text = "".join(pieces[place] for place in places)
        if unit == len(of):
            columns.append(_Column(_short(alone(text), _UNIT) or NOTHING, "here", "last"))
        elif unit >= 0:
            at[unit] = len(columns)
            columns.append(_Column(_short(alone(text), _UNIT) or NOTHING, alone(text), "unit"))
        elif text:
            columns.append(_Column(_short(visible(text), _REST, first=not columns), f"stays: {visible(text[-400:])}"))
    return columns, at


def _short(text: str, most: int, first: bool = False) -> str:
    """Cut to so many characters, in the middle or, of the first text, in front."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"…{text[-most + 1 :]}" if first else f"{text[:half]}…{text[1 - half :]}"


def _lanes(sets: Sequence[Mapping[str, Any]], at: Mapping[int, int]) -> list[list[Mapping[str, Any]]]:
    """Sets in rows from the text outwards, those of a row side by side; each as near as it may be to the text."""
    lanes: list[list[Mapping[str, Any]]] = []
    taken: list[set[int]] = []
    for one in sets:
        first, last = _span(one, at)
        over = set(range(first, last + 1))
        lane = next((place for place, used in enumerate(taken) if not used & over), len(lanes))
        if lane == len(lanes):
            lanes.append([])
            taken.append(set())
        lanes[lane].append(one)
        taken[lane] |= over
    return lanes


def _span(one: Mapping[str, Any], at: Mapping[int, int]) -> tuple[int, int]:
    columns = [at[unit] for unit in one["units"]]
    return min(columns), max(columns)


def _set_html(
    one: Mapping[str, Any], found: Mapping[str, Any], at: Mapping[int, int], row: int, strongest: float
) -> str:
    first, last = _span(one, at)
    kind = " ".join([one["kind"], *["down"] * (one["strength"] < 0), *["apart"] * (one["agreed"] is False)])
    strength = _signed(one["strength"])
    thick = _THICK[0] + (_THICK[1] - _THICK[0]) * abs(one["strength"]) / strongest
    title = _quoted(f"{in_words(one, found)}: {strength}")
    members = "".join(
        f'<i class="sb-member {kind}" style="grid-area:{row}/{at[unit] + 1};--w:{thick:.1f}px" title="{title}"></i>'
        for unit in one["units"]
    )
    return f'<span class="sb-set {kind}" style="grid-area:{row}/{first + 1}/{row + 1}/{last + 2}" title="{title}">{strength}</span>{members}'


def _key(found: Mapping[str, Any], sets: Sequence[Mapping[str, Any]]) -> str:
    """What the signs mean, of those that are there."""
    kinds = {one["kind"] for one in sets}
    said = [
        *(["above: all of them together (AND)"] if "and" in kinds else []), *(["below: any one of them (OR)"] if "or" in kinds else []),
        "framed: where it is explained; grey: stays",
    ]  # fmt: skip
    keys = [("sb-member", "raises")] if any(one["strength"] > 0 for one in sets) else []
    if any(one["strength"] < 0 for one in sets):
        keys.append(("sb-member down", "lowers"))
    if any(one["agreed"] is False for one in sets):
        keys.append(("sb-member apart", f"not when masked the other way ({found['other']})"))
    shown = "".join(
        f' <span style="white-space:nowrap"><i class="{kind} sb-key"></i>{html.escape(text)}</span>'
        for kind, text in keys
    )
    return f"<small>{'; '.join(said)}{shown}</small>"


def _whole(text: str) -> str:
    """A cell that is cut where it is long, and whole on hover."""
    return f'<span title="{_quoted(text)}">{html.escape(text)}</span>'


def _signed(value: float) -> str:
    return ("+" if value > 0 else "−") + number(abs(value))


def _quoted(text: str) -> str:
    return html.escape(text, quote=True)

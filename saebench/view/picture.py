"""A circuit's graph as a picture in SVG: tokens below, layers upwards, the strongest latents of a token and layer in one cell, by their names.

Between two cells is a line for all edges that raise and one for all that lower, as broad as the share of walks that take them, from the
logits against the edges that pruning has left (`circuits.influence`).
"""

import html
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from saebench.view.circuit import latent_of
from saebench.view.tokens import visible

Node = Mapping[str, Any]
Cell = tuple[int, int]
"""(layer, token's position); tokens are of layer -1, logits of one of their own."""
_WIDE, _LETTER, _NODE, _GAP, _RISE = (
    176.0,
    7.4,
    34,
    10,
    66,
)  # a column of latents, a letter, a node, between columns, between layers
_LEFT, _LETTERS, _BROADEST = 48, 26, 36  # of columns, letters of a name, a line that all walks take
_CSS = """
svg { font: 12px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; --ink: #1c2024; --faint: #5b6370; --paper: #fff; --box: #eef4fa;
  --up: #d9772b; --down: #2b7bba; --group: #00795c; }
@media (prefers-color-scheme: dark) { svg { --ink: #eceef1; --faint: #a3acb8; --paper: #14171a; --box: #202a35; --up: #e0853d; --down: #7cc4fa; --group: #4ade80; } }
.paper { fill: var(--paper); } text { fill: var(--ink); } .faint { fill: var(--faint); } .token { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, monospace; }
.box { fill: var(--box); stroke: var(--faint); stroke-width: .6; } .up, .down { fill: none; stroke: var(--up); } .down { stroke: var(--down); stroke-dasharray: 6 3; }
.group { fill: none; stroke: var(--group); stroke-width: 2; } .of { fill: var(--group); font-weight: 600; paint-order: stroke; stroke: var(--paper); stroke-width: 4px; }
"""


class _Box(NamedTuple):
    left: float
    top: float
    width: float
    height: float


def picture(graph: Mapping[str, Any], caption: Sequence[str] = (), *, latents: int = 12, least: float = 0.01) -> str:
    """The SVG of circuit-tracer's JSON that `saebench circuits` writes: the strongest latents, and lines that `least` of all walks take.

    Supernodes are frames around the cells that have their latents; each of `caption` is a line below.
    """
    nodes = {node["node_id"]: node for node in graph["nodes"]}
    flows = _flows(graph)
    through: Counter[str] = Counter()
    for link, size in flows:
        through[link["source"]] += size  # type: ignore[assignment]
    ranked = [one for one, _ in through.most_common() if nodes[one]["feature_type"] == "cross layer transcoder"]
    ends = [one for one, node in nodes.items() if node["feature_type"] in ("embedding", "logit")]
    cells: dict[Cell, list[Node]] = {}
    for one in (*ranked[:latents], *ends):
        cells.setdefault(_cell(nodes[one]), []).append(nodes[one])
    shown = {node["node_id"] for own in cells.values() for node in own}
    lines: Counter[tuple[Cell, Cell, bool]] = Counter()
    for link, size in flows:
        if {link["source"], link["target"]} <= shown:
            lines[_cell(nodes[link["source"]]), _cell(nodes[link["target"]]), link["weight"] > 0] += size  # type: ignore[assignment]
    drawn = {line: size for line, size in lines.most_common() if size >= least}
    used = {cell for source, target, _ in drawn for cell in (source, target)}
    tokens = [_plain(token) for token in graph["metadata"]["prompt_tokens"]]
    boxes = _boxes({cell: len(own) for cell, own in cells.items() if cell in used}, tokens)
    parts = [
        _line(boxes[source], boxes[target], up, drawn[source, target, up]) for source, target, up in [*drawn][::-1]
    ]
    for cell, box in boxes.items():
        parts += _token(box, tokens[cell[1]], cell in used) if cell[0] < 0 else _nodes(box, cells[cell])
    for name, *ids in graph["qParams"].get("supernodes", ()):
        parts += [
            _frame(boxes[cell], name) for cell in boxes if {*ids} & {node["node_id"] for node in cells.get(cell, ())}
        ]
    return _whole(parts, boxes, caption, f"What a model makes of {graph['metadata']['prompt']!r}")


def _plain(text: str) -> str:
    """As it is drawn: control characters as pictures, long runs of spaces by their number."""
    return visible(re.sub(" {3,}", lambda run: f"{len(run[0])}␣", text))


def _cell(node: Node) -> Cell:
    return -1 if node["layer"] == "E" else int(node["layer"]), node["ctx_idx"]


def _flows(graph: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], float]]:
    """Edges with the share of walks that take each."""
    into: dict[str, list[Mapping[str, Any]]] = {}
    for link in graph["links"]:
        into.setdefault(link["target"], []).append(link)
    asked = [node for node in graph["nodes"] if node["feature_type"] == "logit"]
    reached = {node["node_id"]: 1.0 if len(asked) == 1 else node["token_prob"] for node in asked}
    found = []
    for node in sorted(graph["nodes"], key=_cell, reverse=True):  # no edge leads down
        links = into.get(node["node_id"], [])
        total = sum(abs(link["weight"]) for link in links)
        for link in links:
            found.append((link, reached.get(node["node_id"], 0.0) * abs(link["weight"]) / total))
            reached[link["source"]] = reached.get(link["source"], 0.0) + found[-1][1]
    return found


def _boxes(sizes: Mapping[Cell, int], tokens: Sequence[str]) -> dict[Cell, _Box]:
    """Where each cell is, from its nodes' number; all tokens have one, of those beside each other that nothing comes from, the first."""
    tops, bottom = {}, 12.0
    for layer in sorted({layer for layer, _ in sizes if layer >= 0}, reverse=True):
        tops[layer] = bottom
        bottom += _NODE * max(size for (at, _), size in sizes.items() if at == layer) + _RISE
    found, left, used = {}, float(_LEFT), {position for _, position in sizes}
    for position, token in enumerate(tokens):
        if position not in used and position and position - 1 not in used:
            continue
        width = _LETTER * len(token) + 12 if position in used else 24.0
        if any((layer, position) in sizes for layer in tops):
            width = _WIDE
        for layer, top in tops.items():
            if (layer, position) in sizes:
                found[layer, position] = _Box(left, top, width, _NODE * sizes[layer, position])
        found[-1, position] = _Box(left, bottom, width, _NODE)
        left += width + _GAP
    return found


def _line(source: _Box, target: _Box, up: bool, size: float) -> str:
    aside = 8 if up else -8
    x, to_x, y, to_y = (
        source.left + source.width / 2 + aside,
        target.left + target.width / 2 + aside,
        source.top,
        target.top + target.height,
    )
    bend = (y - to_y) / 2
    return (
        f'<path class="{"up" if up else "down"}" stroke-width="{max(1.0, _BROADEST * size):.1f}" '
        f'd="M{x:.0f} {y:.0f}C{x:.0f} {y - bend:.0f} {to_x:.0f} {to_y + bend:.0f} {to_x:.0f} {to_y:.0f}"><title>{size:.1%}</title></path>'
    )


def _token(box: _Box, token: str, used: bool) -> list[str]:
    middle = f'text-anchor="middle" x="{box.left + box.width / 2:.0f}" y="{box.top + 21:.0f}"'
    if not used:
        return [f'<text class="faint" {middle}>…</text>']
    return [_rectangle(box, "box"), f'<text class="token" {middle}>{html.escape(token)}</text>']


def _nodes(box: _Box, nodes: Iterable[Node]) -> list[str]:
    """A cell of latents or logits, two lines of text for each."""
    parts = [_rectangle(box, "box")]
    for place, node in enumerate(nodes):
        if node["feature_type"] == "logit":
            above, _, below = node["clerp"].removeprefix("Output ").rstrip(")").partition(" (")
        else:
            above, below = node["clerp"].strip("‘’").split("; ")[0], f"L{node['layer']}/{latent_of(node)}"
        above = _plain(above)
        above = above if len(above) <= _LETTERS else above[: _LETTERS - 1] + "…"
        at = f'x="{box.left + 8:.0f}" y="{{:.0f}}"'
        parts += [
            f"<g><title>{html.escape(node['clerp'])}</title>"
            f"<text {at.format(box.top + _NODE * place + 14)}>{html.escape(above)}</text>"
            f'<text class="faint" {at.format(box.top + _NODE * place + 28)}>{html.escape(below)}</text></g>'
        ]
    return parts


def _frame(box: _Box, name: str) -> str:
    around = _Box(box.left - 4, box.top - 4, box.width + 8, box.height + 8)
    return f'{_rectangle(around, "group")}<text class="of" x="{box.left:.0f}" y="{box.top - 9:.0f}">{html.escape(_plain(name))}</text>'


def _rectangle(box: _Box, kind: str) -> str:
    return f'<rect class="{kind}" x="{box.left:.0f}" y="{box.top:.0f}" width="{box.width:.0f}" height="{box.height:.0f}" rx="6"/>'


def _whole(parts: Sequence[str], boxes: Mapping[Cell, _Box], caption: Sequence[str], about: str) -> str:
    width = max(box.left + box.width for box in boxes.values()) + 12
    bottom = max(box.top + box.height for box in boxes.values()) + 26
    height, highest = bottom + 20 * len(caption) - 8, max(layer for layer, _ in boxes)
    layers = {layer: box.top + 21 for (layer, _), box in boxes.items()}
    names = {-1: "", highest: "logit"}
    texts = [
        f'<text class="faint" x="12" y="{y:.0f}">{names.get(layer, f"L{layer}")}</text>' for layer, y in layers.items()
    ]
    texts += [
        f'<text x="{_LEFT}" y="{bottom + 20 * n:.0f}">{html.escape(_plain(line))}</text>'
        for n, line in enumerate(caption)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img" '
        f'aria-label="{html.escape(about, quote=True)}"><style>{_CSS}</style><rect class="paper" width="{width:.0f}" height="{height:.0f}" rx="8"/>'
        f"{''.join([*parts, *texts])}</svg>\n"
    )

"""A circuit's graph as a figure: layers upwards, tokens to the right; and as what goes into a node and comes out of it."""

import html
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

KINDS = {
    "embedding": ("token", "square", "#8a8a8a"),
    "cross layer transcoder": ("latent", "circle", "#0072B2"),
    "mlp reconstruction error": ("error", "diamond", "#CC79A7"),
    "logit": ("logit", "star", "#009E73"),
    "group": ("group", "square", "#E69F00"),
}
"""`feature_type` of a node -> what it is called, its marker and colour"""
GROUP = "group:"
"""what the id of a group's node begins with"""
_PINNED = KINDS["group"][2]
_SIGNS = {1: ("raises", "#D55E00"), -1: ("lowers", "#56B4E9")}
_EDGES = 200  # drawn at most, those of the largest weight
_TALLEST = 900  # pixels of all layers
_SPREAD = 0.8  # of a token's column that nodes of one place take
_BESIDE = 4  # nodes in a column of the least width


def grouped(graph: Mapping[str, Any], groups: Mapping[str, Collection[str]]) -> dict[str, Any]:
    """The graph with a node for each group, `group:NAME`, which has its members' edges, summed; those within it go."""
    nodes = {node["node_id"]: node for node in graph["nodes"]}
    home = {id: GROUP + name for name, own in groups.items() for id in own if id in nodes}
    made = [node for id, node in nodes.items() if id not in home]
    for name, own in groups.items():
        if members := [nodes[id] for id in own if id in nodes]:
            layers = [int(one["layer"]) for one in members if one["layer"].isdigit()]
            reached = [one["influence"] for one in members if one["influence"] is not None]
            made.append({
                "node_id": GROUP + name, "feature_type": "group", "clerp": name, "members": members,
                "layer": str(round(sum(layers) / len(layers))) if layers else "E",
                "ctx_idx": round(sum(one["ctx_idx"] for one in members) / len(members)), "influence": min(reached, default=None),
            })  # fmt: skip
    weights: dict[tuple[str, str], float] = {}
    for link in graph["links"]:
        source, target = (str(home.get(link[end], link[end])) for end in ("source", "target"))
        if source != target:
            weights[source, target] = weights.get((source, target), 0.0) + link["weight"]
    links = [{"source": source, "target": target, "weight": weight} for (source, target), weight in weights.items()]
    return {**graph, "nodes": made, "links": links}


def shown_nodes(graph: Mapping[str, Any], reached: float, pins: Collection[str] = ()) -> list[dict[str, Any]]:
    """Nodes by which `reached` of the influence comes; tokens, logits, groups and what is pinned always."""
    return [
        node
        for node in graph["nodes"]
        if node["influence"] is None
        or node["influence"] <= reached
        or node["feature_type"] in ("embedding", "group")
        or node["node_id"] in pins
    ]


def links_of(graph: Mapping[str, Any], node: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(edges into a node, edges out of it), the largest first."""
    by_size = sorted(graph["links"], key=lambda link: -abs(link["weight"]))
    return [link for link in by_size if link["target"] == node], [link for link in by_size if link["source"] == node]


def title_of(node: Mapping[str, Any], tokens: Sequence[str]) -> str:
    """A node in words."""
    kind, at = KINDS[node["feature_type"]][0], f"{tokens[node['ctx_idx']]!r} ({node['ctx_idx']})"
    if kind == "token":
        return at
    if kind == "logit":
        return node["clerp"]
    if kind == "group":
        return f"{node['clerp']}: {len(node['members'])} node{'s' * (len(node['members']) > 1)} together"
    if kind == "error":
        return f"error of layer {node['layer']} at {at}"
    name = f" {node['clerp']}" if node["clerp"] else ""
    return f"L{node['layer']}/{latent_of(node)}{name} at {at}"


def latent_of(node: Mapping[str, Any]) -> int:
    """The number of a latent's node."""
    return int(node["node_id"].split("_")[1])


def circuit(
    graph: Mapping[str, Any], reached: float, chosen: Collection[str] = (), pins: Collection[str] = (), *, marked: bool = False
) -> go.Figure:  # fmt: skip
    """The graph of circuit-tracer's JSON that `saebench circuits` writes; `customdata` of a marker is its node.

    With nodes `chosen`, their edges alone; of what is `marked` alone, pins, groups and logits.
    """
    tokens, nodes = graph["metadata"]["prompt_tokens"], shown_nodes(graph, reached, pins)
    if marked:
        nodes = [one for one in nodes if one["node_id"] in pins or one["feature_type"] in ("group", "logit")]
    layers = sorted({int(node["layer"]) for node in nodes if node["layer"].isdigit()})
    heights = {"E": 0} | {str(layer): place for place, layer in enumerate(layers, start=1)}
    places, middles = _places(nodes, heights, len(tokens))
    figure = go.Figure()
    edges = [link for link in graph["links"] if link["source"] in places and link["target"] in places]
    edges = [link for link in edges if not chosen or link["source"] in chosen or link["target"] in chosen]
    edges = sorted(edges, key=lambda link: -abs(link["weight"]))[:_EDGES]
    strong = bool(chosen) or marked
    for sign, (verb, colour) in _SIGNS.items():
        ends = [(places[link["source"]], places[link["target"]]) for link in edges if link["weight"] * sign > 0]
        figure.add_scatter(
            x=[x for one, other in ends for x in (one[0], other[0], None)],
            y=[y for one, other in ends for y in (one[1], other[1], None)],
            mode="lines", name=verb, hoverinfo="skip", opacity=0.75 if strong else 0.3, line={"color": colour, "width": 1.5 if strong else 1},
        )  # fmt: skip
    for kind, (name, symbol, colour) in KINDS.items():
        own = [node for node in nodes if node["feature_type"] == kind]
        size = 20 if kind == "group" else 10
        figure.add_scatter(
            x=[places[node["node_id"]][0] for node in own], y=[places[node["node_id"]][1] for node in own],
            mode="markers", name=name, customdata=[node["node_id"] for node in own], showlegend=bool(own),
            marker={
                "symbol": symbol, "color": colour, "size": [size + 5 * (node["node_id"] in chosen) for node in own], "opacity": 1,
                "line": {"width": [3 * (node["node_id"] in pins) for node in own], "color": _PINNED},
            },
            text=[_hover(node, tokens) for node in own], hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
    for node in nodes:
        if node["feature_type"] == "group":
            x, y = places[node["node_id"]]
            name, end = f"{node['clerp']} ({len(node['members'])})", "right" if x > 0.8 * middles[-1] else "left"
            figure.add_annotation(x=x, y=y, text=html.escape(name), xanchor=end, yshift=22, showarrow=False)
    names = {"E": "tokens"} | {layer: f"L{layer}" for layer in heights if layer != "E"}
    top = max(heights, key=lambda layer: heights[layer])
    figure.update_layout(
        template="plotly_white", height=160 + min(90 * len(heights), _TALLEST), margin={"l": 60, "r": 20, "t": 50, "b": 70},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom"}, hoverlabel={"align": "left"},
    )  # fmt: skip
    figure.update_xaxes(
        tickvals=middles, ticktext=[html.escape(token.replace("\n", "↵")) for token in tokens],
        showgrid=False, zeroline=False,
    )  # fmt: skip
    figure.update_yaxes(
        tickvals=list(heights.values()), ticktext=["logits" if layer == top else names[layer] for layer in heights], zeroline=False
    )  # fmt: skip
    return figure


def _hover(node: Mapping[str, Any], tokens: Sequence[str]) -> str:
    return "<br>".join(html.escape(title_of(one, tokens)) for one in (node, *node.get("members", ())))


def _places(
    nodes: Sequence[Mapping[str, Any]], heights: Mapping[str, int], n_tokens: int
) -> tuple[dict[str, tuple[float, float]], list[float]]:
    """(where each node is, those of one token and layer beside each other; the middle of each token's column, which is as wide as they need)."""
    groups: dict[tuple[int, str], list[str]] = {}
    for node in nodes:
        groups.setdefault((node["ctx_idx"], node["layer"]), []).append(node["node_id"])
    widths = [1.0] * n_tokens
    for (position, _), group in groups.items():
        widths[position] = max(widths[position], len(group) / _BESIDE)
    middles = [sum(widths[:at]) + (width - 1) / 2 for at, width in enumerate(widths)]
    places = {
        node: (middles[position] + _SPREAD * widths[position] * ((place + 0.5) / len(group) - 0.5), float(heights[layer]))
        for (position, layer), group in groups.items()
        for place, node in enumerate(group)
    }  # fmt: skip
    return places, middles

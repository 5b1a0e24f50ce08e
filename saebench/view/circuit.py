"""A circuit's graph as a figure: layers upwards, tokens to the right; and as what goes into a node and comes out of it."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

KINDS = {
    "embedding": ("token", "square", "#8a8a8a"),
    "cross layer transcoder": ("latent", "circle", "#0072B2"),
    "mlp reconstruction error": ("error", "diamond", "#CC79A7"),
    "logit": ("logit", "star", "#009E73"),
}
"""`feature_type` of a node -> what it is called, its marker and colour"""
_SIGNS = {1: ("raises", "#D55E00"), -1: ("lowers", "#56B4E9")}
_EDGES = 200  # drawn at most, those of the largest weight
_SPREAD = 0.8  # of the room between two tokens that nodes of one place take


def shown_nodes(graph: Mapping[str, Any], reached: float) -> list[dict[str, Any]]:
    """Nodes by which `reached` of the influence comes, tokens and logits always."""
    return [
        node
        for node in graph["nodes"]
        if node["influence"] is None or node["influence"] <= reached or node["feature_type"] == "embedding"
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
    if kind == "error":
        return f"error of layer {node['layer']} at {at}"
    name = f" {node['clerp']}" if node["clerp"] else ""
    return f"L{node['layer']}/{latent_of(node)}{name} at {at}"


def latent_of(node: Mapping[str, Any]) -> int:
    """The number of a latent's node."""
    return int(node["node_id"].split("_")[1])


def circuit(graph: Mapping[str, Any], reached: float, chosen: str = "") -> go.Figure:
    """The graph of circuit-tracer's JSON that `saebench circuits` writes; `customdata` of a marker is its node.

    With a node `chosen`, its edges alone.
    """
    tokens, nodes = graph["metadata"]["prompt_tokens"], shown_nodes(graph, reached)
    layers = sorted({int(node["layer"]) for node in nodes if node["layer"].isdigit()})
    heights = {"E": 0} | {str(layer): place for place, layer in enumerate(layers, start=1)}
    places = _places(nodes, heights)
    figure = go.Figure()
    edges = [link for link in graph["links"] if link["source"] in places and link["target"] in places]
    edges = [link for link in edges if not chosen or chosen in (link["source"], link["target"])]
    edges = sorted(edges, key=lambda link: -abs(link["weight"]))[:_EDGES]
    for sign, (verb, colour) in _SIGNS.items():
        ends = [(places[link["source"]], places[link["target"]]) for link in edges if link["weight"] * sign > 0]
        figure.add_scatter(
            x=[x for one, other in ends for x in (one[0], other[0], None)],
            y=[y for one, other in ends for y in (one[1], other[1], None)],
            mode="lines", name=verb, hoverinfo="skip", opacity=0.75 if chosen else 0.3, line={"color": colour, "width": 1.5 if chosen else 1},
        )  # fmt: skip
    for kind, (name, symbol, colour) in KINDS.items():
        own = [node for node in nodes if node["feature_type"] == kind]
        figure.add_scatter(
            x=[places[node["node_id"]][0] for node in own], y=[places[node["node_id"]][1] for node in own],
            mode="markers", name=name, customdata=[node["node_id"] for node in own],
            marker={
                "symbol": symbol, "color": colour, "size": [15 if node["node_id"] == chosen else 10 for node in own],
                "line": {"width": [2 if node["node_id"] == chosen else 0 for node in own], "color": "#1d1d1f"},
            },
            text=[html.escape(title_of(node, tokens)) for node in own], hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
    names = {"E": "tokens"} | {layer: f"L{layer}" for layer in heights if layer != "E"}
    top = max(heights, key=lambda layer: heights[layer])
    figure.update_layout(
        template="plotly_white", height=140 + 90 * len(heights), margin={"l": 60, "r": 20, "t": 10, "b": 70},
        legend={"orientation": "h", "y": 1.08}, hoverlabel={"align": "left"},
    )  # fmt: skip
    figure.update_xaxes(
        tickvals=list(range(len(tokens))), ticktext=[html.escape(token.replace("\n", "↵")) for token in tokens], showgrid=False, zeroline=False
    )  # fmt: skip
    figure.update_yaxes(
        tickvals=list(heights.values()), ticktext=["logits" if layer == top else names[layer] for layer in heights], zeroline=False
    )  # fmt: skip
    return figure


def _places(nodes: Sequence[Mapping[str, Any]], heights: Mapping[str, int]) -> dict[str, tuple[float, float]]:
    """Where each node is: those of one token and layer beside each other."""
    groups: dict[tuple[int, str], list[str]] = {}
    for node in nodes:
        groups.setdefault((node["ctx_idx"], node["layer"]), []).append(node["node_id"])
    return {
        node: (position + _SPREAD * ((place + 0.5) / len(group) - 0.5), float(heights[layer]))
        for (position, layer), group in groups.items()
        for place, node in enumerate(group)
    }

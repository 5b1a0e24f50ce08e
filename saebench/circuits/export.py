"""A graph in circuit-tracer's JSON, which its viewer and Neuronpedia's show: metadata, qParams, nodes and links."""

from collections.abc import Callable, Sequence
from itertools import product
from textwrap import shorten
from typing import Any

from saebench.circuits.graph import Graph, Logit
from saebench.circuits.groups import Marks
from saebench.circuits.influence import Pruned

Named = Callable[[int], str]
"""What a latent of a graph is called, by its node; empty where it has no name."""
_NAME = 60  # letters of a name in a sentence


def as_json(
    graph: Graph, pruned: Pruned, slug: str, scan: str, prompt: str, token: Callable[[int], str], named: Named,
    node_threshold: float, marks: Marks,
) -> dict[str, Any]:  # fmt: skip
    """The nodes and edges that pruning leaves, under a name of letters, digits and `-_` (`slug`).

    `scan` says which transcoders they are of, `token` what an id shows.
    """
    nodes, before, ids = {}, graph.error_nodes.stop, node_ids(graph)
    for node in pruned.nodes.nonzero()[:, 0].tolist():
        if node < graph.n_latents:
            made = _latent(graph, node, named(node))
        elif node < before:
            made = _error(graph, node - graph.n_latents)
        elif node < graph.token_nodes.stop:
            made = _embedding(graph, node - before)
        else:
            made = _logit(graph, node - graph.token_nodes.stop, token)
        nodes[node] = (
            made
            | {"node_id": ids[node]}
            | ({} if made["feature_type"] == "logit" else {"influence": float(pruned.reached[node])})
        )
    adjacency, links = graph.adjacency, []
    for target, source in pruned.edges.nonzero().tolist():
        ends = {"source": nodes[source]["node_id"], "target": nodes[target]["node_id"]}
        links.append(ends | {"weight": float(adjacency[target, source])})
    linked = {link[end] for link in links for end in ("source", "target")}
    linked |= {*marks.pins}
    shown = [
        node for node in nodes.values() if node["node_id"] in linked or node["feature_type"] in ("embedding", "logit")
    ]
    metadata = {
        "slug": slug, "scan": scan, "transcoder_list": [], "prompt_tokens": [token(int(i)) for i in graph.ids],
        "prompt": prompt, "node_threshold": node_threshold, "schema_version": 1,
    }  # fmt: skip
    view = marks.params() | {"linkType": "both", "clickedId": "", "sg_pos": ""}
    return {"metadata": metadata, "qParams": view, "nodes": shown, "links": links}


def node_ids(graph: Graph) -> list[str]:
    """What each node is called in the file, by its number."""
    which, last = graph.latents, len(graph.ids) - 1
    columns = (graph.latent_layers.tolist(), which.latent.tolist(), which.position.tolist())
    return [
        *(f"{layer}_{latent}_{position}" for layer, latent, position in zip(*columns, strict=True)),
        # Theirs is 0_LAYER_POSITION, which is also latent LAYER of layer 0 there.
        *(f"{layer}_error_{position}" for layer, position in product(graph.layers, range(last + 1))),
        *(f"E_{token}_{position}" for position, token in enumerate(graph.ids.tolist())),
        *(f"{graph.layers[-1] + 2}_{logit.token}_{last}" for logit in graph.logits),
    ]


def logit_text(logit: Logit, token: Callable[[int], str]) -> str:
    """`' a'`, or `' a' over ' b'`."""
    return repr(token(logit.token)) + ("" if logit.against is None else f" over {token(logit.against)!r}")


def _node(js: str, feature: int, layer: str, position: int, kind: str, **more: Any) -> dict[str, Any]:
    usual = {"token_prob": 0.0, "is_target_logit": False, "run_idx": 0, "reverse_ctx_idx": 0, "clerp": ""}
    about = {
        "feature": feature,
        "layer": layer,
        "ctx_idx": position,
        "feature_type": kind,
        "jsNodeId": js,
    }
    return about | usual | {"influence": None, "activation": None} | more


def _latent(graph: Graph, node: int, name: str) -> dict[str, Any]:
    layer, position, latent = (
        int(column[node]) for column in (graph.latent_layers, graph.latents.position, graph.latents.latent)
    )
    paired = (layer + latent) * (layer + latent + 1) // 2 + latent  # Cantor's number of the two
    return _node(
        f"{layer}_{latent}-0", paired, str(layer), position, "cross layer transcoder",
        activation=float(graph.latents.activation[node]), clerp=name,
    )  # fmt: skip


def _error(graph: Graph, place: int) -> dict[str, Any]:
    at, position = divmod(place, len(graph.ids))
    layer = graph.layers[at]
    return _node(f"{layer}_{position}-0", -1, str(layer), position, "mlp reconstruction error")


def _embedding(graph: Graph, position: int) -> dict[str, Any]:
    token = int(graph.ids[position])
    return _node(f"E_{token}-{position}", position, "E", position, "embedding")


def _logit(graph: Graph, place: int, token: Callable[[int], str]) -> dict[str, Any]:
    logit, layer, position = graph.logits[place], str(graph.layers[-1] + 2), len(graph.ids) - 1
    return _node(
        f"L_{logit.token}-{position}", logit.token, layer, position, "logit",
        token_prob=logit.probability, is_target_logit=place == 0,
        clerp=f"Output {logit_text(logit, token)} (p={logit.probability:.3f})",
    )  # fmt: skip


def title_of(node: int, graph: Graph, named: Named, token: Callable[[int], str]) -> str:
    """A latent, a token, the stream in its place, or a logit, in words."""
    size = graph.edges.shape[1]
    if node >= size:
        return logit_text(graph.logits[node - size], token)
    if node >= graph.token_nodes.start:
        position = node - graph.token_nodes.start
        words = f"{token(int(graph.ids[position]))!r} ({position})"
        # What enters the set is more than the token where layers lie below.
        return f"the stream into L{graph.layers[0]} at {words}" if graph.layers[0] else words
    position, latent = int(graph.latents.position[node]), int(graph.latents.latent[node])
    name = f" {shorten(named(node), _NAME, placeholder='…')}" if named(node) else ""
    return f"L{int(graph.latent_layers[node])}/{latent}{name} at {token(int(graph.ids[position]))!r} ({position})"


def told(path: Sequence[int], graph: Graph, named: Named, token: Callable[[int], str]) -> str:
    """A path as a sentence: from a token, or the stream in its place, through latents, to a logit; what raises what by its edges' signs."""
    parts, size = [], graph.edges.shape[1]
    for place, node in enumerate(path):
        words = title_of(node, graph, named, token)
        if place:
            row = node if node < graph.n_latents else node - size + graph.n_latents
            verb = "raises" if graph.edges[row, path[place - 1]] > 0 else "lowers"
            words = f"{', which ' if place > 1 else ' '}{verb} {words}"
        parts.append(words)
    return "".join(parts)

"""Graphs of a run's circuits: layers upwards, tokens to the right, a node's inputs and outputs, and how far it can be trusted."""

import html
from pathlib import Path
from typing import Any

import streamlit as st
from opened import Files, files_of
from shell import clickable, said
from where import chosen_run, link_to, root

from saebench.circuits.groups import read_circuit
from saebench.circuits.run import CIRCUITS
from saebench.view import circuit, grid
from saebench.view.markdown import code, plain

OPTIONS = {"displaylogo": False}
SHOWN = 40  # edges of a node that are listed


@st.cache_data(show_spinner=False, max_entries=16)
def graph_of(path: str, files: Files) -> dict[str, Any]:
    return read_circuit(Path(path))


def figures(graph: dict[str, Any]) -> None:
    own = graph["metadata"]["saebench"]
    held, scores = own["agreement"], own["scores"]
    said_of = {"replacement score": scores["replacement"], "completeness": scores["completeness"]}
    said_of |= {"later latents foretold": held["latents"], "logits foretold": held["logits"]}
    said_of |= {"… with attention and norms free": held["latents_free"], "… of logits": held["logits_free"]}
    columns = [grid.Column("", heading) for heading in said_of]
    clickable(grid.grid_html(columns, [grid.Row([shown(value) for value in said_of.values()])], "scores"), "scores")
    st.caption(
        f"{own['active']:,} latents are active. Foretold: correlation of changes with what the graph says, {len(held['ablated'])} latents ablated "
        "one at a time."
    )


def shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def edges(graph: dict[str, Any], node: dict[str, Any]) -> None:
    """What goes into a node and comes out of it."""
    tokens, nodes = graph["metadata"]["prompt_tokens"], {one["node_id"]: one for one in graph["nodes"]}
    st.subheader(plain(circuit.title_of(node, tokens)))
    if node["feature_type"] == "cross layer transcoder":
        st.markdown(f"[Its page]({address(graph, node)})")
    into, out_of = circuit.links_of(graph, node["node_id"])
    for column, heading, links, end in zip(
        st.columns(2), ("From", "To"), (into, out_of), ("source", "target"), strict=True
    ):
        rows = [
            grid.Row([html.escape(circuit.title_of(nodes[link[end]], tokens)), f"{link['weight']:+.2f}"], link[end])
            for link in links[:SHOWN]
        ]
        with column:
            columns = [grid.Column("", heading, text=True), grid.Column("", "effect")]
            clickable(grid.grid_html(columns, rows, heading), f"edges {heading}", choose)


def address(graph: dict[str, Any], node: dict[str, Any]) -> str:
    """Of a latent's page."""
    own = graph["metadata"]["saebench"]
    return link_to(
        "features", sae=own["members"][int(node["layer"]) - own["first_layer"]], latent=circuit.latent_of(node)
    )


def choose(node: str) -> None:
    st.query_params["node"] = node


def show(path: Path) -> None:
    graph = graph_of(str(path), files_of(path))
    st.code(graph["metadata"]["prompt"], language=None)
    figures(graph)
    for sentence in graph["metadata"]["saebench"].get("sentences", ()):
        st.markdown(f"- {plain(sentence)}")
    reached = st.slider("Share of influence shown", 0.1, 1.0, 0.8, 0.05, key="reached", bind="query-params")
    nodes = {node["node_id"]: node for node in graph["nodes"]}
    node = nodes.get(st.query_params.get("node", ""))

    def picked() -> None:
        points = st.session_state["circuit"]["selection"]["points"]
        if points and points[0].get("customdata") in nodes:
            choose(points[0]["customdata"])
        else:
            st.query_params.pop("node", None)

    figure = circuit.circuit(graph, reached, node["node_id"] if node else "")
    st.plotly_chart(figure, key="circuit", selection_mode="points", on_select=picked, config=OPTIONS)
    if node:
        edges(graph, node)
    else:
        st.caption("A point shows its inputs and outputs, and the way to its page. Orange raises, blue lowers.")


st.title("Circuits")
run = chosen_run()
if run is None:
    st.info(f"No run under {code(str(root()))} yet.")
    st.stop()
there = {path.stem: path for path in sorted((run / CIRCUITS).glob("*.json"))}
if not there:
    command = f"saebench circuits --run {run} --set NAME --prompt TEXT"
    st.info(f"No circuit here yet: {code(command)} makes one, through the transcoders of a set.")
    st.stop()
with said():
    name = st.selectbox("Graph", list(there), key="graph", bind="query-params")
    show(there[name or next(iter(there))])

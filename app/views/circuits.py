"""Graphs of a run's circuits: layers upwards, tokens to the right; what goes into a node and comes out of it, pins, groups, and what interventions do."""

import html
from pathlib import Path
from typing import Any

import streamlit as st
from opened import Files, files_of
from shell import clickable, offer, said
from where import chosen_run, link_to, root

from saebench.circuits.groups import Marks, change_marks, forget, marks_of, read_circuit
from saebench.circuits.run import graphs_of
from saebench.view import circuit, grid
from saebench.view.circuit import GROUP
from saebench.view.markdown import code, plain

OPTIONS = {"displaylogo": False}
SHOWN = 40  # edges of a node that are listed
SHOW = {"All": False, "Pinned and groups": True}
LATENT = "cross layer transcoder"


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
    """What goes into a node or a group and comes out of it."""
    tokens, nodes = graph["metadata"]["prompt_tokens"], {one["node_id"]: one for one in graph["nodes"]}
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


def latents_page(run: Path, graph: dict[str, Any], node: dict[str, Any]) -> str:
    """Links to a latent's page, and to steering with it, as strongly as it is active here; of a set that lies elsewhere none."""
    own, latent = graph["metadata"]["saebench"], circuit.latent_of(node)
    sae = own["members"][int(node["layer"]) - own["first_layer"]]
    if not (run / "saes" / sae).exists():
        return f"Latent {latent} of {code(sae)}"
    turns = f"{latent}:add:{node['activation']:.3g}"
    return f"[Its page]({link_to('features', sae=sae, latent=latent)}) · [Steer with it]({link_to('steering', sae=sae, turns=turns)})"


def choose(*nodes: str) -> None:
    st.query_params["node"] = list(nodes)


def mark(path: Path, marks: Marks, chosen: list[str]) -> None:
    """Pin what is chosen, and put it into a group or take it out."""
    members = [id for one in chosen for id in marks.groups.get(one.removeprefix(GROUP), [one])]
    (group, *others) = {next((name for name, own in marks.groups.items() if id in own), None) for id in members}

    def change(change: Any) -> None:
        with said():
            change_marks(path, change)

    def pin() -> None:
        change(lambda now: now.pinned(members))

    def unpin() -> None:
        def without(now: Marks) -> Marks:
            for id in members:
                now = now.unpinned(id)
            return now

        change(without)
        choose(*members)

    def put() -> None:
        name = (st.session_state[key] or "").strip()
        if not name:
            return
        change(lambda now: now.grouped({name: (*now.groups.get(name, ()), *members)}))
        choose(GROUP + name)

    left, right = st.columns([1, 3], vertical_alignment="bottom")
    if set(members) <= {*marks.pins}:
        left.button("Unpin", on_click=unpin, help="Out of its group, too")
    else:
        left.button("Pin", on_click=pin, help="Shown whatever its influence, here and in circuit-tracer's viewer")
    names, key = list(marks.groups), f"group of {' '.join(members)}, {group}"
    right.selectbox(
        "Group", names, index=None if others or group is None else names.index(group), key=key, on_change=put, accept_new_options=True,
        placeholder="none; choose one, or type a name for a new one",
    )  # fmt: skip


def intervene(run: Path, name: str, on: list[str]) -> None:
    """Scale a group or latents in the model, beside what the graph says: a command."""
    left, right = st.columns([1, 3], vertical_alignment="bottom")
    factor = left.number_input("Factor", value=0.0, step=0.5, key="factor", help="Of their activations: 0 ablates")
    held = right.checkbox(
        "Hold other latents up to the last layer of these (constrained patching)", key="held", bind="query-params"
    )
    acts = "; ".join(f"{one}*{factor:g}" for one in on)
    arguments = ["circuits", "--run", str(run), "--name", name, "--intervene", acts]
    offer(f"Try {acts}" if len(acts) < 60 else "Try it", [*arguments, *["--constrained"] * held], run)


def interventions(path: Path, graph: dict[str, Any], marks: Marks) -> None:
    """What was tried, and what it did."""
    for number, one in enumerate(graph["metadata"]["saebench"].get("interventions", ())):
        title = plain(one["acts"]) + ", other latents up to its layers held" * one["constrained"]
        with st.expander(f"**{title}**", expanded=number == 0):
            if one["groups"] != marks.params()["supernodes"]:
                st.caption("The groups were others then: try it again.")
            headings = ("before", "predicted", "measured", "with attention and norms free")
            columns = [grid.Column("", "sum of activations, or logit", text=True)]
            columns += [grid.Column("", heading) for heading in headings]
            rows = [grid.Row([html.escape(of), *(f"{value:z.2f}" for value in row)]) for of, *row in one["effects"]]
            clickable(grid.grid_html(columns, rows, one["acts"]), f"effects {number}")
            st.button("Forget", key=f"forget {number}", on_click=forget, args=(path, one["acts"], one["constrained"]))


def show(run: Path, path: Path) -> None:
    whole = graph_of(str(path), files_of(path))
    marks = marks_of(whole["qParams"], path)
    graph = circuit.grouped(whole, marks.groups)
    st.code(graph["metadata"]["prompt"], language=None)
    figures(graph)
    for sentence in graph["metadata"]["saebench"].get("sentences", ()):
        st.markdown(f"- {plain(sentence)}")
    left, right = st.columns([3, 2])
    reached = left.slider("Share of influence shown", 0.1, 1.0, 0.8, 0.05, key="reached", bind="query-params")
    view = right.segmented_control("Show", list(SHOW), default="All", key="marked", bind="query-params")
    nodes = {node["node_id"]: node for node in graph["nodes"]}
    everything = nodes | {node["node_id"]: node for node in whole["nodes"]}
    chosen = [id for id in st.query_params.get_all("node") if id in everything]

    def picked() -> None:
        points = st.session_state["circuit"]["selection"]["points"]
        choose(*dict.fromkeys(point["customdata"] for point in points if point.get("customdata") in nodes))

    boxes = {id: GROUP + name for name, own in marks.groups.items() for id in own}
    drawn = [boxes.get(id, id) for id in chosen]
    figure = circuit.circuit(graph, reached, drawn, marks.pins, marked=SHOW[view or "All"])
    modes = ("points", "box", "lasso")
    st.plotly_chart(figure, key="circuit", selection_mode=modes, on_select=picked, config=OPTIONS)
    if not chosen:
        st.caption(
            "A point shows its inputs and outputs, and the way to its page; box and lasso, in the chart's corner, choose several. What is "
            "chosen can be pinned, grouped and turned off. Orange raises, blue lowers; a ring is a pin."
        )
    else:
        about(run, path, graph, [everything[id] for id in chosen], marks)
    interventions(path, graph, marks)
    if len(chosen) == 1:
        edges(graph if chosen[0] in nodes else whole, everything[chosen[0]])


def about(run: Path, path: Path, graph: dict[str, Any], chosen: list[dict[str, Any]], marks: Marks) -> None:
    """What is chosen: its name, its marks, and what can be done to it."""
    tokens = graph["metadata"]["prompt_tokens"]
    st.subheader(plain(circuit.title_of(chosen[0], tokens) if len(chosen) == 1 else f"{len(chosen)} nodes"))
    members = [member for one in chosen for member in one.get("members", [one])]
    if members == chosen and len(chosen) == 1 and chosen[0]["feature_type"] == LATENT:
        st.markdown(latents_page(run, graph, chosen[0]))
    mark(path, marks, [one["node_id"] for one in chosen])
    if members != chosen or len(chosen) > 1:
        rows = [grid.Row([html.escape(circuit.title_of(one, tokens))], one["node_id"]) for one in members]
        clickable(grid.grid_html([grid.Column("", "Nodes", text=True)], rows, "members"), "members", choose)
    on = [one for one in chosen if any(each["feature_type"] == LATENT for each in one.get("members", [one]))]
    if on:
        intervene(run, path.stem, [one["node_id"].removeprefix(GROUP) for one in on])


st.title("Circuits")
run = chosen_run()
if run is None:
    st.info(f"No run under {code(str(root()))} yet.")
    st.stop()
there = graphs_of(run)
if not there:
    command = f"saebench circuits --run {run} --set NAME --prompt TEXT"
    st.info(f"No circuit here yet: {code(command)} makes one, through the transcoders of a set.")
    st.stop()
with said():
    name = st.selectbox("Graph", list(there), key="graph", bind="query-params")
    show(run, there[name or next(iter(there))])

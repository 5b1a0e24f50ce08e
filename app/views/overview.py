"""What there is: a run's SAEs with their figures, the Pareto plot, how they were trained, and what is missing."""

import html
from pathlib import Path
from typing import Any

import streamlit as st
from opened import Files, files_of, table_of
from shell import clickable, missing, offer, plain_table, said
from where import chosen_run, chosen_sae, go, link_to, root

from saebench.browse.runs import Trained, saes_of
from saebench.browse.stores import norms_html
from saebench.evaluate.compare import BASELINES
from saebench.evaluate.report import SUMMARY
from saebench.evaluate.tables import refitted_table, set_table
from saebench.files import read_json
from saebench.store import open_store
from saebench.store.norms import NormReport, describe, norm_report
from saebench.store.schema import MANIFEST
from saebench.view import charts, grid
from saebench.view.markdown import code, plain

COLUMNS = {
    "name": ("SAE", ""),
    "architecture": ("architecture", ""),
    "hook": ("hook", ""),
    "d_sae": ("latents", ",d"),
    "l0": ("L0", ".1f"),
    "fvu": ("FVU", ".4f"),
    "delta_ce": ("ΔCE (nats)", ".4f"),
    "loss_recovered_zero": ("loss recovered", ".4f"),
    "dead_fraction": ("dead", ".1%"),
    "dense_fraction": ("dense", ".1%"),
}
METRICS = {"Loss recovered": "loss_recovered_zero", "FVU": "fvu", "ΔCE": "delta_ce"}
CURVES = {"FVU": "fvu", "L0": "l0", "Living latents": "alive", "λ": "lambda"}
TEXT = ("name", "architecture", "hook")
SAMPLE = 20_000  # rows of a store that are looked at for the tokens of the longest


def no_run() -> None:
    st.title("No run yet")
    st.write(
        f"A run is a folder under {code(str(root()))} with trained SAEs. The demo makes one from the embedded model and corpus, "
        "in about seven minutes on two cores:"
    )
    offer("Run the demo", ["demo", "--out", str(root() / "demo")], root())
    st.write(
        "For your own model, see the commands `saebench harvest`, `saebench train`, `saebench eval` and `saebench index`."
    )


def table(saes: dict[str, Trained]) -> None:
    sort, _, way = st.query_params.get("sort", "name").partition(".")
    sort = sort if sort in COLUMNS else "name"

    def picked(value: str) -> None:
        name = value.partition(":")[2]
        st.query_params["sort"] = name if name != sort or way == "desc" else f"{name}.desc"

    figures = sorted(
        (sae.figures for sae in saes.values()),
        key=lambda of: (of.get(sort) is None, of.get(sort, 0)),
    )
    if way == "desc":
        known = [of for of in figures if of.get(sort) is not None]
        figures = [*reversed(known), *(of for of in figures if of.get(sort) is None)]
    columns = [grid.Column(name, heading, text=name in TEXT) for name, (heading, _) in COLUMNS.items()]
    rows = []
    for of in figures:
        sae = saes[of["name"]]
        cells = [grid.link(sae.name, f"open:{sae.name}", link_to("features", sae=sae.name))]
        for name, (_, style) in list(COLUMNS.items())[1:]:
            value = of.get(name) if name != "architecture" else kind_of(of)
            cells.append("–" if value is None else html.escape(format(value, style)))
        share = sae.share_indexed
        cells.append("yes" if share == 1 else "–" if share == 0 else f"{share:.0%} so far")
        rows.append(grid.Row(cells, f"open:{sae.name}"))
    clickable(
        grid.grid_html([*columns, grid.Column("", "index")], rows, "SAEs", sort=(sort, way == "desc")), "saes", picked
    )


def kind_of(of: dict[str, Any]) -> str:
    """Architecture, and kind of what is no SAE."""
    kind = of.get("kind", "SAE")
    return of["architecture"] if kind == "SAE" else f"{of['architecture']} {kind}"


def refitted(saes: dict[str, Trained]) -> None:
    """What latents could add up to, of those that were refitted."""
    if found := [sae.figures for sae in saes.values() if "refitted" in sae.figures]:
        plain_table("Refitted", refitted_table(found))


def sets(run: Path) -> None:
    """What dictionaries do that stand in together, where any were evaluated."""
    if found := read_json(run / SUMMARY).get("sets", []) if (run / SUMMARY).exists() else []:
        plain_table("Sets", set_table(found))


def open_point(chart: Any, saes: dict[str, Trained]) -> None:
    """What a click on a point does: its SAE is opened when the page is drawn."""
    points = chart["selection"]["points"]
    if points and points[0].get("customdata") in saes:
        st.session_state.opened = points[0]["customdata"]


def plots(saes: dict[str, Trained]) -> None:
    measured = [sae.figures for sae in saes.values() if sae.evaluated]
    if not measured:
        st.info("Nothing is measured yet: `saebench eval` gives L0, FVU, ΔCE and loss recovered on held-out documents.")
        return
    left, right = st.container(key="halves").columns(2)
    with left:
        label = st.segmented_control(
            "Against L0", list(METRICS), default="Loss recovered", key="metric", bind="query-params"
        )
        metric = METRICS[label or "Loss recovered"]
        figure = charts.pareto(measured, metric, label or "", baselines=BASELINES if metric == "fvu" else None)
        st.plotly_chart(
            figure, key=f"pareto {metric}", selection_mode="points", config={"displaylogo": False},
            on_select=lambda: open_point(st.session_state[f"pareto {metric}"], saes),
        )  # fmt: skip
        st.caption("Bars: 95%, bootstrap over documents. A point opens its SAE.")
        if name := st.session_state.pop("opened", None):
            go("features", sae=name)
    with right:
        curve = st.segmented_control("During training", list(CURVES), default="FVU", key="curve", bind="query-params")
        logs = {name: sae.log for name, sae in saes.items() if sae.log}
        kinds = {name: sae.figures["architecture"] for name, sae in saes.items()}
        name = CURVES[curve or "FVU"]
        figure = charts.training_curves(logs, name, curve or "FVU", kinds, log_scale=name != "alive")
        st.plotly_chart(figure, key=f"curve {name}", config={"displaylogo": False})


def densities(sae: Trained) -> None:
    """How often the latents of the chosen SAE fire; a bar opens them."""
    if sae.share_indexed == 0:
        return
    density = table_of(sae).columns["density"]

    def picked() -> None:
        points = st.session_state["density histogram"]["selection"]["points"]
        if points:
            st.session_state.between = points[0]["customdata"]

    figure = charts.density_histogram(density, sae.name)
    st.plotly_chart(
        figure, key="density histogram", selection_mode="points", on_select=picked, config={"displaylogo": False}
    )
    so_far = "" if sae.share_indexed == 1 else f" Of the {sae.share_indexed:.0%} of the rows that are indexed so far."
    with st.container(horizontal=True, vertical_alignment="center"):
        st.caption(f"A bar opens its latents.{so_far}", width="content")
        if (density == 0).any() and st.button("Open the dead ones"):
            open_list(having="dead")
    if between := st.session_state.pop("between", None):
        open_list(between=between)


def open_list(**parameters: str) -> None:
    """The table of latents with these filters alone."""
    st.session_state.get("left", {}).pop("features", None)
    go("features", **parameters)


@st.cache_resource(show_spinner="Measuring norms", max_entries=16)
def norms(folder: str, hook: str, files: Files) -> NormReport:
    return norm_report(open_store(Path(folder)), hook, sample=SAMPLE)


def stores(saes: dict[str, Trained]) -> None:
    for folder in sorted({str(sae.store) for sae in saes.values() if sae.store}):
        with said():
            st.code(describe(open_store(Path(folder))), language=None)
            for hook in sorted({hook for sae in saes.values() if str(sae.store) == folder for hook in sae.ends.hooks}):
                report = norms(folder, hook, files_of(Path(folder) / MANIFEST))
                clickable(norms_html(hook, report), f"norms {folder} {hook}")


run = chosen_run()
if run is None:
    no_run()
    st.stop()
st.title(plain(run.name))
found, _ = saes_of(run)
if not found:
    st.info(f"{code(str(run))} has no SAE yet: train some with {code(f'saebench train --store STORE --out {run}')}.")
    st.stop()
with said():
    table(found)
    refitted(found)
    sets(run)
    sae = chosen_sae()
    if sae and sae.next_commands():
        with st.container(border=True):
            st.markdown(f"**Next for {plain(sae.name)}**")
            missing(sae)
    plots(found)
    if sae:
        with said():
            densities(sae)
    st.subheader("Activation stores")
    stores(found)

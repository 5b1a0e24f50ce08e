"""What a run's evaluation and benches have found, and what can be told apart: lines at equal L0, known features, probes, absorption, stability; point by point, with intervals."""

import html
from pathlib import Path
from typing import Any

import streamlit as st
from opened import Files, files_of
from shell import clickable, plain_table, said
from where import chosen_run, root

from saebench.bench.results import Figure, Results, over_seeds
from saebench.bench.table import BENCHES
from saebench.evaluate.compare import FIGURES
from saebench.evaluate.report import SUMMARY
from saebench.evaluate.tables import equal_l0_tables, seed_table, table
from saebench.files import read_json
from saebench.view import charts, grid
from saebench.view.markdown import code, plain

OPTIONS = {"displaylogo": False}
ALL = "all"
AXES = {"probes": "k: latents that a probe reads", "stability": "cosine from which a latent has come back"}


@st.cache_data(show_spinner=False, max_entries=32)
def found_of(path: str, bench: str, files: Files) -> list[Figure]:
    return over_seeds(Results(Path(path), bench))


def show_evaluation(summary: dict[str, Any]) -> None:
    """Dictionaries with the least differences that can be told, over seeds, and lines of architectures at equal L0."""
    st.subheader("Evaluation: figures on held-out documents, and which differences can be told")
    plain_table("Least differences", table(summary["saes"], summary.get("least_differences", {})))
    if summary.get("over_seeds"):
        plain_table("Over seeds", seed_table(summary["over_seeds"]))
    if not (found := summary.get("equal_l0")):
        return
    st.subheader("At equal L0")
    groups = {f"{each['hook']}, {each['d_sae']:,} latents, {each.get('store') or 'its store'}": each for each in found}
    with st.container(horizontal=True):
        names = [name for name in FIGURES if any(name in each["figures"] for each in found)]
        wanted = st.segmented_control(
            "Figure", names, default=names[0], format_func=FIGURES.__getitem__, key="figure_l0", bind="query-params"
        )
        group = next(iter(groups))
        if len(groups) > 1:
            group = st.selectbox("Of", list(groups), key="of_l0", width=420) or group
    wanted, chosen = wanted or names[0], groups[group]
    if wanted not in chosen["figures"]:
        st.caption(f"{FIGURES[wanted]} was not measured here.")
        return
    lines: dict[str, list[charts.Measured]] = {
        name: [
            (l0, value, None if half is None else value - half, None if half is None else value + half)
            for l0, value, half in zip(chosen["l0s"], line["values"], line["halves"], strict=True)
        ]
        for name, line in chosen["figures"][wanted].items()
    }
    chart = charts.measured(lines, "", "L0: mean active latents per token", FIGURES[wanted])
    st.plotly_chart(chart, key="chart equal l0", config=OPTIONS)
    (rows,) = equal_l0_tables([chosen], [wanted])
    plain_table(rows[0][0], rows)


def show_bench(name: str, figures: list[Figure]) -> None:
    st.subheader(f"{name.capitalize()}: {BENCHES[name].about}")
    names = list(dict.fromkeys(figure.figure for figure in figures))
    subjects = list(dict.fromkeys(figure.of for figure in figures))
    with st.container(horizontal=True):
        wanted = st.segmented_control("Figure", names, default=names[0], key=f"figure_{name}", bind="query-params")
        of = subjects[0]
        if len(subjects) > 1:
            first = next((n for n, subject in enumerate(subjects) if subject.startswith(ALL)), 0)
            of = st.selectbox("Of", subjects, index=first, key=f"of_{name}", width=320) or of
    wanted = wanted or names[0]
    shown = [figure for figure in figures if (figure.figure, figure.of) == (wanted, of)]
    lines: dict[str, list[charts.Measured]] = {}
    for figure in shown:
        if figure.value is not None:
            lines.setdefault(figure.sae, []).append((figure.at, figure.value, figure.low, figure.high))
    ordered = {sae: sorted(points, key=lambda point: point[0] or 0.0) for sae, points in lines.items()}
    if ordered:
        st.plotly_chart(charts.measured(ordered, "", AXES.get(name, "at"), wanted), key=f"chart {name}", config=OPTIONS)
    columns = list(dict.fromkeys(figure.at for figure in shown))
    cells = {(figure.sae, figure.at): figure for figure in shown}
    headings = ["SAE", *("" if at is None else f"at {at:g}" for at in columns), "n"]
    rows = []
    for sae in dict.fromkeys(figure.sae for figure in shown):
        own = [cells.get((sae, at)) for at in columns]
        rows.append(grid.Row([html.escape(sae), *map(cell, own), f"{max(figure.n for figure in own if figure):,}"]))
    clickable(
        grid.grid_html([grid.Column("", heading, text=n == 0) for n, heading in enumerate(headings)], rows, name),
        f"table {name}",
    )


def cell(figure: Figure | None) -> str:
    if figure is None or figure.value is None:
        return "–"
    return f"{figure.value:.3f}" + ("" if figure.low is None else f" ({figure.low:.3f} to {figure.high:.3f})")


st.title("Bench")
run = chosen_run()
if run is None:
    st.info(f"No run under {code(str(root()))} yet.")
    st.stop()
if (run / SUMMARY).exists():
    with said():
        if (summary := read_json(run / SUMMARY)).get("saes"):
            show_evaluation(summary)
there = {name: path for name in BENCHES if (path := run / "bench" / f"{name}.json").exists()}
for name, path in there.items():
    with said():
        if figures := found_of(str(path), name, files_of(path)):
            show_bench(name, figures)
if there or (run / SUMMARY).exists():
    st.caption(
        "±, brackets and bars: 95% intervals; over what, and what each figure can tell, docs/metrics.md says. –: undefined, or too little to say."
    )
for name in (name for name in BENCHES if name not in there):
    st.caption(f"Not run: {code(f'saebench bench {name} …')}, {plain(BENCHES[name].about)}.")

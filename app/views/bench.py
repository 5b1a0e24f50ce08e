"""What a run's benches have found: known features, probes, absorption, stability; point by point, with intervals."""

import html
from pathlib import Path

import streamlit as st
from opened import Files, files_of
from shell import clickable, said
from where import chosen_run, root

from saebench.bench import BENCHES, Figure
from saebench.bench.results import Results, over_seeds
from saebench.view import charts, grid
from saebench.view.markdown import code, plain

OPTIONS = {"displaylogo": False}
ALL = "all"


@st.cache_data(show_spinner=False, max_entries=32)
def found_of(path: str, bench: str, files: Files) -> list[Figure]:
    return over_seeds(Results(Path(path), bench))


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
        st.plotly_chart(charts.measured(ordered, "", "at", wanted), key=f"chart {name}", config=OPTIONS)
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
there = {name: path for name in BENCHES if (path := run / "bench" / f"{name}.json").exists()}
for name, path in there.items():
    with said():
        if figures := found_of(str(path), name, files_of(path)):
            show_bench(name, figures)
if there:
    st.caption(
        "Brackets: 95% intervals; over what, and what each figure can tell, docs/metrics.md says. –: undefined, or too little to say."
    )
for name in (name for name in BENCHES if name not in there):
    st.caption(f"Not run: {code(f'saebench bench {name} …')}, {plain(BENCHES[name].about)}.")

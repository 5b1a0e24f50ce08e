"""Two models by a crosscoder of both: what both have, and what one of them has alone."""

from collections.abc import Callable

import numpy as np
import streamlit as st
from opened import files_of, table_of
from shell import clickable, missing, offer, said
from where import chosen_sae, go, link_to

from saebench.browse.runs import Trained
from saebench.browse.table import LatentTable
from saebench.evaluate.diffing import (
    DIFF,
    EXCLUSIVE,
    KINDS,
    LOW_ERROR,
    LOW_RECONSTRUCTION,
    MEANINGS,
    SHARED,
    Diff,
    read_diff,
)
from saebench.index.page import name_html
from saebench.sae.io import WEIGHTS
from saebench.view import charts, grid
from saebench.view.markdown import plain

SHOWN = 200
LISTED: dict[str, Callable[[Diff], np.ndarray]] = {
    "Tuned": lambda found: found.towards("tuned"),
    "Base": lambda found: found.towards("base"),
    "Unconfirmed": lambda found: found.of("unconfirmed"),
    "Shared": lambda found: found.of("shared"),
}
OPTIONS = {"displaylogo": False}


@st.cache_data(show_spinner=False, max_entries=8)
def found_of(_sae: Trained, files: tuple[object, ...]) -> Diff | None:
    return read_diff(_sae.folder)


def counts(found: Diff) -> None:
    columns = [grid.Column("", "kind", text=True), grid.Column("", "latents"), grid.Column("", "", text=True)]
    rows = [
        grid.Row([kind, f"{n:,}", f'<span style="white-space:normal">{MEANINGS[kind]}</span>'])
        for kind, n in found.counts().items()
    ]
    clickable(grid.grid_html(columns, rows, "kinds of latents"), "kinds")


def scatter(found: Diff) -> None:
    """Of all latents but rare ones."""
    groups = {kind: found.of(kind) for kind in KINDS if kind != "rare"}

    def picked() -> None:
        if points := st.session_state["scaling"]["selection"]["points"]:
            st.session_state.leave = points[0]["customdata"]

    figure = charts.latent_scaling(found.error, found.reconstruction, groups, (LOW_ERROR, LOW_RECONSTRUCTION))
    st.plotly_chart(figure, key="scaling", selection_mode="points", on_select=picked, config=OPTIONS)
    if (leave := st.session_state.pop("leave", None)) is not None:
        go("features", latent=int(leave))


def listed(found: Diff, latents: np.ndarray, table: LatentTable | None) -> None:
    columns = [
        grid.Column("", "latent"), *([grid.Column("", "name", text=True)] if table else []),
        grid.Column("", "kind", text=True),
        grid.Column("", "density", "share of the held-out rows on which it is active"),
        grid.Column("", "r", "relative decoder norm: 0 in the base model alone, 1 in the tuned one alone"),
        grid.Column("", "cosine", "of its rows in the two models"),
        grid.Column("", "ν error", "how much of it the other model has in what the other latents leave, 1: as much"),
        grid.Column("", "ν reconstruction", "how much of it other latents write into the other model, 1: as much"),
    ]  # fmt: skip
    rows, kinds = [], found.kinds
    for latent in latents[:SHOWN].tolist():
        figures = (column[latent] for column in (found.relative, found.cosine, found.error, found.reconstruction))
        rows.append(
            grid.Row([
                grid.link(str(latent), f"latent:{latent}", link_to("features", latent=latent)),
                *([name_html(table.names[latent])] if table else []), KINDS[kinds[latent]], f"{found.fires[latent] / found.rows:.3%}",
                *("–" if np.isnan(figure) else f"{figure:.2f}" for figure in figures),
            ], f"latent:{latent}")
        )  # fmt: skip
    more = f", of which {SHOWN} are shown" if len(latents) > SHOWN else ""
    st.caption(
        f"{len(latents):,} latents{more}, the most one model's own first, or of a kind those active most often. A row opens its latent."
    )
    clickable(grid.grid_html(columns, rows, "latents of this kind", height="30rem"), "latents")


st.title("Diff")
sae = chosen_sae()
with said():
    if sae is None or not sae.of_two_models:
        st.info(
            "Choose a crosscoder of two models in the sidebar; one is trained with `train --kind crosscoder --beside`."
        )
    elif (found := found_of(sae, files_of(sae.folder / DIFF, sae.folder / WEIGHTS))) is None:
        st.info("Every latent is measured on held-out rows of both models, once: a minute or two.")
        offer("Take the models apart", ["diff", "--sae", str(sae.folder)], sae.run)
    else:
        left, right = st.container(key="halves_counts").columns(2, gap="large")
        with left:
            counts(found)
        with right:
            st.plotly_chart(
                charts.relative_norms(found.relative[found.kinds != KINDS.index("rare")], EXCLUSIVE, SHARED),
                key="norms", config=OPTIONS,
            )  # fmt: skip
        left, right = st.container(key="halves_latents").columns(2, gap="large")
        with left:
            view = st.segmented_control("Show", list(LISTED), default="Tuned", key="kind", bind="query-params")
            listed(found, LISTED[view or "Tuned"](found), table_of(sae) if sae.share_indexed == 1 else None)
            if sae.share_indexed < 1:
                st.caption("An index would give them names.")
                missing(sae)
        with right:
            scatter(found)
            st.caption(
                plain(
                    f"In the corner, below {LOW_ERROR:g} and {LOW_RECONSTRUCTION:g}, latent scaling agrees with the norm. A point opens its latent. Figures of {found.rows:,} held-out rows."
                )
            )

"""All latents of an SAE in two dimensions: those whose decoder rows are near lie near, as far as two can hold it."""

import streamlit as st
from opened import table_of
from shell import missing, offer, said
from where import chosen_sae, go

from saebench.browse.runs import Trained
from saebench.browse.table import LatentTable
from saebench.index.layout import read_map
from saebench.view import charts

COLOURS = ("density", "name_f1", "name_detection", "output")


def show_map(sae: Trained, table: LatentTable) -> None:
    arguments = ["map", "--sae", str(sae.folder)]
    with said():  # a map of another SAE is told, and can be made again
        if made := read_map(table.index):
            colours = {table.sortable[name][0]: name for name in COLOURS if name in table.sortable}
            words = st.segmented_control("Colour", list(colours), default="density", key="colour", bind="query-params")
            column = colours[words or "density"]

            def picked() -> None:
                if points := st.session_state["map"]["selection"]["points"]:
                    st.session_state.leave = points[0]["customdata"]

            names = [table.names[latent].text for latent in range(table.index.d_sae)]
            density = table.columns["density"]
            values = table.columns[column]
            figure = charts.latent_map(
                made.places, values, density > 0, names, words or "density", log=column == "density"
            )
            options = {"displaylogo": False, "scrollZoom": True}
            st.plotly_chart(figure, key="map", selection_mode="points", on_select=picked, config=options)
            dead = int((density == 0).sum())
            st.caption(
                f"Of each latent's 20 nearest decoder rows {made.recall:.0%} are among its 20 nearest here "
                f"(by chance {20 / max(20, table.index.d_sae - 1):.1%}): {keeps(made.recall)} Distances between groups and sizes of groups mean nothing. "
                f"{dead:,} latents that never fire are left out. A point opens its latent."
            )
            if (leave := st.session_state.pop("leave", None)) is not None:
                go("features", latent=int(leave))
            return
        st.info("By t-SNE of decoder rows, once for an SAE: 8,192 latents take less than a minute.")
    offer("Make the map", arguments, sae.run)


def keeps(recall: float) -> str:
    """What a share of neighbours that are kept allows one to read from the map."""
    if recall >= 0.5:
        return "who lies near is mostly near."
    return "most neighbours are lost in two dimensions, so look at a latent's page for who is near it."


st.title("Map")
sae = chosen_sae()
if sae is None or sae.share_indexed < 1:
    st.info("A map needs a whole index: make one, or choose an SAE that has one in the sidebar.")
    if sae is not None:
        missing(sae)
    st.stop()
with said():
    show_map(sae, table_of(sae))

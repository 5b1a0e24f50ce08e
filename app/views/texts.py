"""A piece of text, and the latents whose strongest examples hold it."""

import streamlit as st
from opened import Files, files_of, table_of
from shell import clickable, fragment, missing, said
from where import chosen_sae, link_to

from saebench.browse.runs import Trained
from saebench.browse.table import LatentTable
from saebench.index import FeatureIndex
from saebench.index.page import name_html
from saebench.index.texts import AROUND, ExampleTexts, Matches
from saebench.view import grid
from saebench.view.tokens import text_html

SHOWN = 50


@st.cache_resource(show_spinner="Reading the examples", max_entries=4)
def example_texts(path: str, files: Files, _index: FeatureIndex) -> ExampleTexts:
    return ExampleTexts(_index)


def matches_html(table: LatentTable, found: Matches) -> str:
    columns = [
        grid.Column("", "latent"), grid.Column("", "name", text=True),
        grid.Column("", "fires in it", "of its 20 strongest examples, those in which it fires most on a token of this text"),
        grid.Column("", "examples", "of its 20 strongest, those that hold this text"),
        grid.Column("", "density"), grid.Column("", "the strongest of them", text=True),
    ]  # fmt: skip
    rows = []
    for latent, within, firing, row in zip(*(part[:SHOWN].tolist() for part in found), strict=True):
        context = table.index.context_of(row, AROUND)
        peak = [float(place == context.peak) for place in range(len(context.pieces))]
        rows.append(
            grid.Row([
                grid.link(str(latent), f"latent:{latent}", link_to("features", latent=latent)), name_html(table.names[latent]),
                str(firing), str(within), f"{table.columns['density'][latent]:.2%}", text_html(context.pieces, peak, 1.0),
            ], f"latent:{latent}")
        )  # fmt: skip
    return grid.grid_html(columns, rows, "latents with examples that hold the text")


@fragment
def results(sae: Trained, table: LatentTable) -> None:
    st.text_input("Text", key="holds", bind="query-params", placeholder="import os")
    wanted = st.session_state.get("holds") or ""
    if not wanted.strip():
        st.info(
            f"Type a word or a phrase: the latents whose 20 strongest examples hold it within {AROUND} tokens are listed. "
            "The case of letters counts for nothing; a space before or behind it counts."
        )
        return

    index = table.index
    found = example_texts(str(index.path), files_of(index.path), index).search(wanted)
    if not len(found.latents):
        st.info("No strongest example of any latent holds that.")
        return
    clickable(matches_html(table, found), "matches")
    more = f", of which {SHOWN} are shown" if len(found.latents) > SHOWN else ""
    st.caption(f"{len(found.latents):,} of {index.d_sae:,} latents{more}. A row opens its latent.")


st.title("Texts")
sae = chosen_sae()
if sae is None or sae.share_indexed == 0:
    st.info("Examples are in an index: make one, or choose an SAE that has one in the sidebar.")
    if sae is not None:
        missing(sae)
    st.stop()
with said():
    results(sae, table_of(sae))

"""All latents of an SAE, sorted, filtered and searched; or one of them."""

import re
from typing import Any

import numpy as np
import streamlit as st
from latent import show_latent
from lists import all_lists
from opened import table_of
from shell import clickable, fragment, missing, said
from where import chosen_sae, link_to

from saebench.browse.table import HEADINGS, MAX_SIZE, LatentTable, Query
from saebench.index.derive import FLAGS
from saebench.index.lists import lists_of
from saebench.index.page import figure, name_html
from saebench.view import grid
from saebench.view.markdown import plain

FLAG_NAMES = {flag: flag.replace("_", " ") for flag in (*FLAGS, "labelled", "explained")}
DENSITIES = {"any": 1.0, "at most 10%": 0.1, "at most 1%": 0.01, "at most 0.1%": 0.001, "at most 0.01%": 0.0001}
SIZES = (25, 50, 100, 250, MAX_SIZE)


def query_of(table: LatentTable) -> Query:
    """What the URL and the widgets ask for; absurd values as if they were not there."""
    state = st.session_state
    sort, _, way = st.query_params.get("sort", "latent").partition(".")
    page = st.query_params.get("page", "1")
    least, most = between() or (0.0, 1.0)
    return Query(
        text=state.get("q") or "",
        sort=sort if sort in table.sortable else "latent",
        descending=way == "desc",
        least_density=least,
        most_density=min(most, DENSITIES[state.get("density") or "any"]),
        least_detection=float(state.get("rule") or 0.0),
        among=lists_of(table.index).all().get(state.get("list") or ""),
        having=tuple(state.get("having") or ()),
        without=tuple(state.get("without") or ()),
        page=max(0, int(page[:9]) - 1) if page.isdecimal() else 0,
        size=state.get("size") or 50,
    )


def between() -> tuple[np.float64, np.float64] | None:
    """(least, most) density of a bar of the histogram, whose powers of ten the address has as `between=-3.1_-3`."""
    found = re.fullmatch(r"(-?\d\d?(?:\.\d)?)_(-?\d\d?(?:\.\d)?)", st.query_params.get("between", ""))
    if found is None:
        return None
    least, most = (10 ** np.float64(power) for power in found.groups())
    return least, np.nextafter(most, 0.0)  # as a bar: without its upper end


def forget_between() -> None:
    st.query_params.pop("between", None)
    st.query_params.pop("page", None)


def filters(table: LatentTable) -> None:
    bound: dict[str, Any] = {"bind": "query-params", "on_change": lambda: st.query_params.pop("page", None)}
    lists = list(lists_of(table.index).all())
    columns = st.columns([3, 1.4, 1.4, 2, 2, 1, *[1.8] * bool(lists)], vertical_alignment="bottom")
    columns[0].text_input(
        "Search", key="q", placeholder="name, token, number, or ~meaning", live=True, persist_state="page", **bound
    )
    columns[1].selectbox("Density", list(DENSITIES), key="density", persist_state="page", **bound)
    columns[2].number_input(
        "Detection at least", 0.0, 1.0, 0.0, 0.05, key="rule", persist_state="page",
        help="Balanced accuracy of the name on held-out documents; chance is 0.5", **bound,
    )  # fmt: skip
    for column, key, label in ((columns[3], "having", "Only"), (columns[4], "without", "Without")):
        column.multiselect(
            label, list(FLAG_NAMES), format_func=FLAG_NAMES.__getitem__, key=key, persist_state="page",
            placeholder="flags", **bound,
        )  # fmt: skip
    columns[5].selectbox("Rows", SIZES, index=1, key="size", persist_state="page", **bound)
    if lists:
        columns[6].selectbox("List", lists, None, key="list", persist_state="page", placeholder="any", **bound)
    if ends := between():
        with st.container(horizontal=True, vertical_alignment="center"):
            st.caption(
                f"Only densities of {ends[0]:.3g} to {ends[1]:.3g}, a bar of the overview's histogram.", width="content"
            )
            st.button("Any density", on_click=forget_between)


def row(table: LatentTable, latent: int, bins: slice) -> grid.Row:
    note = table.notes[latent]
    flags = "".join(
        grid.tag(name) for flag, name in FLAG_NAMES.items() if flag in FLAGS and table.index.flagged(flag)[latent]
    )
    cells = [
        grid.link(str(latent), f"latent:{latent}", link_to("features", latent=latent)),
        grid.spark(table.index.histograms[latent, bins].tolist()),
        f"{name_html(table.names[latent])} {''.join(map(grid.tag, note.tags))}",
        *(number(name, float(table.columns[name][latent])) + mark(table, name, latent) for name in table.sortable),
        flags,
    ]
    return grid.Row(cells, f"latent:{latent}")


def mark(table: LatentTable, name: str, latent: int) -> str:
    """An output score that is an estimate says so."""
    return " ~" * (name == "output" and bool(table.estimated[latent]) and not np.isnan(table.columns[name][latent]))


def number(name: str, value: float) -> str:
    return "–" if np.isnan(value) else figure(name, value)


@fragment
def rows(table: LatentTable) -> None:
    if st.session_state.get("latent") is not None:
        st.rerun()
    filters(table)
    query = query_of(table)

    def picked(value: str) -> None:
        name = value.partition(":")[2]
        st.query_params.pop("page", None)
        first = name != "latent"  # figures begin with the largest
        descending = first if name != query.sort else not query.descending
        st.query_params["sort"] = f"{name}.desc" if descending else name

    found = table.find(query)
    if not found.total:
        st.info("No latent is like that: clear the search, or widen the filters.")
        return
    used = np.flatnonzero(table.index.histograms[found.latents].sum(0))
    bins = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 1)
    columns = [
        grid.Column("latent", "latent"), grid.Column("", "strength", "histogram of its activations, log scale"),
        grid.Column("", "name", text=True),
        *(grid.Column(name, *HEADINGS[name]) for name in table.sortable), grid.Column("", "flags", text=True),
    ]  # fmt: skip
    body = [row(table, int(latent), bins) for latent in found.latents]
    clickable(grid.grid_html(columns, body, "latents", sort=(query.sort, query.descending)), "latents", picked)
    pages = -(-found.total // query.size)
    with st.container(horizontal=True, vertical_alignment="center"):
        if st.button("Previous page", disabled=found.page == 0):
            st.query_params["page"] = str(found.page)
            st.rerun(scope="fragment")
        said_of_them = f"{found.total:,} of {table.index.d_sae:,} latents, page {found.page + 1} of {pages}"
        st.caption(said_of_them, width="content")
        if st.button("Next page", disabled=found.page + 1 >= pages):
            st.query_params["page"] = str(found.page + 2)
            st.rerun(scope="fragment")
        with st.popover("Lists"):
            all_lists(table)


sae = chosen_sae()
if sae is None:
    st.info("There is no SAE to browse yet: see the overview.")
    st.stop()
if sae.share_indexed == 0:
    st.title(plain(sae.name))
    if sae.index_error:
        st.error(plain(sae.index_error))
    st.write("Its latents are not indexed yet. An index is one pass over the activation store.")
    missing(sae)
    st.stop()
with said():
    table = table_of(sae)
    index = table.index
    title, box = st.columns([4, 1], vertical_alignment="bottom")
    box.number_input(
        "Latent", 0, index.d_sae - 1, None, 1, key="latent", bind="query-params", placeholder=f"0 to {index.d_sae - 1}"
    )
    chosen = st.session_state.get("latent")
    if not index.complete:
        st.info(f"Indexed so far: {index.share_done:.0%} of the rows. Figures change until it is complete.")
        missing(sae)
    if not index.has_store:
        st.warning(
            plain(f"Its store is gone ({sae.store}): labels, statistics and logits are shown, examples cannot be.")
        )
    if table.problem:
        st.warning(plain(table.problem))
    if chosen is None:
        title.title(plain(sae.name))
        rows(table)
    else:
        place = st.container()
        # Also here, and first, so that the address keeps them: the previous and the next latent are those of the list.
        with st.expander("The list that Previous and Next go through"):
            filters(table)
        with place:
            show_latent(sae, table, int(chosen), query_of(table), title)

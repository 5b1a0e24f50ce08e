"""Where one is: the run, the SAE and the page, in the address; and how one goes to another page and finds it as it was left."""

import contextlib
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import streamlit as st
from streamlit.errors import StreamlitAPIException

from saebench.browse.runs import Trained, runs_under, saes_of
from saebench.view import grid
from saebench.view.markdown import plain

ROOT = "SAEBENCH_APP_ROOT"
"""Environment variable with the folder of runs, or the run, that the server shows."""

OF_ONE_SAE = ("latent", "turns", "focus", "other", "pair", "page")
"""Parameters of an address that say nothing of another SAE."""


def root() -> Path:
    return Path(os.environ.get(ROOT, "runs"))


def runs() -> dict[str, Path]:
    return runs_under(root())


def chosen_run() -> Path | None:
    """The run that the URL names, or the first."""
    found = runs()
    return found.get(st.session_state.get("run", ""), next(iter(found.values()), None))


def chosen_sae() -> Trained | None:
    """The SAE that the sidebar and the URL name, or the one that has come furthest."""
    run = chosen_run()
    if run is None:
        return None
    found, _ = saes_of(run)
    return found.get(st.session_state.get("sae", "")) or max(
        found.values(), key=lambda sae: (sae.share_indexed, -len(sae.next_commands())), default=None
    )


def address(page: str, /) -> dict[str, Any]:
    """The query with which a page is opened but for run and SAE: as it was left, without what was another SAE's."""
    left, own = st.session_state.get("left", {}).get(page, ({}, {}))
    same = left == st.session_state.here
    return {name: values for name, values in own.items() if same or name not in OF_ONE_SAE}


def link_to(page: str, /, **parameters: str | int | list[str]) -> str:
    """The address of a page for a link, of the run and SAE that are shown unless others are given."""
    return f"{page}?{urlencode({**st.session_state.here, **parameters}, doseq=True)}"


def own_query() -> dict[str, list[str]]:
    """The query of the page that is shown, but for run and SAE."""
    return {name: st.query_params.get_all(name) for name in st.query_params if name not in ("run", "sae")}


def forget_latents() -> None:
    """What the address says of latents belongs to the SAE before."""
    for name in OF_ONE_SAE:
        if name in st.session_state:  # a widget's, which writes the address
            st.session_state[name] = None
        else:
            st.query_params.pop(name, None)


def remember() -> None:
    """Note the query of the page that is shown, for when it is come back to; after all that changes it."""
    st.session_state.setdefault("left", {})[st.session_state.page] = (st.session_state.here, own_query())


def navigation_html(pages: list[tuple[str, str]], current: str) -> str:
    """Links to the pages, given by name and title, each as it was left; that to the current one begins it anew."""
    links = []
    for page, title in pages:
        to = link_to("./" if page == "overview" else page, **({} if page == current else address(page)))
        link = grid.link(title, page, to)
        links.append(link.replace("<a ", '<a aria-current="page" ') if page == current else link)
    return f'<nav class="sb-pages" aria-label="Pages">{"".join(links)}</nav>'


def set_out(page: str) -> None:
    """Open a page when the script runs next, as a callback does: as it was left, or anew where one is on it."""
    state = st.session_state
    if page != state.page:
        state.going = page, address(page)
        return
    for name in own_query():
        state.pop(name, None)
    state.going = page, {}


def go(page: str, /, **parameters: str | int) -> None:
    """Open another page, otherwise as it was left. Run and SAE stay: what changes the SAE sets `st.session_state.sae` in a callback."""
    remember()
    st.session_state.going = page, address(page) | {name: str(value) for name, value in parameters.items()}
    st.rerun()  # of all: left from within a fragment, the next page's address lacks run and SAE


def leave() -> None:
    """Open the page that `go` or `set_out` has named, if one has."""
    if going := st.session_state.pop("going", None):
        st.switch_page(f"views/{going[0]}.py", query_params=going[1])


def keep_in_address(name: str, options: list[str], default: str) -> None:
    """What a choice that is bound to the address begins with: what was chosen, what the address says, or the default."""
    state, asked = st.session_state, st.query_params.get(name)
    if state.get(name) not in options:
        state[name] = asked if asked in options else default
        if asked and asked not in options:
            st.warning(plain(f"{name} {asked!r} is not here; this is {state[name]!r}"))
    if asked is None:
        # A widget writes what is chosen, but not what it began with; and from then on it alone may write it.
        with contextlib.suppress(StreamlitAPIException):
            st.query_params[name] = state[name]

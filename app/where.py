"""Where one is: the run, the SAE and the page, in the address; and how one goes to another page and finds it as it was left."""

import os
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlencode

import streamlit as st
from streamlit.components import v2

from saebench.browse.runs import Trained, runs_under, saes_of
from saebench.view import grid
from saebench.view.markdown import plain

ROOT = "SAEBENCH_APP_ROOT"
"""Environment variable with the folder of runs, or the run, that the server shows."""

OF_ONE_SAE = ("latent", "turns", "focus", "other", "pair", "page", "why")
"""Parameters of an address that say nothing of another SAE."""

VISIT = """
// To an address as a step back or forward leads to one: Streamlit draws what it says, and adds no entry of its own to the history.
function visit(address, write) {
  const to = new URL(address, document.baseURI).href;
  if (to === location.href) return;
  history[write]({}, '', to);
  window.dispatchEvent(new PopStateEvent('popstate'));
}
"""
_browser = v2.component("saebench.browser", js=VISIT + """
export default function ({ data }) {
  if (data.to) return visit(data.to, 'pushState');
  const to = new URL(location.href);
  if (to.searchParams.has(data.lacks)) return;
  to.searchParams.set(data.lacks, data.value);
  visit(to.href, 'replaceState');
}
""")  # fmt: skip


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


def link_to(page: str, /, **parameters: str | int | list[str]) -> str:
    """The address of a page as it was left, but for these parameters; of the run and SAE that are shown unless others are given.

    What the page was left with of another SAE's latents is not in it.
    """
    state = st.session_state
    of = {name: parameters.get(name, value) for name, value in state.here.items()}
    left, own = state.get("left", {}).get(page, ({}, {}))
    kept = {name: values for name, values in own.items() if left == of or name not in OF_ONE_SAE}
    return _address(page, of | kept | parameters)


def _address(page: str, query: dict[str, Any]) -> str:
    return f"{'./' if page == 'overview' else page}?{urlencode(query, doseq=True)}"


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


def toggle(name: str, value: str) -> None:
    """Have the address say so of a parameter, or nothing where it says so already."""
    if st.query_params.get(name) == value:
        del st.query_params[name]
    else:
        st.query_params[name] = value


def remember() -> None:
    """Note the query of the page that is shown, for when it is come back to."""
    st.session_state.setdefault("left", {})[st.session_state.page] = (st.session_state.here, own_query())


def navigation_html(pages: list[tuple[str, str]], current: str) -> str:
    """Links to the pages, given by name and title, each as it was left; that to the current one begins it anew."""
    links = []
    for page, title in pages:
        to = _address(page, st.session_state.here) if page == current else link_to(page)
        link = grid.link(title, page, to)
        links.append(link.replace("<a ", '<a aria-current="page" ') if page == current else link)
    return f'<nav class="sb-pages" aria-label="Pages">{"".join(links)}</nav>'


def go(page: str, /, **parameters: str | int) -> NoReturn:
    """Have the browser follow `link_to`, for what no link can do: a button, a point of a chart. Ends what is drawn."""
    _browser(data={"to": link_to(page, **parameters)}, key="going")
    st.stop()


def keep_in_address(name: str, options: list[str], default: str) -> None:
    """What a choice that is bound to the address begins with: what was chosen, what the address says, or the default."""
    state, asked = st.session_state, st.query_params.get(name)
    if state.get(name) not in options:
        state[name] = asked if asked in options else default
        if asked and asked not in options:
            st.warning(plain(f"{name} {asked!r} is not here; this is {state[name]!r}"))
    if asked is None:  # a widget writes what is chosen, but not what it began with
        _browser(data={"lacks": name, "value": state[name]}, key=f"address lacks {name}")

"""The workbench: `saebench app`, or `streamlit run app/main.py`."""

from pathlib import Path

import streamlit as st
import torch
from opened import jobs
from shell import clickable, said, watch_jobs
from where import (
    chosen_run,
    chosen_sae,
    forget_latents,
    keep_in_address,
    navigation_html,
    remember,
    root,
    runs,
)

from saebench.browse.runs import saes_of
from saebench.view.markdown import code, plain

SIDEBAR = 230  # pixels
HERE = Path(__file__).parent
st.set_page_config(page_title="saebench", page_icon=HERE / "icon.png", layout="wide", initial_sidebar_state=SIDEBAR)
# Every click runs in a new thread, and a pool of threads for it alone takes longer to begin than the few rows it encodes;
# a larger model takes more (`opened.Turn`).
torch.set_num_threads(1)
st.html(HERE / "look.css")
PAGES = [
    st.Page("views/overview.py", title="Overview", default=True),
    st.Page("views/features.py", title="Features"),
    st.Page("views/texts.py", title="Texts"),
    st.Page("views/map.py", title="Map"),
    st.Page("views/prompt.py", title="Prompt"),
    st.Page("views/steering.py", title="Steering"),
    st.Page("views/compare.py", title="Compare"),
    st.Page("views/diff.py", title="Diff"),
    st.Page("views/circuits.py", title="Circuits"),
    st.Page("views/bench.py", title="Bench"),
]
page = st.navigation(PAGES, position="hidden")
st.session_state.page = page.url_path or "overview"
st.session_state.drawn_from = {}  # what this page is drawn from
st.session_state.setdefault("here", {})

with st.sidebar, said():
    above = st.container()
    names = list(runs())
    if names:
        # Without a default of their own, so that the address always names what is shown.
        keep_in_address("run", names, names[0])
        st.selectbox("Run", names, index=None, key="run", bind="query-params", on_change=forget_latents)
        run = chosen_run()
        assert run is not None
        found, broken = saes_of(run)
        if found:
            default = chosen_sae()
            keep_in_address("sae", list(found), default.name if default else next(iter(found)))
            st.selectbox(
                "SAE", list(found), index=None, key="sae", bind="query-params", on_change=forget_latents,
                help="Those with an index can be browsed and steered with",
            )  # fmt: skip
        for name, why in broken.items():
            st.warning(plain(f"{name} cannot be read: {why}"))
    else:
        run = None
        st.caption(f"No run under {code(str(root()))} yet.")
    sae = chosen_sae()
    st.session_state.here = ({"run": run.name} if run else {}) | ({"sae": sae.name} if sae else {})
    links = [(other.url_path or "overview", other.title) for other in PAGES]
    with above:
        clickable(navigation_html(links, st.session_state.page), "navigation")
    if jobs().all():
        st.divider()
        watch_jobs()

remember()
with said():
    page.run()

"""What every page needs: things opened once and shared, HTML that can be clicked, links, errors."""

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec
from urllib.parse import urlencode

import streamlit as st
from streamlit.components import v2
from streamlit.errors import StreamlitAPIException

from saebench.browse.jobs import Jobs
from saebench.browse.runs import Trained, runs_under, saes_of
from saebench.browse.table import LatentTable
from saebench.index import FeatureIndex, open_feature_index
from saebench.index.notes import Notes
from saebench.index.page import PARTS_CSS
from saebench.models import LanguageModel, load_model
from saebench.sae import SAE, load_sae
from saebench.sae.io import WEIGHTS
from saebench.steer import Bench
from saebench.steer.scores import read_scores
from saebench.view import arms, grid, svg, tokens
from saebench.view.markdown import code, plain

P = ParamSpec("P")
ROOT = "SAEBENCH_APP_ROOT"
"""Environment variable with the folder of runs, or the run, that the server shows."""

OF_ONE_SAE = ("latent", "turns", "focus", "other", "pair", "page")
"""Parameters of an address that say nothing of another SAE."""

# ------------------------------------------------------------------------------------------- opened once


class Shared(NamedTuple):
    """A model, and the lock under which its passes run."""

    model: LanguageModel
    lock: Any


@st.cache_resource(show_spinner=False)
def jobs() -> Jobs:
    return Jobs()


@st.cache_resource(show_spinner="Loading the model", max_entries=2)
def _model(name: str) -> Shared:
    return Shared(load_model(name), threading.Lock())


@st.cache_resource(show_spinner=False, max_entries=8)
def _sae(folder: str, written: int) -> SAE:
    return load_sae(folder)


@st.cache_resource(show_spinner="Opening the index", max_entries=8)
def _index(path: str, sae: str, written: int, store_there: bool) -> FeatureIndex:
    return open_feature_index(path, sae=sae, need_store=False)


@st.cache_resource(show_spinner=False, max_entries=8)
def _table(path: str, sae: str, written: int, store_there: bool, scored: int) -> LatentTable:
    index = _index(path, sae, written, store_there)
    notes = Notes(index.path.with_suffix(".notes.json"), index.identity["sae"], index.d_sae)
    return LatentTable(index, notes, read_scores(index))


def changed(path: Path) -> int:
    """When a file was last written; 0 where there is none."""
    return path.stat().st_mtime_ns if path.exists() else 0


def table_of(sae: Trained) -> LatentTable:
    """Raises ValueError where there is no index, or one of another SAE or store."""
    store_there = sae.store is not None and (sae.store / "manifest.json").exists()
    scores = changed(sae.index_path.with_suffix(".scores.h5"))
    return _table(str(sae.index_path), str(sae.folder), changed(sae.index_path), store_there, scores)


def weights_of(sae: Trained) -> SAE:
    return _sae(str(sae.folder), changed(sae.folder / WEIGHTS))


def model_of(sae: Trained) -> Shared:
    """Raises ValueError where the model cannot be loaded."""
    if sae.model is None:
        raise ValueError(f"{sae.folder} does not say of which model it is (metadata.model_name in cfg.json)")
    return _model(sae.model)


def bench_of(sae: Trained, index: FeatureIndex | None) -> tuple[Bench, Any]:
    """(what steering needs, the model's lock). Raises ValueError where the model is not the one that was indexed."""
    shared = model_of(sae)
    if index is not None and shared.model.weights_hash != index.identity["model"]:
        raise ValueError(f"model {sae.model!r} has changed since {index.path} was made from it; index again")
    return Bench(shared.model, weights_of(sae).to(shared.model.device), sae.hook, index), shared.lock


# ------------------------------------------------------------------------------------------- where we are


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


def fragment(function: Callable[P, None]) -> Callable[P, None]:
    """A part of a page that is drawn again by itself when something in it changes; the change is remembered."""

    @st.fragment
    @functools.wraps(function)
    def part(*args: P.args, **kwargs: P.kwargs) -> None:
        with said():
            function(*args, **kwargs)
        remember()

    return part


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


# ------------------------------------------------------------------------------------------- HTML

# Going to another page, Streamlit pushes its query at the old path first, then run and SAE, and then the path: several
# entries of the browser's history where one is right. What one act of the person pushes is one entry here.
_SCRIPT = """
if (!window.saebenchHistory) {
  window.saebenchHistory = { acted: false };
  const push = history.pushState.bind(history), replace = history.replaceState.bind(history);
  for (const kind of ['pointerdown', 'keydown'])
    window.addEventListener(kind, () => { window.saebenchHistory.acted = true; }, true);
  history.pushState = (state, title, url) => {
    (window.saebenchHistory.acted ? push : replace)(state, title, url);
    window.saebenchHistory.acted = false;
  };
}
// The keyboard's focus stays on what was picked, and a table with the same first row stays where it was scrolled to.
function redraw(root, html) {
  const first = () => (root.querySelector('tbody tr') || {dataset: {}}).dataset.pick;
  const box = root.querySelector('.sb-scroll');
  const focused = root.contains(root.getRootNode().activeElement) && root.getRootNode().activeElement.dataset.pick;
  const before = [first(), box ? box.scrollTop : 0, box ? box.scrollLeft : 0];
  root.innerHTML = html;
  const now = root.querySelector('.sb-scroll');
  if (now) now.scrollLeft = before[2];
  if (now && first() === before[0]) now.scrollTop = before[1];
  const same = focused && [...root.querySelectorAll('[data-pick]')].find((one) => one.dataset.pick === focused);
  if (same) same.focus({ preventScroll: true });
}
export default function ({ parentElement, data, setTriggerValue }) {
  let root = parentElement.querySelector('.sb-app');
  if (!root) { root = document.createElement('div'); root.className = 'sb-app sb-page'; parentElement.appendChild(root); }
  root.send = setTriggerValue;
  if (root.shown !== data.html) { redraw(root, data.html); root.shown = data.html; }
  if (root.listens) return;
  root.listens = true;
  const pick = (event) => {
    const found = event.target.closest('[data-pick]');
    if (!found || event.ctrlKey || event.metaKey || event.shiftKey || event.button > 0) return;
    event.preventDefault();
    root.send('pick', found.dataset.pick);
  };
  root.addEventListener('click', pick);
  root.addEventListener('keydown', (event) => {
    if (event.key !== 'Enter' && event.key !== ' ') return;
    if (event.target.matches('a, button, summary')) return;
    if (event.key === ' ' && event.target.closest('[data-pick]')) event.preventDefault();
    pick(event);
  });
}
"""
_CSS = (
    tokens.CSS + svg.CSS + grid.CSS + arms.CSS + PARTS_CSS
    + ".sb-pages { display: flex; flex-direction: column; gap: 2px; } .sb-pages a { padding: 4px 10px; border-radius: 4px; text-decoration: none;"
    " color: var(--sb-ink); } .sb-pages a:hover { background: var(--sb-tint); } .sb-pages a[aria-current] { background: var(--sb-tint);"
    " font-weight: 600; box-shadow: inset 3px 0 var(--sb-line); }"
    + ".sb-app { container-type: inline-size; color: var(--sb-ink); background: transparent; font: 15px/1.5 system-ui, sans-serif; }"
)  # fmt: skip
_panel = v2.component("saebench.panel", css=_CSS, js=_SCRIPT)


def clickable(body: str, key: str, on_pick: Callable[[str], None] | None = None) -> None:
    """Escaped HTML; `on_pick` is told the `data-pick` of what is clicked, before the page is drawn again."""

    def picked() -> None:
        value = st.session_state[key].get("pick")
        if value and on_pick:
            on_pick(value)

    _panel(data={"html": body}, key=key, on_pick_change=picked)


# ------------------------------------------------------------------------------------------- errors, long work


@contextlib.contextmanager
def said() -> Iterator[None]:
    """What a person can mend is said in place; the rest of the page goes on."""
    try:
        yield
    except ValueError as error:
        st.error(plain(str(error)), icon=":material/error:")
    except OSError as error:
        st.error(plain(f"{error}. Look whether the file is there and may be read."), icon=":material/error:")


def missing(sae: Trained) -> None:
    """Buttons for what an SAE has not yet, each with the command that does the same."""
    for label, arguments in sae.next_commands().items():
        offer(label, arguments, sae.run)


def offer(label: str, arguments: list[str], folder: Path) -> None:
    """A button that begins a command, or the bar of the one that runs."""
    command = "saebench " + " ".join(arguments)
    job = jobs().get(arguments)
    if job is not None and job.running:
        st.caption(f"{code(command)} is running: see the sidebar")
    elif st.button(plain(label), key=f"offer {command}", help=f"Runs {code(command)}; browsing goes on meanwhile"):
        jobs().start(arguments, folder)
        st.rerun()
    else:
        st.caption(f"or in a terminal: {code(command)}")


@st.fragment(run_every=1.0)
def watch_jobs() -> None:
    """The commands that were begun here, with their progress; the page is drawn again when one ends."""
    for job in jobs().all():
        key = " ".join(job.arguments)
        was = st.session_state.setdefault(f"job {key}", job.running)
        st.caption(f"**{plain(job.name)}** in {plain(job.log.parent.parent.name)}", help=code(job.title))
        if job.running:
            bar = job.progress
            st.progress(bar[1] if bar else 0.0, text=plain(f"{bar[0]}: {bar[2]}" if bar else job.message or "starting"))
            then = (
                "What is done is kept; the same command goes on from there" if job.resumes else "Nothing of it is kept"
            )
            if st.button("Stop", key=f"stop {key}", help=then):
                job.stop()
        else:
            said_last = "done" if job.succeeded else "stopped" if job.stopped else job.message or "ended"
            (st.success if job.succeeded else st.warning)(plain(said_last), icon=None)
            if st.button("Dismiss", key=f"dismiss {key}"):
                jobs().forget(job)
                st.rerun(scope="fragment")
        st.session_state[f"job {key}"] = job.running
        if was and not job.running:
            st.rerun()

"""What every page is made of: HTML that can be clicked, parts that are drawn by themselves, errors, long work."""

import contextlib
import functools
import html
import logging
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec

import streamlit as st
import torch
from opened import jobs, still_open
from streamlit.components import v2
from where import VISIT, remember

from saebench.browse.runs import Trained
from saebench.files import first_line
from saebench.index.page import PARTS_CSS
from saebench.view import arms, brackets, grid, svg, tokens
from saebench.view.markdown import code, plain

P = ParamSpec("P")
log = logging.getLogger(__name__)

_SCRIPT = (
    VISIT
    + """
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
  root.leads = data.links;
  if (root.shown !== data.html) { redraw(root, data.html); root.shown = data.html; }
  if (root.listens) return;
  root.listens = true;
  const pick = (event) => {
    const found = event.target.closest('[data-pick]');
    if (!found || event.ctrlKey || event.metaKey || event.shiftKey || event.button > 0) return;
    event.preventDefault();
    const link = [found, ...found.querySelectorAll('a')].find((one) => one.href && one.dataset.pick === found.dataset.pick);
    if (link && root.leads) visit(link.href, 'pushState');
    else root.send('pick', found.dataset.pick);
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
)
_CSS = (
    tokens.CSS + svg.CSS + grid.CSS + arms.CSS + brackets.CSS + PARTS_CSS
    + ".sb-pages { display: flex; flex-direction: column; gap: 2px; } .sb-pages a { padding: 4px 10px; border-radius: 4px; text-decoration: none;"
    " color: var(--sb-ink); } .sb-pages a:hover { background: var(--sb-tint); } .sb-pages a[aria-current] { background: var(--sb-tint);"
    " font-weight: 600; box-shadow: inset 3px 0 var(--sb-line); }"
    + ".sb-app { container-type: inline-size; color: var(--sb-ink); background: transparent; font: 15px/1.5 system-ui, sans-serif; }"
)  # fmt: skip
_panel = v2.component("saebench.panel", css=_CSS, js=_SCRIPT)


def clickable(body: str, key: str, on_pick: Callable[[str], None] | None = None, *, links: bool = True) -> None:
    """Escaped HTML. A link is followed, by its row too where that is the same pick; `links` false: it is picked as all else.

    `on_pick` is told the `data-pick` of what is clicked, before the page is drawn again.
    """

    def picked() -> None:
        value = st.session_state[key].get("pick")
        if value and on_pick:
            with said():
                on_pick(value)

    _panel(data={"html": body, "links": links}, key=key, on_pick_change=picked)


def plain_table(title: str, lines: list[list[str]]) -> None:
    """A heading, and rows that nothing happens on."""
    st.subheader(title)
    heading, *rows = lines
    columns = [grid.Column("", name, text=n == 0) for n, name in enumerate(heading)]
    cells = [grid.Row([html.escape(cell) for cell in row]) for row in rows]
    clickable(grid.grid_html(columns, cells, title.lower()), title.lower())


def fragment(function: Callable[P, None]) -> Callable[P, None]:
    """A part of a page that is drawn again by itself when something in it changes; the change is remembered.

    The whole page is drawn again where what it was drawn from is no longer what lies on disk.
    """

    @st.fragment
    @functools.wraps(function)
    def part(*args: P.args, **kwargs: P.kwargs) -> None:
        remember()
        with said():
            if not still_open():
                st.rerun()
            function(*args, **kwargs)

    return part


@contextlib.contextmanager
def said() -> Iterator[None]:
    """What goes wrong is said in place, with what to do about it; the rest of the page goes on. A traceback is in the log alone."""
    try:
        yield
    except ValueError as error:
        words = str(error)
        log.debug("said: %s", error, exc_info=True)
    except OSError as error:
        words = f"{error}. Look whether the file is there and may be read."
        log.warning("said: %s", error, exc_info=True)
    except (MemoryError, torch.OutOfMemoryError) as error:
        words = f"There is not enough memory for this ({first_line(error)}): try less text, fewer tokens or texts, or close what else runs."
        log.warning("said: %s", error, exc_info=True)
    except Exception as error:
        words = f"This is a fault of the app ({type(error).__name__}: {first_line(error)}). Load the page again; if it comes back, report it with what the server's terminal shows."
        log.exception("a page failed")
    else:
        return
    st.error(plain(words), icon=":material/error:")


def missing(sae: Trained) -> None:
    """Buttons for what an SAE has not yet, each with the command that does the same."""
    for label, arguments in sae.next_commands().items():
        offer(label, arguments, sae.run)


def offer(label: str, arguments: list[str], folder: Path) -> None:
    """A button that begins a command, or the bar of the one that runs."""
    command = "saebench " + shlex.join(arguments)
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
    """The commands that were begun from the app, with their progress; the page is drawn again when one ends."""
    for job in jobs().all():
        key = str(job.record)
        running = job.running
        was = st.session_state.setdefault(f"job {key}", running)
        st.caption(f"**{plain(job.name)}** in {plain(job.log.parent.parent.name)}", help=code(job.title))
        if running:
            bar = job.progress
            st.progress(bar[1] if bar else 0.0, text=plain(f"{bar[0]}: {bar[2]}" if bar else job.message or "starting"))
            then = (
                "What is done is kept; the same command goes on from there" if job.resumes else "Nothing of it is kept"
            )
            if st.button("Stop", key=f"stop {key}", help=then):
                job.stop()
        else:
            (st.success if job.succeeded else st.warning)(plain(job.ending), icon=None)
            if st.button("Dismiss", key=f"dismiss {key}"):
                jobs().forget(job)
                st.rerun(scope="fragment")
        st.session_state[f"job {key}"] = running
        if was and not running:
            st.rerun()

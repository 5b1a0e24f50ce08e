"""Why here? The sets of tokens that a latent, or the token that comes next, needs together or in place of each other, as brackets over the text."""

from collections.abc import Callable, Sequence
from typing import Any

import streamlit as st
from opened import bench_of
from shell import clickable, said
from where import link_to, toggle

from saebench.browse.runs import Trained
from saebench.browse.why import Explaining, Question
from saebench.interactions import Interactions
from saebench.interactions.explain import MOST
from saebench.steer import Bench
from saebench.view import brackets, grid
from saebench.view.markdown import code, plain
from saebench.view.tokens import alone

WAYS: dict[Any, str] = {
    "unattended": "left out of attention", "neutral": "replaced by a neutral token", "mean": "replaced by the corpus' mean embedding"
}  # fmt: skip
SHOWN, MANY = 10, 50  # sets to begin with, and at most


def place_asked(latent: int, length: int) -> tuple[int, ...] | None:
    """The place of this latent that the address asks about, in so many numbers: the row of an example, or a line of one's own and its token."""
    of, *place = st.query_params.get("why", "").split(":")
    if of != str(latent) or len(place) != length or not all(part.isdecimal() and len(part) < 16 for part in place):
        return None
    return tuple(map(int, place))


def why_link(latent: int, *place: int) -> str:
    """Asks about a place, or no longer does where that is what the address asks."""
    asked = place_asked(latent, len(place)) == place
    name = ":".join(map(str, (latent, *place)))
    return grid.link("close" if asked else "why here?", f"why:{name}", link_to("features", latent=latent, why=name))


def ask(value: str) -> None:
    """What a click on `why_link` does; the whole page is drawn again, where another place may have been asked about."""
    toggle("why", value.partition(":")[2])
    st.session_state.asked = True


def with_answer(
    parts: Sequence[tuple[tuple[int, ...], str]], place: tuple[int, ...] | None, key: str, answer: Callable[[], None]
) -> None:
    """HTML, each part with the place that it is of, and the answer behind that which is asked about, or before all where it is none of these."""
    if st.session_state.pop("asked", False):
        st.rerun()
    bodies, end = [body for _, body in parts], len(parts)
    if place is not None:
        end = next((number for number, (of, _) in enumerate(parts, 1) if of == place), 0)
    for some, name in ((bodies[:end], key), (bodies[end:], f"{key} below")):
        if some:
            clickable("".join(some), name, ask, links=False)
        if place is not None and name == key:
            with said():
                answer()


def why(sae: Trained, question: Question) -> None:
    """The interactions behind what is asked about, with the settings that are chosen here.

    Raises ValueError where the model does not belong to the SAE, and for what the interactions refuse.
    """
    bench, lock = bench_of(sae)
    with st.container(border=True):
        question = settings(question)
        found = explaining(bench, question, lock)
        if not found.wait(0.5):  # what is done at once needs no bar
            running(found)
        elif found.stopped:
            st.caption("Stopped.")
            if st.button("Explain"):
                _begun.clear(bench.key, question, bench, lock)
                st.rerun()
        elif found.error is not None:
            raise ValueError(found.error)
        elif found.result is not None:
            show(found.result)


def settings(question: Question) -> Question:
    with st.container(horizontal=True, vertical_alignment="bottom"):
        n = st.number_input(
            "Units masked", 1, MOST, question.n, key="units", bind="query-params", width=130,
            help="Those that matter most of the 32 before, in all 2^n combinations",
        )  # fmt: skip
        ways = list(WAYS)
        way = st.selectbox(
            "A masked one is", ways, format_func=WAYS.__getitem__, key="way", bind="query-params", width=280
        )
        words = st.toggle("Words", key="words", bind="query-params", help="mask words, not tokens")
    return question._replace(n=int(n), words=bool(words), way=way or ways[0])


def explaining(bench: Bench, question: Question, lock: Any) -> Explaining:
    """What answers the question; what was asked before and is not done is stopped. What a question stopped so is begun again when it is asked again."""
    before: Explaining | None = st.session_state.get("explaining")
    found = _begun(bench.key, question, bench, lock)
    if found is not before:
        if before is not None:
            before.stop()
        if found.stopped:
            _begun.clear(bench.key, question, bench, lock)
            found = _begun(bench.key, question, bench, lock)
    st.session_state.explaining = found
    return found


@st.cache_resource(show_spinner=False, max_entries=64)
def _begun(key: tuple[str, ...], question: Question, _bench: Bench, _lock: Any) -> Explaining:
    return Explaining(_bench, question, _lock)


@st.fragment(run_every=0.5)
def running(found: Explaining) -> None:
    if found.done:
        st.rerun()
    st.progress(found.share, text="Masking in every combination")
    if st.button("Stop", key="stop explaining"):
        found.stop()
        st.rerun()


def show(found: Interactions) -> None:
    told = found.to_json()
    st.markdown(heading(found))
    most = int(st.slider("Sets shown", 1, MANY, SHOWN, key="sets", bind="query-params"))
    clickable(brackets.brackets_html(told, most), "brackets")
    st.caption(agreement(found))
    with st.expander("In words"):
        clickable(brackets.sets_html(told, most), "sets in words")
    shown = min(most, len(found.sets))
    st.caption(fit(found, shown))
    st.plotly_chart(brackets.rebuilt(found.curve, shown), key="rebuilt", config={"displaylogo": False})


def heading(found: Interactions) -> str:
    """What it is, and what was masked."""
    near = found.left_out + len(found.units)
    chosen = (
        f"the {len(found.units)} that matter most of the {near} before it"
        if found.left_out
        else f"all {near} before it"
    )
    return (
        f"**{plain(found.scalar)}** is **{found.whole:.3g}** at {code(alone(found.pieces[-1]) or brackets.NOTHING)}, and {found.empty:.3g} with {chosen} masked: "
        f"{WAYS[found.way]}."
    )


def agreement(found: Interactions) -> str:
    """How far it depends on the way of masking."""
    if found.other is None or found.agreement is None:
        return "No other way of masking was tried."
    both = sum(bool(one.agreed) for one in found.sets)
    return (
        f"{both} of the {len(found.sets)} sets count, too, when the same are {WAYS[found.other]}: "
        f"{found.agreement:.0%} of all that count under either way."
    )


def fit(found: Interactions, shown: int) -> str:
    """How well the sets that are shown say what it does."""
    worse = "" if found.curve[shown] > 0 else ", worse than their mean does: here many sets cancel each other out"
    return (
        f"The {shown} largest sets and a constant rebuild {plain(found.scalar)} in all {len(found.values):,} maskings at R² {found.curve[shown]:.3f}{worse}; "
        f"all sets do so exactly. {len(found.sets)} are above 5% of the size of the first: no others are drawn."
    )

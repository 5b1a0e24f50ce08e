"""The steering bench: latents turned up, down or off, beside their controls, from the same noise."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import streamlit as st
from kept import recipes
from opened import bench_of
from shell import clickable, fragment, offer, said
from turns import another, turn_row
from where import chosen_sae

from saebench.browse.recipes import MAX_TEXTS, POSITIONS, Recipe
from saebench.browse.runs import Trained
from saebench.index import FeatureIndex
from saebench.steer import Bench, Turn, arms_of, parse_turns, units_of
from saebench.steer.live import Live
from saebench.steer.run import read_sweep
from saebench.steer.turns import belonging_of
from saebench.view import charts
from saebench.view.arms import arm_html
from saebench.view.markdown import plain

ARMS = {
    "unsteered": "the model as it is", "steered": "with the interventions",
    "random": "random directions of the same norm", "negative": "the same directions, negative",
}  # fmt: skip


class Made(NamedTuple):
    """A generation on the bench, and what it was made with."""

    live: Live
    of: tuple[str, ...]
    """`key_of`"""
    recipe: Recipe


def turns_now() -> tuple[Turn, ...]:
    """The interventions of the address. Raises ValueError for what cannot be read."""
    return parse_turns(st.query_params.get("turns", ""))


def recipe_now(turns: tuple[Turn, ...]) -> Recipe:
    """The interventions with what the widgets say."""
    state = st.session_state
    chosen = {field.name: state[field.name] for field in dataclasses.fields(Recipe) if field.name != "turns"}
    return Recipe(turns=turns, **chosen)


def made_by(bench: Bench) -> Made | None:
    """What is on the bench, if it is of these SAEs, indexes and model as they are now."""
    made: Made | None = st.session_state.get("made")
    with contextlib.suppress(ValueError):  # an SAE that was turned is gone
        if made is not None and made.of == key_of(bench, made.recipe.turns):
            return made
    return None


def key_of(bench: Bench, turns: tuple[Turn, ...]) -> tuple[str, ...]:
    """`Bench.key`, with the hashes of all SAEs that are turned. Raises ValueError as `Bench.beside` does."""
    return *bench.key, *belonging_of(bench, turns).values()


def sampling_inputs(longest: int) -> None:
    bound: dict[str, Any] = {"bind": "query-params", "persist_state": "page"}
    st.text_area("Prompt", key="prompt", height=80, placeholder="def add(a, b):", **bound)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.selectbox("Positions", POSITIONS, key="positions", help="BOS is always left alone", width=160, **bound)
        st.number_input("Tokens", 1, longest, min(48, longest), key="max_new_tokens", width=110, **bound)
        st.number_input("Texts", 1, MAX_TEXTS, 1, key="n", width=100, **bound)
        st.number_input("Temperature", 0.0, 5.0, 1.0, 0.1, key="temperature", width=125, **bound)
        st.number_input("Top p", 0.05, 1.0, 1.0, 0.05, key="top_p", width=115, **bound)
        st.number_input(
            "Repetition", 0.5, 3.0, 1.0, 0.05, key="repetition_penalty", width=130,
            help="penalty: above 1 tokens already in the text are less likely", **bound,
        )  # fmt: skip
        st.number_input("Seed", 0, 2**31, 0, key="seed", width=110, **bound)


@fragment
def settings(sae: Trained, bench: Bench, lock: Any) -> None:
    longest = bench.model.max_context - 2
    sampling_inputs(longest)
    turns: tuple[Turn, ...] = ()
    with said():  # what cannot be read is told, and the bench goes on without it
        turns = turns_now()
    fine = [turn_row(sae, bench, turns, place) for place in range(len(turns))]
    another(sae, bench, turns)
    recipe = recipe_now(turns)
    made = made_by(bench)
    running = made is not None and not made.live.done
    buttons = st.container(horizontal=True)
    ready = bool(turns) and all(fine) and not running
    if buttons.button("Generate", type="primary", disabled=not ready, shortcut="Mod+Enter"):
        if before := st.session_state.get("made"):
            before.live.stop()  # another SAE's may still be at it
        arms = arms_of(recipe.interventions(bench), seed=recipe.seed)
        live = Live(bench.model, recipe.prompt, arms, recipe.sampling(), lock)
        st.session_state.made = Made(live, key_of(bench, recipe.turns), recipe)
        st.rerun()
    if buttons.button("Stop", disabled=not running) and made is not None:
        made.live.stop()
        made.live.wait(10.0)
        st.rerun()
    if made is not None and recipe != made.recipe:
        buttons.caption("The texts below are from earlier settings.")
    with buttons.popover("Recipes"):
        recipes(sae, recipe, longest)
    with buttons.popover("Copy as Python"):
        st.code(recipe.python(sae.folder), language="python")
    if not turns:
        st.info("Choose a latent above, or open one from Features or Prompt and steer with it.")


def texts(bench: Bench) -> None:
    """The arms side by side, as they come; then with the divergence of each token."""
    made = made_by(bench)
    if made is None:
        return
    live = made.live
    about = ", ".join(map(str, made.recipe.turns))
    st.caption(f"{plain(about)}, at {made.recipe.positions} positions, seed {made.recipe.seed}")

    @st.fragment(run_every=None if live.done else 0.25)
    def arms(live: Live = live) -> None:
        if live.error:
            st.error(plain(live.error))
            return
        for column, arm in zip(st.columns(len(live.arms)), live.arms, strict=True):
            with column:
                clickable(arm_html(arm, ARMS.get(arm, ""), *shown(live, arm)), f"arm {arm}")
        if live.done and st.session_state.get("settled") is not live:
            st.session_state.settled = live
            st.rerun()

    arms()
    if live.result is not None:
        seconds = ", ".join(f"{stage.replace('_', ' ')} {value:.2f} s" for stage, value in live.result.seconds.items())
        st.caption(
            f"Blue: KL to the unsteered model at each token, on hover. ◆ the first token that differs. Took {seconds}."
        )


def shown(live: Live, arm: str) -> tuple[list[list[str]], list[Any]]:
    """(pieces of each text, and what was measured on it once all is done)."""
    if live.result is None:
        return [live.pieces(arm, sample) for sample in range(live.n_samples)], []
    of = live.result.of(arm)
    return [live.pieces(arm, text.sample) for text in of], of


def dose(sae: Trained, bench: Bench) -> None:
    """The dose-response of the first latent, measured by the command line, where its SAE has an index with a store."""
    turns, now = (), None
    with contextlib.suppress(ValueError):  # which the settings have told
        found = turns_now()
        bench = bench.beside(found[0].sae if found else "")
        turns = found
    if bench.index is None or not bench.index.has_store:
        return
    st.subheader("Dose-response")
    if not turns or turns[0].mode == "ablate" or turns[0].latent >= bench.sae.d_sae:
        st.caption("Of the first latent, in a mode that has a strength.")
        return
    units = units_of(bench.sae, turns[0].latent, bench.index)
    with contextlib.suppress(ValueError):
        raw = units.raw(turns[0].strength, turns[0].mode)
        now = raw if turns[0].mode == "scale" else units.all(raw)["norm"]
    response(Trained(sae.run, bench.folder), bench.index, turns[0], st.session_state.positions, now)


def measured(path: Path, index: FeatureIndex, turn: Turn, positions: str, now: float | None) -> tuple[Any, str]:
    """(the plot of a sweep, what it found in words). Raises ValueError for a file that holds none, or another."""
    found = read_sweep(path, index, turn.latent, turn.mode, positions)
    try:
        arms = {
            "steered": f"latent {found['latent']}",
            "random": "a random direction",
            "other": f"latent {found['other']}",
        }
        scores = [
            f"{arms[dose['arm']]} {dose['score']:.2f} ({dose['intervals']['score'][0]:.2f} to {dose['intervals']['score'][1]:.2f})"
            for dose in found["tested"]
        ]
        return charts.dose_response(found, now=now), (
            f"*Concept*: by how much the latent fires where the model reads what was written. *Best* (strength {found['best']:.3g}) was chosen on half of the "
            f"prompts; harmonic mean of concept and fluency on the other half: {', '.join(scores)}. Bars and (…): 95%, over prompts."
        )
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"{path} is no dose-response: measure again") from error


def response(sae: Trained, index: FeatureIndex, turn: Turn, positions: str, now: float | None) -> None:
    """The plot, once it is measured, with the strength that is set `now`; and the button that measures it."""
    where = [] if positions == "all" else [positions]
    out = sae.run / "sweeps" / f"{'-'.join([sae.name, str(turn.latent), turn.mode, *where])}.json"
    if out.exists():
        with said():
            plot, words = measured(out, index, turn, positions, now)
            st.plotly_chart(plot, key=f"dose {out.name}", config={"displaylogo": False})
            st.caption(words)
    arguments = ["steer", "--sweep", "--sae", str(sae.folder), "--latent", str(turn.latent), "--mode", turn.mode]
    arguments += ["--positions", *where] if where else []
    offer("Measure again" if out.exists() else f"Sweep latent {turn.latent}", [*arguments, "--out", str(out)], sae.run)


st.title("Steering")
sae = chosen_sae()
if sae is None:
    st.info("There is no SAE to steer with yet: see the overview.")
    st.stop()
with said():
    bench, lock = bench_of(sae)
    index = bench.index
    if index is None:
        st.info("Without an index strengths can only be given raw; make one from the overview.")
    settings(sae, bench, lock)
    texts(bench)
    dose(sae, bench)

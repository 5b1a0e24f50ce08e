"""The steering bench: latents turned up, down or off, beside their controls, from the same noise."""

import dataclasses
from typing import Any, get_args

import streamlit as st
from shell import bench_of, chosen_sae, clickable, offer, said, table_of
from strength import strength_inputs

from saebench.browse.recipes import (
    MODES,
    Recipe,
    Turn,
    format_turns,
    load_recipe,
    parse_turns,
    recipes_of,
    save_recipe,
)
from saebench.browse.runs import Trained
from saebench.files import read_json
from saebench.index import FeatureIndex
from saebench.steer import arms_of
from saebench.steer.live import Live
from saebench.steer.run import Bench
from saebench.view import charts
from saebench.view.arms import arm_html

MEANINGS = {
    "add": "adds the direction at this strength", "clamp": "sets the activation to this value",
    "scale": "multiplies the activation", "ablate": "sets the activation to 0",
    "orthogonal": "replaces what lies along the direction",
}  # fmt: skip
POSITIONS = get_args(Recipe.__annotations__["positions"])
ARMS = {
    "unsteered": "the model as it is", "steered": "with the interventions",
    "random": "random directions of the same norm", "negative": "the same directions, negative",
}  # fmt: skip


def recipe_now() -> Recipe:
    """What the URL and the widgets say. Raises ValueError for turns that cannot be read."""
    state = st.session_state
    plain = {field.name: state[field.name] for field in dataclasses.fields(Recipe) if field.name != "turns"}
    return Recipe(turns=parse_turns(st.query_params.get("turns", "")), **plain)


def set_turns(turns: tuple[Turn, ...]) -> None:
    st.query_params["turns"] = format_turns(turns)


def turn_rows(bench: Bench, turns: tuple[Turn, ...], index: FeatureIndex | None) -> None:
    """A row of widgets for each intervention, and one to add another."""
    for number, turn in enumerate(turns):
        columns = st.columns([2.2, 1.6, 4.2, 0.8], vertical_alignment="bottom")

        def change(at: int = number, **values: Any) -> None:
            now = list(turns)
            now[at] = dataclasses.replace(now[at], **values)
            set_turns(tuple(now))

        name = index.explanations[turn.latent] if index and turn.latent < index.d_sae else ""
        columns[0].markdown(f"**Latent {turn.latent}**")
        columns[0].caption(name or "no rule")
        key = f"mode {number} {turn.latent}"
        columns[1].selectbox(
            "Mode", MODES, index=MODES.index(turn.mode), key=key, help="; ".join(f"{k}: {v}" for k, v in MEANINGS.items()),
            on_change=lambda key=key, change=change, turn=turn: change(
                mode=st.session_state[key],
                strength="2" if st.session_state[key] == "scale" else "0.5n" if turn.mode == "scale" else turn.strength,
            ),
        )  # fmt: skip
        with columns[2]:
            strength_inputs(bench, turn, f"{number} {turn.latent}", lambda text, change=change: change(strength=text))
        columns[3].button(
            "Remove", key=f"remove {number}", on_click=lambda at=number: set_turns(turns[:at] + turns[at + 1 :])
        )
    left, right, _ = st.columns([2, 1.3, 5], vertical_alignment="bottom")
    added = left.number_input("Add a latent", 0, bench.sae.d_sae - 1, None, key="added", placeholder="number")
    if right.button("Add", disabled=added is None) and added is not None:
        set_turns((*turns, Turn(latent=int(added))))
        st.rerun(scope="fragment")


def sampling_inputs(longest: int) -> None:
    bound: dict[str, Any] = {"bind": "query-params", "persist_state": "page"}
    st.text_area("Prompt", key="prompt", height=80, placeholder="def add(a, b):", **bound)
    columns = st.columns([2, 1, 1, 1, 1, 1.2, 1])
    columns[0].selectbox("Positions", POSITIONS, key="positions", help="BOS is always left alone", **bound)
    columns[1].number_input("Tokens", 1, longest, min(48, longest), key="max_new_tokens", **bound)
    columns[2].number_input("Texts", 1, 8, 1, key="n", **bound)
    columns[3].number_input("Temperature", 0.0, 5.0, 1.0, 0.1, key="temperature", **bound)
    columns[4].number_input("Top p", 0.05, 1.0, 1.0, 0.05, key="top_p", **bound)
    columns[5].number_input("Repetition penalty", 0.5, 3.0, 1.0, 0.05, key="repetition_penalty", **bound)
    columns[6].number_input("Seed", 0, 2**31, 0, key="seed", **bound)


@st.fragment
def settings(sae: Trained, bench: Bench, lock: Any, index: FeatureIndex | None) -> None:
    sampling_inputs(bench.model.max_context - 2)
    with said():
        turns = parse_turns(st.query_params.get("turns", ""))
        turn_rows(bench, turns, index)
        recipe = recipe_now()
        live: Live | None = st.session_state.get("live")
        running = live is not None and not live.done
        begin, stop, recipes, code, _ = st.columns([2, 1, 1, 1.4, 3])
        off = running or not turns
        if begin.button("Generate", type="primary", disabled=off, shortcut="Mod+Enter", width="stretch"):
            arms = arms_of(recipe.interventions(bench), seed=recipe.seed)
            st.session_state.live = Live(bench.model, recipe.prompt, arms, recipe.sampling(), lock)
            st.rerun()
        if stop.button("Stop", disabled=not running, width="stretch") and live is not None:
            live.stop()
            live.wait(10)
            st.rerun()
        if not turns:
            st.info("Choose a latent by its number, or open one from Features or Prompt and steer with it.")
        with code.popover("Copy as Python"):
            st.code(recipe.python(sae.folder), language="python")
        with recipes.popover("Recipes"):
            keep(sae, recipe)


def keep(sae: Trained, recipe: Recipe) -> None:
    """Save these settings, or open others."""
    with said():
        name = st.text_input("Save these settings as", key="recipe name")
        if st.button("Save", disabled=not name):
            st.caption(f"saved as `{save_recipe(sae.run, name, sae.name, recipe)}`")
        for known in recipes_of(sae.run, sae.name):
            st.button(
                known, key=f"recipe {known}", icon=":material/folder_open:", on_click=open_recipe, args=(sae, known)
            )
        if error := st.session_state.pop("recipe error", None):
            st.error(error)


def open_recipe(sae: Trained, name: str) -> None:
    try:
        recipe = load_recipe(sae.run, name)
    except ValueError as error:
        st.session_state["recipe error"] = str(error)
        return
    for field in dataclasses.fields(Recipe):
        if field.name != "turns":
            st.session_state[field.name] = getattr(recipe, field.name)
    set_turns(recipe.turns)


def texts() -> None:
    """The arms side by side, as they come; then with the divergence of each token."""
    live: Live | None = st.session_state.get("live")
    if live is None:
        return

    @st.fragment(run_every=None if live.done else 0.25)
    def arms(live: Live = live) -> None:
        if live.error:
            st.error(live.error)
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


def dose(sae: Trained, turns: tuple[Turn, ...]) -> None:
    """The dose-response of the first latent, measured by the command line."""
    st.subheader("Dose-response")
    if not turns or turns[0].mode == "ablate":
        st.caption("Of the first latent, in a mode that has a strength.")
        return
    turn = turns[0]
    out = sae.run / "sweeps" / f"{sae.name}-{turn.latent}-{turn.mode}.json"
    if out.exists():
        with said():
            st.plotly_chart(charts.dose_response(read_json(out)), key=f"dose {out.name}", config={"displaylogo": False})
    arguments = ["steer", "--sweep", "--sae", str(sae.folder), "--latent", str(turn.latent), "--mode", turn.mode]
    offer("Measure again" if out.exists() else f"Sweep latent {turn.latent}", [*arguments, "--out", str(out)], sae.run)


st.title("Steering")
sae = chosen_sae()
if sae is None:
    st.info("There is no SAE to steer with yet: see the overview.")
    st.stop()
with said():
    index = table_of(sae).index if sae.share_indexed > 0 else None
    if index is None:
        st.info("Without an index strengths can only be given raw; make one from the overview.")
    bench, lock = bench_of(sae, index)
    settings(sae, bench, lock, index)
    texts()
    if index is not None and index.has_store:
        dose(sae, parse_turns(st.query_params.get("turns", "")))

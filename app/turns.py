"""The interventions of the steering bench: a row of widgets for each, and a search for another latent."""

import dataclasses
from collections.abc import Callable
from typing import Any

import streamlit as st
from opened import table_of
from shell import clickable, said
from where import link_to

from saebench.browse.runs import Trained, saes_of
from saebench.browse.table import LatentTable, Query
from saebench.index import FeatureIndex
from saebench.index.page import name_html
from saebench.steer import Bench, units_of
from saebench.steer.turns import MODES, Turn, format_turns
from saebench.steer.units import MOST
from saebench.view import grid
from saebench.view.markdown import plain
from saebench.view.tokens import number

MEANINGS = {
    "add": "adds the direction at this strength", "clamp": "sets the activation to this value",
    "scale": "multiplies the activation", "ablate": "sets the activation to 0",
    "orthogonal": "replaces what lies along the direction",
}  # fmt: skip
UNITS = {"raw": ("Raw", "", "in units of the residual stream"), "max": ("× maximum", "x", "times its maximum in the index"),
         "norm": ("Of the norm", "n", "‖Δ‖ over the median norm of the stream; published searches end near 0.5")}  # fmt: skip
FOUND = 8  # latents that a search shows


def set_turns(turns: tuple[Turn, ...]) -> None:
    st.query_params["turns"] = format_turns(turns)


def usual_strength(index: FeatureIndex | None) -> str:
    """What a latent is first steered with: in the best unit that is known."""
    return "10" if index is None else "0.5n" if index.has_store else "4x"


def of_turn(sae: Trained, bench: Bench, name: str) -> tuple[Bench, LatentTable | None]:
    """(the bench of the SAE that a turn names, its latents where there is an index). Raises ValueError as `Bench.beside` does."""
    bench = bench.beside(name)
    return bench, table_of(Trained(sae.run, bench.folder)) if bench.index else None


def turn_row(sae: Trained, bench: Bench, turns: tuple[Turn, ...], place: int) -> bool:
    """Mode and strength of one intervention, and whether it can be done; what is wrong with it is told."""
    turn, key = turns[place], f"{place} {turns[place].latent}{turns[place].sae}"
    rest = turns[:place] + turns[place + 1 :]
    try:
        bench, table = of_turn(sae, bench, turn.sae)
    except ValueError as error:
        st.error(plain(str(error)), icon=":material/error:")
        st.button("Remove", key=f"remove {key}", on_click=set_turns, args=(rest,))
        return False
    there = turn.latent < bench.sae.d_sae
    name = table.names[turn.latent].text if table and there else ""

    def change(**values: Any) -> None:
        set_turns((*turns[:place], dataclasses.replace(turn, **values), *turns[place + 1 :]))

    def change_mode() -> None:
        mode = st.session_state[f"mode {key}"]
        usual = usual_strength(bench.index)
        strength = "2" if mode == "scale" else usual if turn.mode == "scale" else turn.strength
        change(mode=mode, strength=strength)

    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in MEANINGS.items())
    with st.container(horizontal=True, vertical_alignment="bottom"):
        with st.container(width=220, gap=None):
            st.markdown(f"**Latent {turn.latent}**" + f" of {plain(turn.sae)}" * bool(turn.sae))
            st.caption(plain(name) or ("no name" if there else "none such"))
        st.selectbox(
            "Mode",
            MODES,
            index=MODES.index(turn.mode),
            key=f"mode {key}",
            help=meanings,
            on_change=change_mode,
            width=130,
        )
        fine, problem = False, ""
        try:
            fine = there and strength_inputs(bench, turn, key, lambda text: change(strength=text))
        except ValueError as error:
            problem = str(error)
        st.button("Remove", key=f"remove {key}", on_click=set_turns, args=(rest,))
    if not there:
        problem = f"latent is {turn.latent}; the SAE has 0 to {bench.sae.d_sae - 1}"
    if problem:
        st.error(plain(problem), icon=":material/error:")
    return fine


def strength_inputs(bench: Bench, turn: Turn, key: str, on_change: Callable[[str], None]) -> bool:
    """Widgets of which each sets the others; `on_change` is given the strength as it was typed.

    Raises ValueError for a strength that is not known here, once there is a box to type another.
    """
    if turn.mode == "ablate":
        st.caption("set to 0", width=100)
        return True
    wrong: ValueError | None = None
    if turn.mode == "scale":
        shown: dict[str, tuple[float | None, str, str, str]] = {
            "factor": (float(turn.strength), "Factor", "", "of the activation")
        }
    else:
        units = units_of(bench.sae, turn.latent, bench.index)
        values: dict[str, float | None] = dict.fromkeys(UNITS)
        try:
            values = units.all(units.raw(turn.strength, turn.mode))
        except ValueError as error:
            wrong = error
        shown = {unit: (values[unit], *described) for unit, described in UNITS.items()}
    for unit, (value, label, suffix, meaning) in shown.items():
        name = f"{unit} {key} {turn.strength}"  # another strength is another widget
        st.number_input(
            label, -MOST, MOST, value, max(abs(value or 0.0) / 10, 0.01), format="%.4g", key=name,
            disabled=value is None and bool(suffix), help=meaning, width=140,
            on_change=lambda name=name, suffix=suffix: on_change(f"{st.session_state[name] or 0:g}{suffix}"),
        )  # fmt: skip
    if wrong:
        raise wrong
    return True


def another(sae: Trained, bench: Bench, turns: tuple[Turn, ...]) -> None:
    """A box for a number or words, the SAE that is searched, and the latents that are found."""
    box, choice = st.columns([2, 1])
    own, others = sae.name, [name for name in saes_of(sae.run)[0] if name != sae.name]
    of, table = "", None
    if others:
        chosen = choice.selectbox("of SAE", [own, *others], key="added of", help="of the same model, at any layer")
        of = "" if chosen == own else chosen
    with said():
        bench, table = of_turn(sae, bench, of)
        found_in(box, bench, turns, of, table)


def found_in(box: Any, bench: Bench, turns: tuple[Turn, ...], of: str, table: LatentTable | None) -> None:
    """The box, and the latents of a bench that it finds; one that is picked is turned as of the SAE `of`."""
    text = box.text_input(
        "Add a latent", key="added", live=True,
        placeholder="its number" if table is None else "its number, or words of its name or tokens",
    ).strip()  # fmt: skip
    if not text:
        return

    def picked(value: str) -> None:
        st.session_state.added = ""
        set_turns((*turns, Turn(latent=int(value), strength=usual_strength(bench.index), sae=of)))

    named = [int(text)] if text.isdecimal() and len(text) < 9 and int(text) < bench.sae.d_sae else []
    sort = "output" if table is not None and "output" in table.columns else "density"
    query = Query(text=text, sort=sort, descending=True, size=FOUND)
    found = [] if table is None else [latent for latent in table.find(query).latents.tolist() if latent not in named]
    rows = [_row(latent, bench.folder.name, table) for latent in (named + found)[:FOUND]]
    if not rows:
        st.caption(f"No latent is like that; their numbers go from 0 to {bench.sae.d_sae - 1}.")
        return
    columns = [
        grid.Column("", "latent"),
        grid.Column("", "name", text=True),
        grid.Column("", "density"),
        grid.Column("", "output score", "~ estimated by a screen"),
    ]
    clickable(grid.grid_html(columns, rows, "found"), "found", picked, links=False)


def _row(latent: int, sae: str, table: LatentTable | None) -> grid.Row:
    address = link_to("features", sae=sae, latent=latent)
    if table is None:
        return grid.Row([grid.link(str(latent), str(latent), address), "", "", ""], str(latent))
    output = number(float(table.columns["output"][latent])) if "output" in table.columns else "–"
    output += " ~" * bool(table.estimated[latent])
    cells = [name_html(table.names[latent]), f"{table.columns['density'][latent]:.2%}", output]
    return grid.Row([grid.link(str(latent), str(latent), address), *cells], str(latent))

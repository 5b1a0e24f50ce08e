"""One strength in three linked units."""

from collections.abc import Callable

import streamlit as st

from saebench.browse.recipes import Turn
from saebench.steer import units_of
from saebench.steer.run import Bench

UNITS = {"raw": ("Raw", "", "in units of the residual stream"), "max": ("× maximum", "x", "times its maximum in the index"),
         "norm": ("Of the norm", "n", "‖Δ‖ over the median norm of the stream; published searches end near 0.5")}  # fmt: skip


def strength_inputs(bench: Bench, turn: Turn, key: str, on_change: Callable[[str], None]) -> None:
    """Widgets of which each sets the others; `on_change` is given the strength as it was typed. Raises ValueError as `Units`."""
    if turn.mode == "ablate":
        st.caption("set to 0")
        return
    if turn.mode == "scale":
        name = f"factor {key} {turn.strength}"
        st.number_input(
            "Factor",
            value=float(turn.strength),
            step=0.5,
            key=name,
            on_change=lambda: on_change(f"{st.session_state[name]:g}"),
        )
        return
    units = units_of(bench.sae, turn.latent, bench.index)
    values = units.all(units.raw(turn.strength, turn.mode))
    for column, (unit, (label, suffix, meaning)) in zip(st.columns(3), UNITS.items(), strict=True):
        value = values[unit]
        name = f"{unit} {key} {turn.strength}"  # another strength is another widget
        column.number_input(
            label, value=value, step=None if value is None else max(abs(value) / 10, 0.01), format="%.4g", key=name,
            disabled=value is None, help=meaning,
            on_change=lambda name=name, suffix=suffix: on_change(f"{st.session_state[name]:g}{suffix}"),
        )  # fmt: skip

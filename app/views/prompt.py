"""A text, its tokens, and the latents that fire on it."""

import html
from typing import Any

import numpy as np
import streamlit as st
from opened import fires_on, model_of, table_of
from shell import clickable, fragment, missing, said
from turns import usual_strength
from where import chosen_sae, link_to, toggle
from why import why

from saebench.browse.runs import Trained
from saebench.browse.table import LatentTable
from saebench.browse.why import Question
from saebench.index.page import name_html
from saebench.index.search import Firing, TextFeatures, differences, token_of
from saebench.models import Predictions, logit_lens, next_tokens
from saebench.pieces import show_bytes
from saebench.view import grid
from saebench.view.markdown import code, plain
from saebench.view.tokens import alone, number, token_html, units

RANKS = {"Activation": "activation", "Quantile": "quantile", "Attribution": "attribution"}
MEANINGS = {
    "Activation": "the strongest activation on the text",
    "Quantile": "the chance that the strongest of as many of the latent's own firings is no stronger: what is unusual for it",
    "Attribution": "gradient × activation, on the logit of the token that follows, from all tokens up to there",
}
DENSITIES = {"any": 1.0, "at most 10%": 0.1, "at most 1%": 0.01, "at most 0.1%": 0.001}


def forget() -> None:
    """A chosen token and latent belong to the text before."""
    for name in ("at", "focus"):
        st.query_params.pop(name, None)


def settings() -> None:
    two = st.toggle("Two texts", key="two", bind="query-params", help="which latents tell them apart")
    with st.form("prompt", border=False):
        boxes: Any = st.columns(2) if two else [st.container()]
        for box, key in zip(boxes, ("text", "other"), strict=False):
            shown = "def add(a, b):" if key == "text" else "def add(a, b, c):"
            label = "Other text" if key == "other" else "Text"
            box.text_area(label, key=key, bind="query-params", height=110, placeholder=shown)
        st.form_submit_button("See what fires", type="primary", on_click=forget)
    left, middle, right = st.columns([3, 2, 2], vertical_alignment="bottom")
    rank = None
    if not two:
        rank = left.segmented_control("Rank by", list(RANKS), default="Activation", key="rank", bind="query-params")
    middle.selectbox("Density", list(DENSITIES), key="density", bind="query-params")
    right.selectbox("Latents", [25, 50, 100, 250], key="limit", bind="query-params")
    if rank == "Attribution":
        left, right = st.columns(2)
        how = "one token; its leading space may be written ·"
        left.text_input("Token", key="target", bind="query-params", placeholder="the one that follows", help=how)
        right.text_input("Compared with", key="against", bind="query-params", placeholder="the mean of all", help=how)
    ranked = "the difference of their strongest activations on the two" if two else MEANINGS[rank or "Activation"]
    st.caption(f"Ranked by {ranked}.")


def search(sae: Trained, text: str, position: int | None) -> TextFeatures:
    """Raises ValueError for a text that does not fit, and for a position beyond it."""
    model, state = model_of(sae).model, st.session_state
    chosen = {name: token_of(model, state[name]) for name in ("target", "against") if state.get(name)}
    return fires_on(
        sae, text, rank=RANKS[state.get("rank") or "Activation"], position=position,
        max_density=DENSITIES[state.get("density") or "any"], limit=state.get("limit") or 25, **chosen,
    )  # fmt: skip


def tokens_html(
    found: TextFeatures, focus: int | None, *, position: int | None = None, pick: bool = True, strongest: float = 0.0
) -> str:
    """The text, with a chosen latent's activations on it, of the `strongest` or the text's own; a token may be picked by a click."""
    values = np.zeros(len(found.tokens))
    for firing in found.firings:
        if focus is None:
            values[firing.positions] += 1
        elif firing.latent == focus:
            values[firing.positions] = firing.values
    spans = []
    for unit in units(found.pieces):
        place = unit.strongest(values.tolist())
        value = float(values[place])
        massive = bool(found.massive[list(unit.places)].any())
        title = f"{value:.0f} of these latents" if focus is None else number(value)
        spans.append(
            token_html(
                unit.text, value, strongest or float(values.max()), pick=f"at:{place}" if pick else "",
                kind=" ".join(["chosen"] * (position in unit.places) + ["massive"] * massive),
                title=unit.named("massive activation: left out, and left alone by steering" if massive else title),
            )
        )  # fmt: skip
    return f'<div class="sb-text">{"".join(spans)}</div>'


def firings_html(table: LatentTable, text: str, found: TextFeatures, focus: int | None) -> str:
    columns = [
        grid.Column("", "latent"), grid.Column("", "name", text=True), grid.Column("", "peak at", text=True),
        grid.Column("", "peak"), grid.Column("", "quantile", "chance that the strongest of as many of its firings is no stronger"),
        grid.Column("", "density"), *([grid.Column("", "effect", "on the logit, in all")] if found.target is not None else []),
        grid.Column("", "tokens"), grid.Column("", ""),
    ]  # fmt: skip
    rows = []
    for firing in found.firings:
        cells = [
            grid.link(str(firing.latent), f"latent:{firing.latent}", link_to("features", latent=firing.latent)), name_html(table.names[firing.latent]),
            peak_html(found, firing), number(firing.peak), f"{firing.unusual:.1%}",
            f"{firing.density:.2%}", *([f"{firing.effect:+.3f}"] if found.target is not None else []),
            str(len(firing.positions)), grid.link("steer", f"steer:{firing.latent}", link_to("steering", turns=f"{firing.latent}:add:{usual_strength(table.index)}", prompt=text)),
        ]  # fmt: skip
        rows.append(grid.Row(cells, f"focus:{firing.latent}", firing.latent == focus))
    return grid.grid_html(columns, rows, "latents that fire")


@st.cache_data(show_spinner=False, max_entries=64)
def expected(
    depends: tuple[str, ...], tokens: tuple[int, ...], layers: bool, _shared: Any
) -> tuple[dict[str, Predictions], dict[int, str]]:
    """(the likeliest next tokens, by hook at each layer or of the whole model alone, and their texts)."""
    with _shared.lock:
        model = _shared.model
        found = logit_lens(model, tokens) if layers else {"": next_tokens(model, tokens)}
    ids = sorted({token for one in found.values() for token in one.ids.tolist()})
    return found, {token: alone(show_bytes(model.pieces[token])) for token in ids}


def expectations(sae: Trained, found: TextFeatures, position: int | None) -> None:
    """What the model as it is says comes next, in the end or at each layer."""
    place = len(found.tokens) - 1 if position is None else position
    shared = model_of(sae)
    model, tokens = shared.model, tuple(found.tokens[: place + 1].tolist())
    depends = (model.weights_hash, str(model.device), model.dtype)
    (after,) = {unit.text for unit in units(found.pieces) if place in unit.places}
    with st.container(border=True):
        head, switch = st.columns([3, 1], vertical_alignment="center")
        head.markdown(f"**The model's next token** after {code(alone(after) or 'BOS')}")
        layers = switch.toggle(
            "Logit lens", key="lens", bind="query-params",
            help="what the stream says at each layer, through the final norm and the unembedding",
        )  # fmt: skip
        with said():
            predicted, pieces = expected(depends, tokens, layers, shared)
            clickable(expected_html(predicted, pieces, sae.ends.hooks), "expected")
            likeliest = int(list(predicted.values())[-1].ids[0])
            if st.toggle("Why this next token?", key="explain", bind="query-params"):
                why_next(sae, tokens, likeliest, pieces[likeliest])


def why_next(sae: Trained, tokens: tuple[int, ...], likeliest: int, named: str) -> None:
    """Which of these tokens make one likely to come next, or likelier than another."""
    model = model_of(sae).model
    left, right = st.columns(2)
    how = "one token; its leading space may be written ·"
    token = left.text_input("Next token", key="next", bind="query-params", placeholder=named, help=how)
    other = right.text_input("Rather than", key="instead", bind="query-params", placeholder="any other", help=how)
    with said():
        against = token_of(model, other) if other else None
        why(sae, Question(tokens, token=token_of(model, token) if token else likeliest, against=against))


def expected_html(found: dict[str, Predictions], pieces: dict[int, str], hooks: tuple[str, ...]) -> str:
    """A line of tokens with their probabilities for each layer; those of the SAE stand out."""
    rows = []
    for name, one in found.items():
        cells = [
            f"<code>{html.escape(pieces[token])}</code> <small>{probability:.1%}</small>"
            for token, probability in zip(one.ids.tolist(), one.probabilities.tolist(), strict=True)
        ]
        layer = name.removeprefix("blocks.").partition(".")[0]
        shown = [] if not name else ["embedding" if name.endswith("resid_pre") else f"layer {layer}"]
        rows.append(grid.Row([*shown, *cells], chosen=name in hooks))
    width = len(next(iter(found.values())).ids)
    columns = [*([grid.Column("", "stream after")] if "" not in found else [])]
    columns += [grid.Column("", f"{place + 1}.", text=True) for place in range(width)]
    return grid.grid_html(columns, rows, "next tokens")


def apart(sae: Trained, table: LatentTable) -> None:
    """Two texts side by side, and the latents that fire more on one than on the other."""
    texts = [st.session_state.get(key) or "" for key in ("text", "other")]
    if not all(text.strip() for text in texts):
        st.info("Type or paste two texts.")
        return
    density = DENSITIES[st.session_state.get("density") or "any"]
    both = [fires_on(sae, text, max_density=density, limit=None) for text in texts]
    found = differences(*both, limit=st.session_state.get("limit") or 25)
    given = st.query_params.get("focus", "")
    focus = next((one.latent for one in found if str(one.latent) == given), None)

    def picked(value: str) -> None:
        toggle("focus", value.partition(":")[2])

    strongest = max((max(one.peaks) for one in found if one.latent == focus), default=0.0)
    for column, features, key in zip(st.columns(2), both, ("tokens", "other tokens"), strict=True):
        with column:
            clickable(tokens_html(features, focus, pick=False, strongest=strongest), key)
    if not found:
        st.info("No latent fires here: widen the density.")
        return
    columns = [
        grid.Column("", "latent"), grid.Column("", "name", text=True), grid.Column("", "difference", "of the peaks, text less other text"),
        grid.Column("", "peak in text"), grid.Column("", "at", text=True), grid.Column("", "peak in other text"), grid.Column("", "at", text=True),
        grid.Column("", "density"),
    ]  # fmt: skip
    rows = []
    for one in found:
        cells = [
            grid.link(str(one.latent), f"latent:{one.latent}", link_to("features", latent=one.latent)),
            name_html(table.names[one.latent]), ("+" if one.more > 0 else "−") + number(abs(one.more)),
        ]  # fmt: skip
        for features, firing in zip(both, (one.first, one.second), strict=True):
            cells += ["–", ""] if firing is None else [number(firing.peak), peak_html(features, firing)]
        density_of = next(firing.density for firing in (one.first, one.second) if firing is not None)
        rows.append(grid.Row([*cells, f"{density_of:.2%}"], f"focus:{one.latent}", one.latent == focus))
    clickable(grid.grid_html(columns, rows, "latents that differ"), "differences", picked)
    st.caption("A row shows its latent on both texts; its number opens it.")


def peak_html(found: TextFeatures, firing: Firing) -> str:
    """The token at which a latent fires most, by what its character begins with."""
    at = int(firing.positions[firing.values.argmax()])
    peak = next((piece for piece in reversed(found.pieces[: at + 1]) if piece), "")
    return f"<code>{html.escape(alone(peak))}</code>"


@fragment
def results(sae: Trained, table: LatentTable) -> None:
    settings()
    if st.session_state.get("two"):
        with said():
            apart(sae, table)
        return
    text = st.session_state.get("text") or ""
    if not text.strip():
        st.info("Type or paste a text. Each of its tokens can then be picked to see its latents alone.")
        return
    given = {name: st.query_params.get(name, "") for name in ("at", "focus")}
    position, focus = (int(value) if value.isdecimal() and len(value) < 9 else None for value in given.values())

    def picked(value: str) -> None:
        kind, _, name = value.partition(":")
        toggle(kind, name)

    with said():
        try:
            found = search(sae, text, position)
        except ValueError:  # a position beyond the text is as if it were not there; anything else is said again
            position = None
            found = search(sae, text, position)
        if focus not in {firing.latent for firing in found.firings}:
            focus = None
        clickable(tokens_html(found, focus, position=position), "tokens", picked)
        if found.massive.any():
            st.caption("A dashed frame marks a massive activation, an attention sink: no latent is looked for there.")
        if position is not None:
            only = f"Only token {position}" if found.target is None else f"What follows token {position}"
            st.caption(f"{only}: pick it again for the whole text.")
        if found.target is not None and found.parts is not None:
            (target,) = table.index.pieces(np.array([found.target]))
            error = "the SAE's error" if table.index.ends.tied else "the transcoder's error"
            names = ("latents", error, "BOS and massive activations, which are left alone")
            parts = ", ".join(
                f"{name} {value:+.3f} ({share:.0%})"
                for name, value, share in zip(names, found.parts, found.parts.shares(), strict=True)
            )
            st.caption(f"Attributed to the logit of {code(alone(target))}: {plain(parts)}.")
        expectations(sae, found, position)
        if found.firings:
            clickable(firings_html(table, text, found, focus), "firings", picked)
            st.caption("A row shows its latent on the text; its number opens it.")
        else:
            st.info("No latent fires here: widen the density, or pick another token.")


st.title("Prompt")
sae = chosen_sae()
if sae is None or sae.share_indexed == 0:
    st.info("Ranking needs an index: make one, or choose an SAE that has one in the sidebar.")
    if sae is not None:
        missing(sae)
    st.stop()
with said():
    results(sae, table_of(sae))

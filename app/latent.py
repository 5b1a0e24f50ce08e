"""One latent: its figures, its evidence, its neighbours, and what one can try on it."""

import html
from typing import Any

import numpy as np
import streamlit as st
from shell import clickable, go, model_of, said, weights_of

from saebench.browse.runs import Trained
from saebench.browse.table import LatentTable, Query
from saebench.evaluate.attribution import ablation_effects
from saebench.index.examples import show, show_all
from saebench.index.notes import Note
from saebench.index.page import (
    activations_svg,
    effects_html,
    examples_html,
    figures_html,
    interval_title,
    logits_svg,
    ranked_html,
    rule_html,
    visible,
)
from saebench.index.reader import Latent, Ranked
from saebench.index.search import activations_on
from saebench.view import grid
from saebench.view.tokens import number, text_html

AROUND = {"±5": 5, "±16": 16, "full": None}
GROUPS = ("Strongest", "Intervals", "Random")


def show_latent(sae: Trained, table: LatentTable, number_: int, query: Query, title: Any) -> None:
    """The page of a latent; `title` is the place for its heading."""
    index = table.index
    latent = index[number_]
    note = table.notes[number_]
    with title:
        st.title(f"Latent {number_}" + (f": {note.label}" if note.label else ""))
    steps(table, number_, query)
    tops = (
        f"<div><h3>Logits up</h3>{ranked_html(index, latent.top_logits)}</div>"
        f"<div><h3>Logits down</h3>{ranked_html(index, latent.bottom_logits)}</div>"
        if len(latent.top_logits.ids)
        else ""
    )
    clickable(
        f"""{rule_html(latent.rule)}{figures_html(latent)}
<div class="columns"><div><h3>Firings by strength</h3>{activations_svg(latent, index.bin_edges)}
<h3>Direct effects on logits</h3>{logits_svg(latent)}</div>
<div><h3>Fires on</h3>{ranked_html(index, latent.tokens)}</div>{tops}</div>""",
        "figures",
    )
    left, right = st.columns([5, 2], gap="large")
    with left, said():
        examples(sae, table, latent)
        own_text(sae, table, latent)
        ablation(sae, table, latent)
    with right:
        neighbours(table, latent)
        note_form(table, number_, note)
        st.subheader("Copy as Python")
        st.code(sae.python(number_), language="python")


def steps(table: LatentTable, latent: int, query: Query) -> None:
    before, after = table.beside(query, latent)

    def open_latent(number_: int | None) -> None:
        st.session_state.latent = number_

    columns = st.columns([1, 1, 1, 1, 1, 3])
    chance = int(np.random.default_rng().integers(table.index.d_sae))
    for column, label, to, key, off in (
        (columns[0], "All latents", None, "A", False),
        (columns[1], "Previous", before, "K", before is None),
        (columns[2], "Next", after, "J", after is None),
        (columns[3], "Random", chance, "X", False),
    ):
        column.button(label, on_click=open_latent, args=(to,), shortcut=key, disabled=off, width="stretch")
    if columns[4].button("Steer with it", width="stretch", type="primary"):
        go("steering", turns=f"{latent}:add:0.5n")


@st.fragment
def examples(sae: Trained, table: LatentTable, latent: Latent) -> None:
    left, right = st.columns([2, 1])
    group = left.segmented_control("Examples", GROUPS, default=GROUPS[0], key="group", bind="query-params")
    around = right.segmented_control("Context", list(AROUND), default="±16", key="around", bind="query-params")
    index, weights, width = table.index, weights_of(sae), AROUND[around or "±16"]
    if not index.has_store:
        return
    maximum = latent.figures["max"]
    if group == "Intervals":
        asked = [(latent.latent, one) for interval in latent.intervals for one in interval.examples]
        shown = iter(show_all(index, weights, asked, width))
        groups = [[next(shown) for _ in interval.examples] for interval in latent.intervals]
        body = "".join(
            f"<h3>{interval_title(interval, latent.figures['fires'])}</h3>{examples_html(index, some, maximum)}"
            for interval, some in zip(reversed(latent.intervals), reversed(groups), strict=True)
        )
        said_of_them = "Five random firings of each of ten intervals of log strength, with each interval's share."
    else:
        random = group == "Random"
        some = show(index, weights, latent.latent, latent.random if random else latent.top, width)
        body = examples_html(index, some, maximum)
        said_of_them = (
            "Firings at random, all equally likely." if random else "The strongest firings, one of a context."
        )
    if latent.figures["fires"] == 0:
        st.info("It never fires on the rows that were indexed.")
        return
    st.caption(f"{said_of_them} Values show on hover and on focus.")
    clickable(body, "examples")


def neighbours(table: LatentTable, latent: Latent) -> None:
    def picked(value: str) -> None:
        st.session_state.latent = int(value.partition(":")[2])

    parts = []
    for heading, ranked, meaning in (
        ("Nearest decoder rows", latent.neighbours, "cosine"),
        ("Fire together, by PMI", latent.pmi, "PMI"),
        ("Fire together, by Jaccard", latent.jaccard, "Jaccard index"),
    ):
        parts.append(f'<h3 title="{meaning}">{heading}</h3>{links(table, ranked)}')
    clickable(f'<div class="sb-side">{"".join(parts)}</div>', "neighbours", picked)


def links(table: LatentTable, ranked: Ranked, size: int = 8) -> str:
    if not len(ranked.ids):
        return "<small>none</small>"
    rows = []
    for other, value in zip(ranked.ids[:size].tolist(), ranked.values[:size].tolist(), strict=True):
        name = table.notes[other].label or visible(table.index.explanations[other])
        cells = [grid.link(str(other), f"latent:{other}", {"latent": other}), html.escape(name), number(value)]
        rows.append(grid.Row(cells, f"latent:{other}"))
    columns = [grid.Column("", "latent"), grid.Column("", "label or rule", text=True), grid.Column("", "")]
    return grid.grid_html(columns, rows, "latents")


def note_form(table: LatentTable, latent: int, note: Note) -> None:
    st.subheader("Your note")
    state = st.session_state
    if state.get("noted") != (table.notes.path, latent):
        state.noted, state.seen = (table.notes.path, latent), note  # what the writer saw when the page was opened
    seen: Note = state.seen
    with st.form(f"note {latent} {seen}", border=False):
        label = st.text_input("Label", seen.label)
        tags = st.text_input("Tags", ", ".join(seen.tags), placeholder="separated by commas")
        text = st.text_area("Note", seen.text, height=90)
        if st.form_submit_button("Save"):
            kept = tuple(part.strip() for part in tags.split(",") if part.strip())
            written = Note(label.strip(), kept, text.strip())
            with said():
                table.notes.write(latent, written, seen=seen)
                state.seen = written
                st.rerun()


@st.fragment
def own_text(sae: Trained, table: LatentTable, latent: Latent) -> None:
    st.subheader("Try your own text")
    with st.form("own text", border=False):
        text = st.text_area("Lines, each by itself", key="try", bind="query-params", height=100)
        st.form_submit_button("See where it fires")
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return
    with said():
        shared = model_of(sae)
        peaks, body = [], []
        with shared.lock:
            found = [activations_on(shared.model, weights_of(sae), sae.hook, line, latent.latent) for line in lines]
        for tokens, values in found:
            peak = int(values.argmax())
            peaks.append(float(values[peak]))
            pieces = table.index.pieces(tokens)
            body.append(
                f'<div class="example">{text_html(pieces, values.tolist(), latent.figures["max"], peak=peak if values[peak] > 0 else None)}</div>'
            )
        fired = [peak for peak in peaks if peak > 0]
        histogram = activations_svg(latent, table.index.bin_edges, fired)
        clickable(
            f"{''.join(body)}{histogram}<small>{len(fired)} of {len(lines)} lines; the peak of each is marked</small>",
            "own",
        )


@st.fragment
def ablation(sae: Trained, table: LatentTable, latent: Latent) -> None:
    st.subheader("Ablation")
    if not latent.top or not table.index.has_store:
        return
    st.caption("What the model loses on the strongest example when the latent is set to 0 there, all else kept.")
    if not st.button("Measure"):
        return
    with said():
        shared = model_of(sae)
        context = table.index.context_of(latent.top[0].row)
        with shared.lock:
            logits, loss = ablation_effects(shared.model, weights_of(sae), sae.hook, context.tokens, latent.latent)
        clickable(effects_html(table.index, context, logits.numpy(), loss.numpy()), "ablation")

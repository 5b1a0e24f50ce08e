"""One latent: its figures, its evidence, its neighbours, and your note."""

import contextlib
import html
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st
from lists import latent_lists
from opened import Files, files_of, table_of, weights_of
from shell import clickable, fragment, said
from trials import ablation, own_text
from turns import usual_strength
from where import go, link_to
from why import place_asked, why, why_link, with_answer

from saebench.browse.runs import Trained
from saebench.browse.table import LatentTable, Query
from saebench.browse.why import Question
from saebench.index.connections import Connection, Connections, connected, connections
from saebench.index.examples import Shown, show, show_all
from saebench.index.notes import Note
from saebench.index.page import (
    activations_svg,
    candidates_html,
    examples_html,
    figures_html,
    hooks_html,
    interval_title,
    logits_svg,
    name_html,
    named_html,
    needs_html,
    ranked_html,
    short_hook,
)
from saebench.index.reader import FeatureIndex, Latent, Ranked
from saebench.sae.io import WEIGHTS
from saebench.view import grid
from saebench.view.markdown import plain
from saebench.view.tokens import number

AROUND = {"±5": 5, "±16": 16, "full": None}
GROUPS = ("Strongest", "Intervals", "Random")


def show_latent(sae: Trained, table: LatentTable, number_: int, query: Query, title: Any) -> None:
    """The page of a latent; `title` is the place for its heading."""
    index = table.index
    latent, called = index[number_], table.names[number_]
    note, needs = table.notes[number_], table.needs.get(number_)
    with title:
        st.title(f"Latent {number_}" + (f": {plain(note.label)}" if note.label else ""))
    steps(table, number_, query)
    name = "estimate" if table.estimated[number_] else "output"
    scores = {name: float(table.columns["output"][number_])} if "output" in table.columns else {}
    tops = (
        f"<div><h3>Logits up</h3>{ranked_html(index, latent.top_logits)}</div>"
        f"<div><h3>Logits down</h3>{ranked_html(index, latent.bottom_logits)}</div>"
        if len(latent.top_logits.ids)
        else ""
    )
    clickable(
        f"""{named_html(called)}{candidates_html(latent, called, needs)}{needs_html(needs)}{figures_html(latent, scores)}
<div class="columns"><div><h3>Firings by strength</h3>{activations_svg(latent, index.bin_edges)}
<h3>Direct effects on logits</h3>{logits_svg(latent)}{hooks_html(index, latent)}</div>
<div><h3>Fires on</h3>{ranked_html(index, latent.tokens)}</div>{tops}</div>""",
        "figures",
    )
    left, right = st.columns([5, 2], gap="large")
    with left, said():
        # Closed, above the examples: below them they would be pages away.
        with st.expander("Try your own text", expanded=bool(st.query_params.get("try"))):
            own_text(sae, table, latent)
        if latent.top and table.index.has_store:
            with st.expander("What its ablation changes"):
                ablation(sae, table, latent)
        examples(sae, table, latent)
    with right:
        neighbours(table, latent)
        connected_latents(sae, number_)
        note_form(table, number_, note)
        with said():
            latent_lists(table, number_)
        st.subheader("Copy as Python")
        st.code(sae.python(number_), language="python")


def steps(table: LatentTable, latent: int, query: Query) -> None:
    before, after = table.beside(query, latent)

    def open_latent(number_: int | None) -> None:
        st.session_state.latent = number_

    chance = int(np.random.default_rng().integers(table.index.d_sae))
    with st.container(horizontal=True):
        for label, to, key, off in (
            ("All latents", None, "A", False),
            ("Previous", before, "K", before is None),
            ("Next", after, "J", after is None),
            ("Random", chance, "X", False),
        ):
            st.button(label, on_click=open_latent, args=(to,), shortcut=key, disabled=off)
        if st.button("Steer with it", type="primary"):
            go("steering", turns=f"{latent}:add:{usual_strength(table.index)}")


@fragment
def examples(sae: Trained, table: LatentTable, latent: Latent) -> None:
    left, right = st.columns([2, 1])
    group = left.segmented_control("Examples", GROUPS, default=GROUPS[0], key="group", bind="query-params")
    around = right.segmented_control("Context", list(AROUND), default="±16", key="around", bind="query-params")
    index, weights, width = table.index, weights_of(sae), AROUND[around or "±16"]
    if not index.has_store:
        return
    if group == "Intervals":
        asked = [(latent.latent, one) for interval in latent.intervals for one in interval.examples]
        shown = iter(show_all(index, weights, asked, width))
        groups = [[next(shown) for _ in interval.examples] for interval in latent.intervals]
        parts = []
        for interval, some in zip(reversed(latent.intervals), reversed(groups), strict=True):
            parts.append(((), f"<h3>{interval_title(interval, latent.figures['fires'])}</h3>"))
            parts += example_parts(index, latent, some)
        said_of_them = "Five random firings of each of ten intervals of log strength, with each interval's share."
    else:
        random = group == "Random"
        some = show(index, weights, latent.latent, latent.random if random else latent.top, width)
        parts = example_parts(index, latent, some)
        said_of_them = (
            "Firings at random, all equally likely." if random else "The strongest firings, one of a context."
        )
    if latent.figures["fires"] == 0:
        st.info("It never fires on the rows that were indexed.")
        return
    st.caption(f"{said_of_them} Values show on hover and on focus.")
    place = place_asked(latent.latent, 1)
    place = place if place is not None and place[0] < sum(shard.n_rows for shard in index.store.shards) else None

    def answer() -> None:
        assert place is not None
        context = index.context_of(*place)
        why(sae, Question(tuple(context.tokens[: context.peak + 1].tolist()), latent=latent.latent))

    with_answer(parts, place, "examples", answer)


def example_parts(index: FeatureIndex, latent: Latent, some: list[Shown]) -> list[tuple[tuple[int, ...], str]]:
    """Examples as HTML, each with the row at which one may ask why."""
    rows = [context.rows[context.peak] for context, _ in some]
    return [
        (
            (row,),
            examples_html(index, [one], latent.figures["max"], lambda _, row=row: f" · {why_link(latent.latent, row)}"),
        )
        for row, one in zip(rows, some, strict=True)
    ]


def neighbours(table: LatentTable, latent: Latent) -> None:
    parts = []
    for heading, ranked, meaning in (
        ("Nearest decoder rows", latent.neighbours, "cosine"),
        ("Fire together, by PMI", latent.pmi, "PMI"),
        ("Fire together, by Jaccard", latent.jaccard, "Jaccard index"),
    ):
        parts.append(f'<h3 title="{meaning}">{heading}</h3>{links(table, ranked)}')
    clickable(f'<div class="sb-side">{"".join(parts)}</div>', "neighbours")


@st.cache_data(show_spinner="Following weights", max_entries=256)
def connections_of(folder: str, latent: int, files: Files) -> Connections:
    return connections(Path(folder), latent)


def connected_latents(sae: Trained, latent: int) -> None:
    """Of dictionaries that lie before and behind: those that feed it, and those that it feeds."""
    others = connected(sae.folder)
    if not others:
        return
    files = files_of(*(sae.folder.parent / name / WEIGHTS for name in [sae.name, *others]))
    parts = []
    with said():
        found = connections_of(str(sae.folder), latent, files)
        for heading, some, side in (("Fed by", found.fed_by, 1), ("Feeds", found.feeds, 0)):
            meaning = "decoder row · encoder column; norms and layers between are ignored"
            hooks = {name: " + ".join(map(short_hook, ends[side])) for name, ends in others.items()}
            parts.append(f'<h3 title="{meaning}">{heading}</h3>{connections_html(sae, some, hooks)}')
    clickable(f'<div class="sb-side">{"".join(parts)}</div>', "connections")


def connections_html(sae: Trained, found: list[Connection], hooks: dict[str, str]) -> str:
    """A table; `hooks` are those by which each other dictionary is connected."""
    if not found:
        return "<small>none</small>"
    rows = []
    for other, latent, weight in found:
        there, name = Trained(sae.run, sae.folder.parent / other), ""
        if there.share_indexed > 0:
            with contextlib.suppress(ValueError):  # what is wrong with its index is said on its own page
                name = name_html(table_of(there).names[latent])
        pick = f"connected:{other}:{latent}"
        link = grid.link(str(latent), pick, link_to("features", sae=other, latent=latent))
        where = f'<small title="{html.escape(other, quote=True)}">{html.escape(hooks[other])}</small>'
        rows.append(grid.Row([link, f"{name}{where}", number(weight)], pick))
    columns = [grid.Column("", "latent"), grid.Column("", "name", text=True), grid.Column("", "")]
    return grid.grid_html(columns, rows, "connected latents")


def links(table: LatentTable, ranked: Ranked, size: int = 8) -> str:
    if not len(ranked.ids):
        return "<small>none</small>"
    rows = []
    for other, value in zip(ranked.ids[:size].tolist(), ranked.values[:size].tolist(), strict=True):
        cells = [
            grid.link(str(other), f"latent:{other}", link_to("features", latent=other)),
            name_html(table.names[other]),
            number(value),
        ]
        rows.append(grid.Row(cells, f"latent:{other}"))
    columns = [grid.Column("", "latent"), grid.Column("", "name", text=True), grid.Column("", "")]
    return grid.grid_html(columns, rows, "latents")


def discard(place: tuple[str, int], fields: dict[str, str]) -> None:
    """Forget what was not saved: the form shows what is on disk."""
    st.session_state.opened_notes.pop(place, None)
    st.session_state.update(fields)


def note_form(table: LatentTable, latent: int, note: Note) -> None:
    """The note, to be edited. What is not saved yet stays while one looks at other latents."""
    st.subheader("Your note")
    state, place = st.session_state, (str(table.notes.path), latent)
    # By latent: the note as the writer saw it when it was opened, against which a change by someone else is
    # noticed, and whether there is more than that in the form.
    notes: dict[Any, tuple[Note, bool]] = state.setdefault("opened_notes", {})
    seen, unsaved = notes.get(place, (note, False))
    if state.get("noted") != place and not unsaved:
        seen = note
    state.noted = place
    key = f"{place} {seen}"
    kept: dict[str, Any] = {"persist_state": "session"}
    label = st.text_input("Label", seen.label, key=f"label {key}", **kept)
    tags = st.text_input("Tags", ", ".join(seen.tags), key=f"tags {key}", placeholder="separated by commas", **kept)
    text = st.text_area("Note", seen.text, key=f"note {key}", height=90, **kept)
    parts = (part.strip() for part in tags.split(","))
    draft = Note(label.strip(), tuple(dict.fromkeys(part for part in parts if part)), text.strip())
    notes[place] = seen, draft != seen
    with st.container(horizontal=True, vertical_alignment="center"):
        save = st.button("Save")  # never disabled: a click that ends the typing would be lost
        if draft != seen:
            fields = {f"label {key}": seen.label, f"tags {key}": ", ".join(seen.tags), f"note {key}": seen.text}
            st.button("Discard", on_click=discard, args=(place, fields))
            st.caption("not saved yet")
    if save:
        with said():
            table.notes.write(latent, draft, seen=seen)
            notes[place] = draft, False
            st.rerun()

"""Two SAEs of one hook: what both have, what one has split, and what one has alone."""

import html
from typing import NamedTuple

import numpy as np
import streamlit as st
from opened import Files, files_of, table_of, weights_of
from shell import clickable, offer, said
from where import chosen_run, chosen_sae, keep_in_address, link_to, runs

from saebench.bench.stability import figures_of, in_words, recorded
from saebench.browse.runs import Trained, saes_of
from saebench.browse.table import LatentTable
from saebench.index.compare import KINDS, Side, compare, one_to_one
from saebench.index.examples import show
from saebench.index.page import examples_html, name_html
from saebench.view import charts, grid
from saebench.view.markdown import plain

MEANINGS = {
    "matched": "each other's nearest, at a cosine of 0.7 or more, and neither is split",
    "split": "nearest to two or more latents of the other, at 0.5 or more",
    "related": "near a latent of the other, but no pair",
    "alone": "no latent of the other at a cosine of 0.5 or more: new here, missing there",
    "dead": "never fires",
}
SHOWN = 100
AT_ONCE = 2**22  # cosines that latents are matched by within a second
# Which latents are listed: of which SAE (0: the chosen one), and of which kind.
VIEWS = {
    "Matched": (0, "matched"),
    "Split": (0, "split"),
    "Related": (0, "related"),
    "New": (0, "alone"),
    "Missing": (1, "alone"),
}


Belonging = tuple[tuple[str, str], ...]


class Pair(NamedTuple):
    here: Trained
    other: Trained
    table: LatentTable
    other_table: LatentTable


@st.cache_data(show_spinner="Comparing", max_entries=8)
def compared(_pair: Pair, of: tuple[Belonging, Belonging]) -> tuple[Side, Side]:
    return compare(_pair.table.index, weights_of(_pair.here), _pair.other_table.index, weights_of(_pair.other))


def label(sae: Trained) -> str:
    """Its name, with that of its run where that is not the chosen one."""
    return sae.name if sae.run == chosen_run() else f"{sae.run.name}/{sae.name}"


def choose(found: dict[str, Trained]) -> Pair | None:
    """The chosen SAE and another of its hook, of the same run or of another under the same root."""
    here = chosen_sae()
    elsewhere = [sae for run in runs().values() if run != chosen_run() for sae in saes_of(run)[0].values()]
    indexed = {label(sae): sae for sae in (*found.values(), *elsewhere) if sae.share_indexed == 1}
    others = [name for name, sae in indexed.items() if here and name != here.name and sae.ends == here.ends]
    if here is None or here.name not in indexed or not others:
        st.info("Two indexed SAEs of one hook are needed, the first of them chosen in the sidebar.")
        for sae in found.values():
            if here and sae.ends == here.ends and sae.share_indexed < 1:
                offer(f"Index {sae.name}", sae.index_command, sae.run)
        return None
    keep_in_address("other", others, others[0])
    name = (
        st.selectbox(f"{plain(here.name)} against", others, index=None, key="other", bind="query-params") or others[0]
    )
    if apart := [f"{name} ({sae.ends})" for name, sae in indexed.items() if sae.ends != here.ends]:
        st.caption(plain(f"Of another hook than {here.ends}, and so not compared: {', '.join(apart)}."))
    return Pair(here, indexed[name], table_of(here), table_of(indexed[name]))


def counts(pair: Pair, sides: tuple[Side, Side]) -> None:
    columns = [
        grid.Column("", "kind", text=True),
        *(grid.Column("", label(sae)) for sae in (pair.here, pair.other)),
        grid.Column("", "", text=True),
    ]
    rows = [
        grid.Row([kind, *(f"{int((side.kinds == KINDS.index(kind)).sum()):,}" for side in sides), f'<span style="white-space:normal">{MEANINGS[kind]}</span>'])
        for kind in KINDS
    ]  # fmt: skip
    clickable(grid.grid_html(columns, rows, "kinds of latents"), "kinds")


@st.cache_data(show_spinner="Matching one to one", max_entries=8)
def stable(_pair: Pair, of: tuple[Belonging, Belonging], benched: tuple[Files, ...]) -> str:
    """How many latents of the one the other has, one to one, in a line: as a bench found it, or from the weights where that is quick."""
    here, other = _pair.here, _pair.other
    for run in (here.run, other.run):
        if found := recorded(run, here.folder, other.folder):
            return in_words(found)
    alive = [~table.index.flagged("dead") for table in (_pair.table, _pair.other_table)]
    if min(alive[0].sum(), alive[1].sum()) == 0 or alive[0].sum() * alive[1].sum() > AT_ONCE:
        command = f"saebench bench stability --run {here.run} --sae {here.folder},{other.folder}"
        return f"How many come back one to one (PW-MCC) is found by `{command}`."
    rows = [weights_of(sae).W_dec for sae in (here, other)]
    return in_words(figures_of(one_to_one(rows[0], rows[1], alive[0], alive[1]), None, here.name, other.name))


def forget_pair() -> None:
    """A chosen pair belongs to the view before."""
    st.query_params.pop("pair", None)


def pairs(pair: Pair, side: Side, kind: str) -> None:
    """Latents of `pair.here` of a kind, each with its nearest, and examples of one pair."""
    latents = np.flatnonzero(side.kinds == KINDS.index(kind))
    latents = latents[np.argsort(side.cosines[latents] * (1 if kind == "alone" else -1), kind="stable")]
    if not len(latents):
        st.info(plain(f"No latent of {label(pair.here)} is {kind}."))
        return

    def picked(value: str) -> None:
        st.query_params["pair"] = value.partition(":")[2]

    given = st.query_params.get("pair", "")
    chosen = int(given) if given.isdecimal() and len(given) < 10 and int(given) in latents else int(latents[0])
    columns = [
        grid.Column("", label(pair.here)), grid.Column("", "name", text=True), grid.Column("", "cosine"),
        grid.Column("", label(pair.other)), grid.Column("", "name", text=True), grid.Column("", "fires with, Jaccard", f"the latent of {label(pair.other)} that fires on the same tokens most, be it the nearest or not, and the Jaccard index of the two"),
    ]  # fmt: skip

    def link(which: str, latent: int) -> str:
        sae = pair.here if which == "here" else pair.other
        return grid.link(
            str(latent), f"{which}:{latent}", link_to("features", run=sae.run.name, sae=sae.name, latent=latent)
        )

    rows = []
    for latent in latents[:SHOWN].tolist():
        nearest, partner = int(side.nearest[latent]), int(side.partners[latent])
        rows.append(
            grid.Row([
                link("here", latent), name_html(pair.table.names[latent]), f"{side.cosines[latent]:.2f}",
                link("other", nearest), name_html(pair.other_table.names[nearest]),
                "none" if partner < 0 else f"{link('other', partner)}, {side.jaccard[latent]:.2f}",
            ], f"pair:{latent}", latent == chosen)
        )  # fmt: skip
    st.caption(
        f"{len(latents):,} latents, the first {min(SHOWN, len(latents))} of them. A row shows examples of both below."
    )
    clickable(grid.grid_html(columns, rows, "pairs", height="21rem"), "pairs", picked)
    beside(pair, chosen, int(side.nearest[chosen]))


def beside(pair: Pair, latent: int, nearest: int) -> None:
    for column, sae, table, one in zip(
        st.columns(2), (pair.here, pair.other), (pair.table, pair.other_table), (latent, nearest), strict=True
    ):
        with column, said():
            found = table.index[one]
            body = examples_html(
                table.index, show(table.index, weights_of(sae), one, found.top[:8], 12), found.figures["max"]
            )
            clickable(
                f"<h3>{html.escape(f'{label(sae)}, latent {one}: {table.names[one].text}')}</h3>{body}",
                f"side {label(sae)}",
            )


st.title("Compare")
run = chosen_run()
found = saes_of(run)[0] if run else {}
with said():
    if pair := choose(found):
        both = (pair.table.index, pair.other_table.index)
        here, other = ((*index.belonging.items(), ("hook", str(index.ends))) for index in both)
        sides = compared(pair, (here, other))
        left, right = st.container(key="halves").columns(2, gap="large")
        with left:
            counts(pair, sides)
            benched = tuple(files_of(sae.run / "bench" / "stability.json") for sae in (pair.here, pair.other))
            st.caption(stable(pair, (here, other), benched))
            view = st.segmented_control(
                "Show", list(VIEWS), default="Matched", key="kind", bind="query-params",
                on_change=forget_pair,
            )  # fmt: skip
        with right:
            density = pair.table.columns["density"], pair.other_table.columns["density"][sides[0].nearest]
            figure = charts.densities(*density, sides[0].cosines, (label(pair.here), label(pair.other)))
            st.plotly_chart(figure, key="densities", config={"displaylogo": False})
        which, kind = VIEWS[view or "Matched"]
        pairs(pair if which == 0 else Pair(pair.other, pair.here, pair.other_table, pair.table), sides[which], kind)

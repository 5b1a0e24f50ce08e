"""Lists of latents: those that one is in, and all of them, to be had as files."""

import json
from typing import Any

import streamlit as st
from shell import said

from saebench.browse.table import LatentTable
from saebench.index.lists import Lists, lists_of
from saebench.view.markdown import code, plain


def latent_lists(table: LatentTable, latent: int) -> None:
    """The lists that a latent is in; a name that is typed is a new one."""
    lists = lists_of(table.index)
    mine = lists.holding(latent)
    key = f"lists {lists.path} {latent} {mine}"  # what another has changed is another widget

    def put() -> None:
        _try(lambda: lists.put(latent, st.session_state[key]))

    st.subheader("Lists")
    st.multiselect(
        "Lists", list(lists.all()), mine, key=key, on_change=put, accept_new_options=True,
        placeholder="choose one, or type a new name", label_visibility="collapsed",
    )  # fmt: skip
    _told()


def all_lists(table: LatentTable) -> None:
    """Every list with its file, and a place for one from elsewhere."""
    lists = lists_of(table.index)
    for name, latents in lists.all().items():
        with st.container(horizontal=True, vertical_alignment="center"):
            st.markdown(f"{plain(name)}: {len(latents):,} latent{'s' * (len(latents) != 1)}", width="stretch")
            st.download_button(
                "Download", lists.export(name), f"{name}.json", key=f"download {name}", on_click="ignore"
            )
            st.button("Delete", key=f"delete {name}", on_click=_try, args=(lambda name=name: lists.delete(name),))
    if not lists.all():
        st.caption("None yet: a latent is put into one on its page.")
    given = st.file_uploader("Add a list from a file", "json", key="list file")
    if given is not None and st.button("Add it"):
        with said():
            names = _taken_in(lists, given.getvalue())
            st.caption(f"added to {', '.join(map(code, names))}")
    _told()


def _taken_in(lists: Lists, content: bytes) -> list[str]:
    try:
        read: Any = json.loads(content)
    except ValueError as error:
        raise ValueError(f"the file is no JSON ({error}); expected what Download gives") from error
    return lists.add(read)


def _try(change: Any) -> None:
    """A change from a callback, which cannot say what is wrong in place: `_told` does."""
    try:
        change()
    except (ValueError, OSError) as error:
        st.session_state["lists error"] = str(error)


def _told() -> None:
    if error := st.session_state.pop("lists error", None):
        st.error(plain(error))

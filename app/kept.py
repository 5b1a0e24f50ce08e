"""Recipes of the steering bench: settings that are saved with a run, and opened again."""

import dataclasses

import streamlit as st
from opened import bench_of
from shell import said
from turns import set_turns

from saebench.browse.recipes import Recipe, load_recipe, recipes_of, save_recipe
from saebench.browse.runs import Trained
from saebench.steer.turns import belonging_of
from saebench.view.markdown import code, plain


def recipes(sae: Trained, recipe: Recipe, longest: int) -> None:
    """Save these settings, or open others, of at most `longest` new tokens and of what belongs together here (`belonging_of`)."""
    with said():
        name = st.text_input("Save these settings as", key="recipe name").strip()
        if name in recipes_of(sae.run, sae.name):
            st.caption("This replaces the one of that name.")
        with said():
            if st.button("Save", disabled=not name):
                of = belonging_of(bench_of(sae)[0], recipe.turns)
                st.caption(f"saved as {code(str(save_recipe(sae.run, name, sae.name, recipe, of)))}")
        for known in recipes_of(sae.run, sae.name):
            key, icon = f"recipe {known}", ":material/folder_open:"
            st.button(plain(known), key=key, icon=icon, on_click=open_recipe, args=(sae, known, longest))
        if error := st.session_state.pop("recipe error", None):
            st.error(plain(error))
        if word := st.session_state.pop("recipe word", None):
            st.caption(plain(word))


def open_recipe(sae: Trained, name: str, longest: int) -> None:
    """Set the widgets of the bench to a recipe, or leave word of what is wrong with it."""
    try:
        recipe, says = load_recipe(sae.run, name, lambda turns: belonging_of(bench_of(sae)[0], turns))
        if not 1 <= recipe.max_new_tokens <= longest:
            raise ValueError(f"recipe {name!r} has {recipe.max_new_tokens} new tokens; this model takes 1 to {longest}")
    except ValueError as error:
        st.session_state["recipe error"] = str(error)
        return
    if not says:
        st.session_state["recipe word"] = (
            f"{name!r} does not say of which SAE and index it is: it was saved before that was noted. "
            "If they are still those it was made with, save it again."
        )
    for field in dataclasses.fields(Recipe):
        if field.name != "turns":
            st.session_state[field.name] = getattr(recipe, field.name)
    set_turns(recipe.turns)

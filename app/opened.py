"""Things that are opened once for all who look: models, SAEs, indices, jobs."""

import threading
from pathlib import Path
from typing import Any, NamedTuple

import streamlit as st
from where import root

from saebench.browse.jobs import Jobs
from saebench.browse.runs import Trained
from saebench.browse.table import LatentTable
from saebench.index import FeatureIndex, open_feature_index
from saebench.index.notes import Notes
from saebench.index.search import TextFeatures, features_for_text
from saebench.models import LanguageModel, load_model
from saebench.sae import SAE, load_sae
from saebench.sae.io import WEIGHTS
from saebench.steer import Bench
from saebench.steer.scores import read_scores, scores_path


class Shared(NamedTuple):
    """A model, and the lock under which its passes run."""

    model: LanguageModel
    lock: Any


def jobs() -> Jobs:
    return Jobs(root())


@st.cache_resource(show_spinner="Loading the model", max_entries=2)
def _model(name: str) -> Shared:
    return Shared(load_model(name), threading.Lock())


@st.cache_resource(show_spinner=False, max_entries=8)
def _sae(folder: str, written: int) -> SAE:
    return load_sae(folder)


@st.cache_resource(show_spinner="Opening the index", max_entries=8)
def _index(path: str, sae: str, written: int, store_there: bool) -> FeatureIndex:
    return open_feature_index(path, sae=sae, need_store=False)


@st.cache_resource(show_spinner=False, max_entries=8)
def _table(path: str, sae: str, written: int, store_there: bool, scored: int) -> LatentTable:
    index = _index(path, sae, written, store_there)
    notes = Notes(index.path.with_suffix(".notes.json"), index.identity["sae"], index.d_sae)
    return LatentTable(index, notes, read_scores(index))


def changed(path: Path) -> int:
    """When a file was last written; 0 where there is none."""
    return path.stat().st_mtime_ns if path.exists() else 0


def table_of(sae: Trained) -> LatentTable:
    """Raises ValueError where there is no index, or one of another SAE or store."""
    store_there = sae.store is not None and (sae.store / "manifest.json").exists()
    scores = changed(scores_path(sae.index_path))
    return _table(str(sae.index_path), str(sae.folder), changed(sae.index_path), store_there, scores)


def weights_of(sae: Trained) -> SAE:
    return _sae(str(sae.folder), changed(sae.folder / WEIGHTS))


@st.cache_data(show_spinner=False, max_entries=64)
def _fires(
    depends: tuple[str | int, ...], text: str, settings: dict[str, Any], _sae: Trained, _table: LatentTable
) -> TextFeatures:
    shared = model_of(_sae)
    with shared.lock:
        return features_for_text(shared.model, weights_of(_sae), _table.index, text, **settings)


def fires_on(sae: Trained, table: LatentTable, text: str, **settings: Any) -> TextFeatures:
    """`features_for_text`, kept for as long as weights, model, index, text and settings are the same; raises ValueError as that."""
    model, index = model_of(sae).model, table.index
    depends = (
        str(sae.folder), changed(sae.folder / WEIGHTS), model.weights_hash, str(model.device), model.dtype,
        str(index.path), changed(index.path), *index.belonging.values(),
    )  # fmt: skip
    return _fires(depends, text, settings, sae, table)


def model_of(sae: Trained) -> Shared:
    """Raises ValueError where the model cannot be loaded."""
    if sae.model is None:
        raise ValueError(f"{sae.folder} does not say of which model it is (metadata.model_name in cfg.json)")
    return _model(sae.model)


def bench_of(sae: Trained, index: FeatureIndex | None) -> tuple[Bench, Any]:
    """(what steering needs, the model's lock). Raises ValueError where the model is not the one that was indexed."""
    shared = model_of(sae)
    if index is not None and shared.model.hash_like(index.identity["model"]) != index.identity["model"]:
        raise ValueError(f"model {sae.model!r} has changed since {index.path} was made from it; index again")
    return Bench(shared.model, weights_of(sae).to(shared.model.device), sae.hook, index), shared.lock

"""What is open: an SAE with its index, notes and model, opened once for all who look, until one of its files is another."""

import os
import threading
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import streamlit as st
import torch
from where import root

from saebench.browse.jobs import Jobs
from saebench.browse.runs import Trained
from saebench.browse.serve import EMBEDDER
from saebench.browse.table import LatentTable
from saebench.index import open_feature_index
from saebench.index.explanations import explanations_path, read_explanations
from saebench.index.needs import needs_path, read_needs
from saebench.index.notes import Notes
from saebench.index.search import TextFeatures, features_for_text
from saebench.models import LanguageModel, load_model, model_path
from saebench.sae import SAE
from saebench.sae.io import CONFIG, WEIGHTS
from saebench.steer import Bench, bench_with
from saebench.steer.scores import read_scores, scores_path
from saebench.store.schema import MANIFEST

SMALL = 30_000_000
"""Parameters of a model below which one thread is as fast as all (decision 18)."""
THREADS = torch.get_num_threads()
Files = tuple[tuple[str, int, int, int, int], ...]


class Turn:
    """A lock under which a model's passes run, one at a time; whoever holds it computes with so many threads."""

    def __init__(self, threads: int) -> None:
        self.threads, self._lock, self._before = threads, threading.Lock(), 1

    def __enter__(self) -> None:
        self._lock.acquire()
        self._before = torch.get_num_threads()
        torch.set_num_threads(self.threads)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._before)
        self._lock.release()


class Shared(NamedTuple):
    """A model, and the lock under which its passes run."""

    model: LanguageModel
    lock: Turn


class Opened:
    """An SAE and all that belongs to it. What does not is refused when it is asked for, with a ValueError."""

    def __init__(self, sae: Trained) -> None:
        there = Trained(sae.run, sae.folder).share_indexed > 0
        self.index = open_feature_index(sae.index_path, sae=sae.folder, need_store=False) if there else None
        self.bench = bench_with(
            sae.folder, self.index, load=_load, open=lambda folder: opened(Trained(sae.run, folder)).bench
        )

    @cached_property
    def table(self) -> LatentTable:
        if self.index is None:
            raise ValueError(
                f"{self.bench.folder} has no index; make it with `saebench index --sae {self.bench.folder}`"
            )
        notes = Notes(self.index.path.with_suffix(".notes.json"), self.index.identity["sae"], self.index.d_sae)
        try:
            judged, problem = read_explanations(self.index), ""
        except ValueError as error:  # names are what they are without a judge
            judged, problem = {}, str(error)
        try:
            needs = read_needs(self.index)
        except ValueError as error:  # and without interactions
            needs, problem = {}, "; ".join(filter(None, [problem, str(error)]))
        return LatentTable(
            self.index,
            notes,
            read_scores(self.index),
            judged,
            problem,
            Path(given) if (given := os.environ.get(EMBEDDER)) else None,
            needs,
        )

    @property
    def shared(self) -> Shared:
        model = self.bench.model
        return Shared(model, _turn(model.weights_hash, str(model.device), model))


def jobs() -> Jobs:
    return Jobs(root())


def files_of(*paths: Path) -> Files:
    """What tells whether files are still the same, those in a folder included.

    A file that was written again, or put in the place of another, has another number or another time of change, whatever date it was given.
    """
    return tuple(
        (str(file), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        for path in paths
        for file in (sorted(path.iterdir()) if path.is_dir() else [path])
        if file.exists()
        for stat in [file.stat()]
    )


def _files(sae: Trained) -> Files:
    """All that an `Opened` is made from; its model looks after its own."""
    now = Trained(sae.run, sae.folder)  # what is noted in `sae` may be of earlier
    own = [now.folder / CONFIG, now.folder / WEIGHTS, now.index_path]
    own += [scores_path(now.index_path), explanations_path(now.index_path), needs_path(now.index_path)]
    return files_of(*own, *([] if now.store is None else [now.store / MANIFEST]))


def opened(sae: Trained) -> Opened:
    """Raises ValueError where SAE, index and store do not belong together."""
    files = _files(sae)
    st.session_state.setdefault("drawn_from", {})[str(sae.folder)] = sae, files
    return _opened(str(sae.folder), files, sae)


def still_open() -> bool:
    """Whether what the page was drawn from is still what lies on disk."""
    return all(_files(sae) == files for sae, files in st.session_state.get("drawn_from", {}).values())


def table_of(sae: Trained) -> LatentTable:
    """Raises ValueError where there is no index, or one of another SAE or store."""
    return opened(sae).table


def weights_of(sae: Trained) -> SAE:
    """Raises ValueError where they cannot be read."""
    return opened(sae).bench.sae


def model_of(sae: Trained) -> Shared:
    """Raises ValueError where the model cannot be loaded, or is not the one whose vectors the SAE was trained on."""
    return opened(sae).shared


def bench_of(sae: Trained) -> tuple[Bench, Turn]:
    """(what steering needs, the model's lock). Raises ValueError as `model_of` does."""
    found = opened(sae)
    return found.bench, found.shared.lock


def fires_on(sae: Trained, text: str, **settings: Any) -> TextFeatures:
    """`features_for_text`, kept for as long as all that it depends on is the same; raises ValueError as that."""
    found = opened(sae)
    return _fires(found.bench.key, text, settings, found)


@st.cache_resource(show_spinner="Opening the index", max_entries=8)
def _opened(folder: str, files: Files, _sae: Trained) -> Opened:
    return Opened(_sae)


@st.cache_data(show_spinner=False, max_entries=64)
def _fires(key: tuple[str, ...], text: str, settings: dict[str, Any], _of: Opened) -> TextFeatures:
    with _of.shared.lock:
        return features_for_text(_of.shared.model, _of.bench.sae, _of.table.index, text, **settings)


def _load(name: str, *, revision: str | None, device: str) -> LanguageModel:
    return _model(name, revision, device, files_of(Path(model_path(name)).expanduser()))


@st.cache_resource(show_spinner="Loading the model", max_entries=2)
def _model(name: str, revision: str | None, device: str, files: Files) -> LanguageModel:
    return load_model(name, revision=revision, device=device)


@st.cache_resource(show_spinner=False)
def _turn(weights: str, device: str, _model: LanguageModel) -> Turn:
    small = sum(parameter.numel() for parameter in _model.module.parameters()) < SMALL
    return Turn(1 if small else THREADS)

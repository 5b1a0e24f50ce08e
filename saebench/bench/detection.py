"""`saebench bench python`: labels of tokens as features that are known in real text, and whether a single latent is each of them.

Suffixes: N rows, F latents, M labels, U documents.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse

from saebench.bench.paired import LEAST, differences, marked
from saebench.bench.readings import Reading, called, dictionaries_of, folders_by_store
from saebench.bench.results import Figure, Results, as_rate, drawn_interval
from saebench.bench.tasks import labelled, vectors_of
from saebench.config import Count
from saebench.evaluate.compare import LEAST_DOCUMENTS
from saebench.labels import Literals, labeller_of
from saebench.models import choose_device
from saebench.runlog import progress
from saebench.sae import Ends
from saebench.sae.hub import SaePath
from saebench.store import Store, open_store

_log = logging.getLogger(__name__)
_VERSION = 3  # of the figures' definitions
_AT_ONCE = 16_384  # rows encoded at once
_DOCUMENTS = 3  # that a label must hold in, in either half
_NAMED = 8  # labels without an interval, the others are counted
FOUND = (0.5, 0.9)
"""F1 above which a label counts as found"""


@dataclass(frozen=True, kw_only=True)
class PythonConfig:
    """Which SAEs, and whose labels."""

    run: Path
    """run directory: tries RUN/saes/*, and writes RUN/bench/python.json"""
    sae: tuple[SaePath, ...] = ()
    """SAEs to try instead of those of the run"""
    store: Path | None = None
    """activation store (default: the one each SAE was trained on)"""
    labeller: str = "python"
    """whose labels: python, for a store of Python source, or tokens, prose, spacy:PIPELINE, wordnet:DIRECTORY"""
    rows: Count = 200_000
    """held-out rows at most"""
    least: Count = 50
    """rows that a label must hold on, and not hold on, in either half"""
    resamples: Count = 1000
    """bootstrap samples of documents behind each interval"""
    seed: int = 0
    """of the untrained SAE and of the samples"""
    device: str | None = None
    """cuda or cpu (default: cuda where it is at hand)"""

    def __post_init__(self) -> None:
        for name in ("rows", "least", "resamples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")


def bench_python(config: PythonConfig) -> list[Figure]:
    """For each label the latent that is best at it on one half of the held-out documents, and its F1 on the other half.

    F1 = 2 TP ÷ (rows on which the latent fires + rows on which the label holds), at the rate at which it holds in the text. Returns for each SAE the mean
    over labels (`f1`) and the share found (`found`, at an F1), with an untrained SAE of the same width and L0 beside them and `oracle`, which
    has the labels themselves, and the `differences` of F1 between SAEs and untrained ones, label by label, as a table has them. Raises ValueError where there are no SAEs, or no labels that hold often enough in both halves.
    """
    results = Results(config.run / "bench/python.json", "python")
    found: list[Figure] = []
    stores = folders_by_store(config.run, config.sae, config.store)
    for path, (name, before) in called(stores).items():
        found += _of_store(config, open_store(path), name, stores[path], results, before)
    return found


def _of_store(
    config: PythonConfig,
    store: Store,
    known_as: str,
    folders: Sequence[tuple[Path, Ends]],
    results: Results,
    before: str,
) -> list[Figure]:
    device = choose_device(config.device, float64=True)
    labeller = labeller_of(config.labeller)
    rows, literals, documents = labelled(store, [labeller], None, config.rows, 2 * config.least)
    chosen = _half_of(documents)
    often = [_often_enough(literals, half, documents, config.least) for half in (chosen, ~chosen)]
    wanted = np.flatnonzero(often[0] & often[1])
    if not len(wanted):
        raise ValueError(
            f"no label of {labeller.name!r} holds on {config.least} rows in {_DOCUMENTS} documents of either half of {len(rows):,} held-out rows of "
            f"{store.folder}: harvest more tokens, give more --rows, less --least, or another --labeller"
        )
    holds_NM = literals.holds[:, wanted]
    names = [literals.names[number] for number in wanted]
    settings = {
        "store": store.hash, "rows": len(rows), "labeller": [labeller.name, labeller.version], "resamples": config.resamples,
        "seed": config.seed, "least": config.least, "version": _VERSION,
    }  # fmt: skip
    every: dict[str, list[Figure]] = {}
    readings = dictionaries_of(store, folders, config.seed, device)
    for reading in readings:
        identity, name = {**settings, **reading.identity, "hooks": list(reading.of)}, before + reading.name
        figures = results.get(name, identity)
        if figures is None:
            fires_NF, usual_N = _fires(store, reading, rows)
            figures = results.put(
                name,
                identity,
                _figures(config, name, names, fires_NF, holds_NM, usual_N, chosen, documents),
            )
        every[reading.name] = figures
    _say_what_is_few(names, [figure for figures in every.values() for figure in figures])
    everywhere = np.ones(len(rows), bool)
    oracle = _figures(config, f"{before}oracle", names, holds_NM.tocsr(), holds_NM, everywhere, chosen, documents)
    results.put(f"oracle of {known_as}", settings, oracle)
    of_labels = {name: [figure for figure in figures if figure.of != "all"] for name, figures in every.items()}
    apart = differences(readings, of_labels, "f1")
    told = settings | {"readings": {reading.name: reading.identity for reading in readings}}
    results.put(f"{before}differences", told, [figure._replace(sae=before + figure.sae) for figure in apart])
    means = [figure for figures in (*every.values(), oracle) for figure in figures if figure.of == "all"]
    return means + [figure._replace(sae=before + figure.sae) for figure in marked(apart)]


def _say_what_is_few(labels: Sequence[str], figures: Sequence[Figure]) -> None:
    if few := sorted({figure.of for figure in figures if figure.low is None}, key=lambda of: (of != "all", of)):
        some = ", ".join(few[:_NAMED]) + (f" and {len(few) - _NAMED} more" if len(few) > _NAMED else "")
        _log.warning("too few documents of the second half (under %d) for an interval: %s", LEAST_DOCUMENTS, some)
    if len(labels) < LEAST:
        _log.warning("differences over %d labels have no interval; expected %d at least", len(labels), LEAST)


def _half_of(documents: Int[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
    """Which rows latents are chosen on: those of every second document, in the order of their numbers."""
    return np.unique(documents, return_inverse=True)[1] % 2 == 0


def _often_enough(literals: Literals, half_N: np.ndarray, documents: np.ndarray, least: int) -> Bool[np.ndarray, " m"]:
    """Which labels hold often enough in a half, and not everywhere."""
    holds = literals.holds.tocsr()[half_N].tocsc()
    counts = np.diff(holds.indptr)
    of = documents[half_N]
    spread = np.array(
        [len(np.unique(of[holds.indices[a:b]])) for a, b in zip(holds.indptr, holds.indptr[1:], strict=False)]
    )
    return (counts >= least) & (spread >= _DOCUMENTS) & (counts <= half_N.sum() - least)


def _fires(store: Store, reading: Reading, rows: Int[np.ndarray, " N"]) -> tuple[Any, Bool[np.ndarray, " N"]]:
    """(where each latent fires, `[N, F]` bool, `scipy.sparse.csr_array`; which rows are massive at none of the hooks)."""
    parts, usual = [], []
    with progress(len(rows), f"encode by {reading.name}", "row", delay=1.0) as bar:
        for start in range(0, len(rows), _AT_ONCE):
            some = np.arange(start, min(start + _AT_ONCE, len(rows)))
            vectors = vectors_of(store, _no_model, rows, some, reading.hooks)
            usual.append(
                torch.stack([vectors[hook].norm(dim=1) <= store.norms(hook).bound for hook in reading.of])
                .all(0)
                .numpy()
            )
            parts.append(reading.encode(vectors).astype(bool))
            bar.update(len(some))
    return sparse.vstack(parts, format="csr"), np.concatenate(usual)


def _no_model() -> Any:
    raise AssertionError("what a dictionary reads is in its store")


def best_latents(fires_NF: Any, holds_NM: Any) -> tuple[Int[np.ndarray, " M"], Float[np.ndarray, " M"]]:
    """For each label the latent of highest F1 on some rows, and that F1; of equal ones the first."""
    both_FM = (fires_NF.T.astype(np.int32) @ holds_NM.astype(np.int32)).toarray()
    total_FM = fires_NF.sum(0)[:, None] + holds_NM.sum(0)[None, :]
    f1_FM = 2 * both_FM / np.maximum(total_FM, 1)
    best_M = f1_FM.argmax(0)
    return best_M, f1_FM[best_M, np.arange(f1_FM.shape[1])]


def _figures(
    config: PythonConfig,
    name: str,
    labels: Sequence[str],
    fires_NF: Any,
    holds_NM: Any,
    usual_N: Bool[np.ndarray, " N"],
    chosen_N: Bool[np.ndarray, " N"],
    documents: Int[np.ndarray, " N"],
) -> list[Figure]:
    """The figures of every label, and those of `all`."""
    one, other = usual_N & chosen_N, usual_N & ~chosen_N
    holds = holds_NM.tocsr()
    best_M, _ = best_latents(fires_NF[one], holds[one])
    fires_M, truth_M = fires_NF[other][:, best_M], holds[other]
    of = np.unique(documents[other], return_inverse=True)[1]
    n = int(of.max()) + 1
    by_document = sparse.csr_array((np.ones(len(of)), (of, np.arange(len(of)))), shape=(n, len(of)))
    both_UM, total_UM = (
        (by_document @ columns.astype(np.float64)).toarray() for columns in (fires_M.multiply(truth_M), fires_M.astype(np.int8) + truth_M.astype(np.int8))
    )  # fmt: skip
    there_UM = total_UM > 0  # a document without the label and its latent adds nothing to either sum
    n_M, n_any = there_UM.sum(0), int(there_UM.any(1).sum())
    draws = np.random.default_rng(config.seed).multinomial(n, np.full(n, 1 / n), size=config.resamples).astype(float)
    drawn_RM = 2 * (draws @ both_UM) / np.maximum(draws @ total_UM, 1)
    f1_M = 2 * both_UM.sum(0) / np.maximum(total_UM.sum(0), 1)
    figures = [
        Figure(name, label, "f1", None, f1, *as_rate(f1, *drawn_interval(f1, drawn_R, n), n), n)
        for label, f1, drawn_R, n in zip(labels, f1_M.tolist(), drawn_RM.T, n_M.tolist(), strict=True)
    ]
    means = [("f1", None, f1_M, drawn_RM), *(("found", bound, f1_M > bound, drawn_RM > bound) for bound in FOUND)]
    for figure, at, values_M, values_RM in means:
        value = float(values_M.mean())
        ends = drawn_interval(value, values_RM.mean(1), n_any)
        figures.append(Figure(name, "all", figure, at, value, *ends, len(labels)))
    return figures

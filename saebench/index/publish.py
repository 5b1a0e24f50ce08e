"""The file of an index: written now and then while it is built, and what an earlier call has left of it."""

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from saebench.files import replacing
from saebench.index.derive import companions, derive
from saebench.index.evidence import (
    Evidence,
    Sample,
    bin_edges,
    position_edges,
    rows_of_top,
)
from saebench.index.explain import explain
from saebench.index.memory import give_back
from saebench.index.plan import IndexConfig, Plan
from saebench.index.schema import INDEX_SCHEMA, INDEX_VERSIONS, open_index
from saebench.runlog import provenance
from saebench.store import Store

Groups = dict[str, dict[str, np.ndarray]]
"""Columns of the file by group and name."""

log = logging.getLogger(__name__)

KEPT_SAMPLE = 100_000
"""sampled rows of the training text that a complete file keeps: for companions, comparisons and exports; rules are fitted on all"""
SNAPSHOT_SECONDS = 30.0
SNAPSHOT_SHARE = 0.05  # of the time may go into writing them


@dataclass
class Gathered:
    """What is known so far; `done` marks the pieces it comes from, samples are by split."""

    evidence: Evidence
    samples: dict[str, list[Sample]]
    done: np.ndarray


class Publisher:
    """Writes the file, now and then while there is more to come."""

    def __init__(
        self, config: IndexConfig, plan: Plan, static: Groups, identity: dict[str, str], settings: dict[str, Any]
    ) -> None:
        self.path, self.plan, self.static = config.path, plan, static
        self.labellers, self.workers = config.labellers() if config.rules else [], config.workers
        self.attributes: dict[str, Any] = {
            "schema": INDEX_SCHEMA,
            "schema_version": INDEX_VERSIONS[-1],
            "identity": json.dumps(identity),
            "settings": json.dumps(settings),
            "store": str(plan.store.folder),
            "hook": str(plan.ends),
            "ends": json.dumps(plan.ends),
            "longest": plan.bounds[0] if len(plan.bounds) == 1 else plan.bounds,
            "d_sae": plan.sae.d_sae,
            "context": plan.store.context,
            "bin_edges": bin_edges(plan.scale),
            "position_edges": position_edges(plan.store.context),
            "provenance": json.dumps(provenance()),
        }
        self.due = time.monotonic() + SNAPSHOT_SECONDS

    def sometimes(self, gathered: Gathered) -> None:
        if time.monotonic() >= self.due and not gathered.done.all():
            started = time.monotonic()
            self(gathered)
            self.due = time.monotonic() + max(SNAPSHOT_SECONDS, (time.monotonic() - started) / SNAPSHOT_SHARE)

    def __call__(self, gathered: Gathered) -> None:
        complete = bool(gathered.done.all())
        for split, parts in gathered.samples.items():
            give_back()
            gathered.samples[split] = [Sample.joined(parts)]
        n_rows = int(gathered.evidence.position_rows.sum())
        with replacing(self.path) as temporary, h5py.File(temporary, "w") as file:
            share_done = rows_done(self.plan, gathered) / sum(piece.n_rows for piece in self.plan.pieces)
            file.attrs.update(self.attributes | {"complete": complete, "n_rows": n_rows, "share_done": share_done})
            self._samples(file, gathered, complete)
            _write(file, self.static)
            self._derived(file, gathered, complete)

    def _samples(self, file: h5py.File, gathered: Gathered, complete: bool) -> None:
        """Write the samples, and let go of their values once all is in: the rest asks what fires, not how strongly."""
        for split, (whole,) in gathered.samples.items():
            part = whole
            if complete and split == "train":
                part = part.of_lowest_hash(KEPT_SAMPLE)
            columns = part._asdict()
            latents = columns.pop("latents")  # narrower in memory than in the file
            file.create_dataset(f"sample/{split}/latents", latents.shape, np.int32)[...] = latents
            _write(file, {f"sample/{split}": columns})
            if complete:
                gathered.samples[split] = [whole._replace(values=np.broadcast_to(np.float32(0), whole.values.shape))]

    def _derived(self, file: h5py.File, gathered: Gathered, complete: bool) -> None:
        """Add what is computed from the evidence and the samples."""
        samples = {split: part for split, (part,) in gathered.samples.items()}
        tokens = _tokens(self.plan.store, samples["train"].rows)
        give_back()
        _write(file, derive(gathered.evidence, samples["train"], tokens, self.plan.scale))
        give_back()
        if complete:
            _write(file, {"companions": companions(samples["train"].of_lowest_hash(KEPT_SAMPLE), self.plan.sae.d_sae)})
            give_back()
        if complete and self.labellers:
            _write(file, explain(self.plan.store, samples, self.plan.sae.d_sae, self.labellers, self.workers))
        if not complete:
            _write(file, {"state": vars(gathered.evidence) | {"done": gathered.done}})


def _write(file: h5py.File, groups: Groups) -> None:
    for group, columns in groups.items():
        for name, values in columns.items():
            kind = h5py.string_dtype() if values.dtype == object else None
            file.create_dataset(f"{group}/{name}", data=values, dtype=kind)


def left_before(path: Path, wanted: dict[str, Any]) -> Literal["complete"] | tuple[Gathered, Groups] | None:
    """What an earlier call left: a complete file, one to go on from (with what is static in it), or none of these."""
    if not path.exists():
        return None
    with open_index(path) as file:
        if {name: json.loads(file.attrs[name]) for name in wanted} != wanted:
            log.info("%s is of another SAE, store or setting, and is made anew", path)
            return None
        if file.attrs["complete"]:
            return "complete"
        state = {name: column[:] for name, column in file["state"].items()}
        samples = {
            split: [Sample(**{name: column[:] for name, column in group.items()})]
            for split, group in file["sample"].items()
        }
        static = {
            name: {column: values[:] for column, values in file[name].items()}
            for name in ("decoder", "logits")
            if name in file
        }
    done = state.pop("done")
    if "massive" not in state:  # of before massive rows and repeated passages were known
        state |= {
            "massive": np.zeros(len(state["top"]), np.int64),
            "top_texts": rows_of_top(state["top"]).astype(np.uint32),
        }
    if state["sums"].ndim == 2:  # of before they were in limbs
        state["sums"] = np.stack([state["sums"], np.zeros_like(state["sums"])], 2)
    return Gathered(Evidence(**state), samples, done), static


def nothing_yet(plan: Plan) -> Gathered:
    evidence = Evidence.empty(plan.sae.d_sae, plan.store.context)
    return Gathered(evidence, {"train": [], "validation": []}, np.zeros(len(plan.pieces), bool))


def rows_done(plan: Plan, gathered: Gathered) -> int:
    return sum(piece.n_rows for piece, done in zip(plan.pieces, gathered.done, strict=True) if done)


def _tokens(store: Store, rows: np.ndarray) -> np.ndarray:
    """Tokens at rows of the store, ascending."""
    first, tokens = 0, []
    for shard in store.shards:
        mine = rows[np.searchsorted(rows, first) : np.searchsorted(rows, first + shard.n_rows)]
        tokens.append(shard.column("tokens")[mine - first])
        first += shard.n_rows
    return np.concatenate(tokens)

"""Build a feature index: one pass over a store, in units that may come in any order."""

import itertools
import json
import logging
import math
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import h5py
import numpy as np
import torch

from saebench.config import Count
from saebench.files import locked, replacing
from saebench.index.decoder import geometry, logit_effects
from saebench.index.derive import derive
from saebench.index.evidence import (
    MAX_ROWS,
    Evidence,
    Sample,
    Summary,
    Unit,
    bin_edges,
    passages,
    position_edges,
    rows_of_top,
    sample,
    summarise,
)
from saebench.index.explain import explain
from saebench.index.memory import give_back
from saebench.index.schema import INDEX_SCHEMA, INDEX_VERSIONS, identity_of, open_index
from saebench.models import Unembedding, choose_device, unembedding
from saebench.pieces import TokenBytes
from saebench.runlog import Interrupt, interruptible, progress, provenance
from saebench.sae import SAE, encode_sparse, load_sae, read_config
from saebench.store import Store, open_store
from saebench.store.schema import MASSIVE
from saebench.store.shard import Shard
from saebench.store.source import model_of, recorded_store

Groups = dict[str, dict[str, np.ndarray]]
"""Columns of the file by group and name."""

log = logging.getLogger(__name__)
_ON_A_GPU = 2  # workers, each with memory of its own there

UNIT_ROWS = 2048
SNAPSHOT_SECONDS = 30.0
SNAPSHOT_SHARE = 0.05  # of the time may go into writing them


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Which SAE to index, on which rows."""

    sae: Path
    """SAE directory, made here or by SAELens"""
    store: Path | None = None
    """activation store (default: the one the SAE was trained on)"""
    out: Path | None = None
    """file to write (default: index/NAME.h5 beside the folder saes/ that holds the SAE)"""
    tokens: Count = 10_000_000
    """training tokens to go over at most"""
    sample: Count = 100_000
    """rows, and as many held-out ones in whole contexts, of which everything that fires is kept: for tokens, companions and rules"""
    rules: bool = True
    """fit a rule of at most two literals to each latent, and score it on held-out rows"""
    logits: bool = True
    """give each latent's direct effect on the logits (loads the model where the store has no unembedding)"""
    workers: int | None = None
    """threads (default: one per core)"""
    device: str | None = None
    """cuda or cpu for the encoder (default: cuda where it is at hand)"""

    def __post_init__(self) -> None:
        for name in ("tokens", "sample"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected more than 0")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers is {self.workers}; expected 1 or more")

    @property
    def path(self) -> Path:
        sae = self.sae.resolve()
        return self.out or sae.parent.parent / "index" / f"{sae.name}.h5"


class Piece(NamedTuple):
    """Where a unit lies: a stretch of a shard."""

    shard: Shard
    start: int  # in the shard
    n_rows: int
    first_row: int  # in the store


@dataclass
class Plan:
    """What a pass goes over."""

    sae: SAE
    store: Store
    hook: str
    bound: float
    """rows of a greater norm are massive"""
    scale: float
    """a power of two near the median norm, from which bins of strength are counted"""
    pieces: list[Piece]
    below: dict[str, int]
    """hashes of the rows in the sample, by split"""


@dataclass
class Gathered:
    """What is known so far; `done` marks the pieces it comes from, samples are by split."""

    evidence: Evidence
    samples: dict[str, list[Sample]]
    done: np.ndarray


def build_index(config: IndexConfig) -> Path | None:
    """Index an SAE; returns the file, or None when Ctrl-C ended it early.

    The same call continues a build that was interrupted or killed; the result is the same, whatever
    the number of workers. Until it is complete the file holds what is known so far.
    Raises ValueError when SAE, store and hook do not belong together.
    """
    path = config.path
    with locked(path.parent):
        plan = _plan(config)
        identity = identity_of(config.sae, plan.store)
        settings = {"tokens": config.tokens, "sample": config.sample, "logits": config.logits, "rules": config.rules}
        if plan.store.norms(
            plan.hook
        ).massive:  # where there are none, an index of before they were left out is the same
            settings["massive"] = MASSIVE
        before = _before(path, {"identity": identity, "settings": settings})
        if before == "complete":
            log.info("%s is complete already", path)
            return path
        gathered, static = before or (_nothing(plan), _static(config, plan))
        publish = _Publisher(config, plan, static, identity, settings)
        total = sum(piece.n_rows for piece in plan.pieces)
        bar = progress(total, f"index {config.sae.name}", "row", _rows_done(plan, gathered))
        with interruptible() as interrupt, bar:
            for number, summary, part in _results(plan, gathered, config.workers, interrupt):
                if summary is not None:
                    gathered.evidence.add(summary)
                gathered.samples[plan.pieces[number].shard.split].append(part)
                gathered.done[number] = True
                bar.update(plan.pieces[number].n_rows)
                publish.sometimes(gathered)
        publish(gathered)
        if not gathered.done.all():
            log.warning("stopped after %d of %d rows; the same command continues", _rows_done(plan, gathered), total)
            return None
    return path


def _plan(config: IndexConfig) -> Plan:
    """Raises ValueError when SAE, store and hook do not belong together."""
    device = choose_device(config.device, float64=True)
    sae = load_sae(config.sae, device=device)
    metadata = read_config(config.sae).get("metadata", {})
    folder, hook = config.store or recorded_store(config.sae), metadata.get("hook_name")
    if folder is None:
        raise ValueError(f"{config.sae} does not say what it was trained on; give a store of its hook with --store")
    if hook is None:
        raise ValueError(f"{config.sae} does not say which hook it reads: add metadata.hook_name to its cfg.json")
    store = open_store(folder)
    if store.d_in(hook) != sae.d_in:
        raise ValueError(
            f"{config.sae} has d_in {sae.d_in}, but {hook} in {store.folder} has {store.d_in(hook)}; give its own --store"
        )
    pieces = list(_pieces(store, {"train": config.tokens, "validation": config.sample}))
    rows = {split: sum(p.n_rows for p in pieces if p.shard.split == split) for split in ("train", "validation")}
    if not rows["train"]:
        raise ValueError(f"{store.folder} has no training rows; harvest more tokens")
    if sum(shard.n_rows for shard in store.shards) >= MAX_ROWS:
        raise ValueError(f"{store.folder} has more than {MAX_ROWS} rows; an index holds no more")
    below = {"train": min(2**64 - 1, config.sample * 2**64 // rows["train"]), "validation": 2**64 - 1}
    norms = store.norms(hook)
    return Plan(sae, store, hook, norms.bound, 2.0 ** round(math.log2(norms.median)), pieces, below)


def _pieces(store: Store, limits: dict[str, int]) -> Iterator[Piece]:
    """Whole contexts, the first of each split up to its limit of rows."""
    size = max(1, UNIT_ROWS // store.context) * store.context
    left = {split: -(-limit // store.context) * store.context for split, limit in limits.items()}
    first_row = 0
    for shard in store.shards:
        n_rows = min(shard.n_rows, left[shard.split])
        for start in range(0, n_rows, size):
            yield Piece(shard, start, min(size, n_rows - start), first_row + start)
        left[shard.split] -= n_rows
        first_row += shard.n_rows


def _results(
    plan: Plan, gathered: Gathered, workers: int | None, interrupt: Interrupt
) -> Iterator[tuple[int, Summary | None, Sample]]:
    """The pieces not yet done, in the order in which they are finished; a few are under way at once."""
    n_workers = workers or (_ON_A_GPU if plan.sae.W_enc.is_cuda else torch.get_num_threads())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each worker computes alone, so that rounding does not depend on their number
    todo = iter([number for number, finished in enumerate(gathered.done) if not finished])
    with ThreadPoolExecutor(n_workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        running: dict[Future, int] = {}
        try:
            while True:
                wanted = 2 * n_workers - len(running) if not interrupt.requested else 0
                running |= {
                    pool.submit(_reduce, plan, plan.pieces[n], gathered.evidence): n
                    for n in itertools.islice(todo, wanted)
                }
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), *future.result()
        finally:
            for future in running:
                future.cancel()
            torch.set_num_threads(threads)


def _reduce(plan: Plan, piece: Piece, so_far: Evidence) -> tuple[Summary | None, Sample]:
    unit = _read(plan, piece)
    summary = summarise(unit, plan.scale, so_far) if piece.shard.split == "train" else None
    return summary, sample(unit, plan.below[piece.shard.split])


def _read(plan: Plan, piece: Piece) -> Unit:
    stop = piece.start + piece.n_rows
    keep, positions, tokens, docs = (
        piece.shard.column(name, piece.start, stop) for name in ("keep", "position", "tokens", "doc_id")
    )
    texts = passages(tokens, positions, docs, keep)
    kept = np.flatnonzero(keep)
    x_RD = piece.shard.rows(plan.hook, piece.start, stop)[torch.from_numpy(kept)].to(
        plan.sae.W_dec.device, torch.float32
    )
    usual = x_RD.norm(dim=1) <= plan.bound
    code, values = encode_sparse(plan.sae, x_RD[usual])
    massive = code.latents[:0] if bool(usual.all()) else encode_sparse(plan.sae, x_RD[~usual])[0].latents
    usual = usual.cpu().numpy()
    keep = keep.copy()
    keep[kept[~usual]] = False
    return Unit(
        piece.first_row, piece.n_rows, plan.store.context, kept[usual][code.rows.cpu().numpy()],
        code.latents.cpu().numpy().astype(np.min_scalar_type(plan.sae.d_sae - 1)), values.cpu().numpy(), keep, positions,
        texts, massive.cpu().numpy(),
    )  # fmt: skip


def _static(config: IndexConfig, plan: Plan) -> Groups:
    """What does not depend on the store's rows."""
    groups: Groups = {"decoder": geometry(plan.sae)}
    if config.logits:
        known = TokenBytes(plan.store.tokenizer()).known
        groups["logits"] = logit_effects(plan.sae.W_dec, _unembedding(plan), known)
        give_back()
    return groups


def _unembedding(plan: Plan) -> Unembedding:
    """The store's own, or the model's where the store is of before it was kept."""
    device = plan.sae.W_dec.device
    if plan.store.has_unembedding:
        W_U, gamma, centred, scale = plan.store.unembedding()
        return Unembedding(W_U.to(device, torch.float32), gamma.to(device), centred, scale)
    return unembedding(model_of(plan.store, str(device), "float32"))


# -------------------------------------------------------------------------------------------- the file


class _Publisher:
    """Writes the file, now and then while there is more to come."""

    def __init__(
        self, config: IndexConfig, plan: Plan, static: Groups, identity: dict[str, str], settings: dict[str, Any]
    ) -> None:
        self.path, self.plan, self.static = config.path, plan, static
        self.rules = config.rules
        self.attributes: dict[str, Any] = {
            "schema": INDEX_SCHEMA,
            "schema_version": INDEX_VERSIONS[-1],
            "identity": json.dumps(identity),
            "settings": json.dumps(settings),
            "store": str(plan.store.folder),
            "hook": plan.hook,
            "longest": plan.bound,
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
            share_done = _rows_done(self.plan, gathered) / sum(piece.n_rows for piece in self.plan.pieces)
            file.attrs.update(self.attributes | {"complete": complete, "n_rows": n_rows, "share_done": share_done})
            self._samples(file, gathered, complete)
            _write(file, self.static)
            self._derived(file, gathered, complete)

    def _samples(self, file: h5py.File, gathered: Gathered, complete: bool) -> None:
        """Write the samples, and let go of their values once all is in: the rest asks what fires, not how strongly."""
        for split, (part,) in gathered.samples.items():
            columns = part._asdict()
            latents = columns.pop("latents")  # narrower in memory than in the file
            file.create_dataset(f"sample/{split}/latents", latents.shape, np.int32)[...] = latents
            _write(file, {f"sample/{split}": columns})
            if complete:
                gathered.samples[split] = [part._replace(values=np.broadcast_to(np.float32(0), part.values.shape))]

    def _derived(self, file: h5py.File, gathered: Gathered, complete: bool) -> None:
        """Add what is computed from the evidence and the samples."""
        samples = {split: part for split, (part,) in gathered.samples.items()}
        tokens = _tokens(self.plan.store, samples["train"].rows)
        give_back()
        _write(file, derive(gathered.evidence, samples["train"], tokens, self.plan.scale, complete))
        give_back()
        if complete and self.rules:
            _write(file, explain(self.plan.store, samples, self.plan.sae.d_sae))
        if not complete:
            _write(file, {"state": vars(gathered.evidence) | {"done": gathered.done}})


def _write(file: h5py.File, groups: Groups) -> None:
    for group, columns in groups.items():
        for name, values in columns.items():
            kind = h5py.string_dtype() if values.dtype == object else None
            file.create_dataset(f"{group}/{name}", data=values, dtype=kind)


def _before(path: Path, wanted: dict[str, Any]) -> Literal["complete"] | tuple[Gathered, Groups] | None:
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


def _nothing(plan: Plan) -> Gathered:
    evidence = Evidence.empty(plan.sae.d_sae, plan.store.context)
    return Gathered(evidence, {"train": [], "validation": []}, np.zeros(len(plan.pieces), bool))


def _rows_done(plan: Plan, gathered: Gathered) -> int:
    return sum(piece.n_rows for piece, done in zip(plan.pieces, gathered.done, strict=True) if done)


def _tokens(store: Store, rows: np.ndarray) -> np.ndarray:
    """Tokens at rows of the store, ascending."""
    first, tokens = 0, []
    for shard in store.shards:
        mine = rows[np.searchsorted(rows, first) : np.searchsorted(rows, first + shard.n_rows)]
        tokens.append(shard.column("tokens")[mine - first])
        first += shard.n_rows
    return np.concatenate(tokens)

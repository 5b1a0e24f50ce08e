"""What a run is: which rows its SAEs see, what decides their weights, and what they say of themselves once saved."""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saebench.config import differences, to_json
from saebench.metrics import FLAT
from saebench.models import model_path
from saebench.runlog import provenance
from saebench.sae import Ends, read_config
from saebench.store import Cursor, Partition, Store, joint_batches
from saebench.store.coding import row_bytes
from saebench.store.norms import moments_within, rows_beyond
from saebench.store.pair import PairedStore
from saebench.store.schema import MASSIVE
from saebench.store.shuffle import ShardsOf, quality
from saebench.train.checkpoint import begun_as
from saebench.train.member import Member
from saebench.train.rolling import window_shards
from saebench.train.settings import TrainConfig, grid
from saebench.train.spec import Spec

log = logging.getLogger(__name__)
GOOD_SHUFFLE = 0.9


@dataclass(frozen=True, kw_only=True)
class Run:
    """A grid of SAEs on a store."""

    config: TrainConfig
    specs: list[Spec]
    store: Store
    window: int | None
    """shards of a window, where rows come in windows"""
    buffers: dict[str, int | float]
    """for each hook, the rows of a buffer that they are shuffled in"""
    partitions: int
    """that rows are dealt out to"""
    streams: list[tuple[str, ...]]
    """hooks whose rows are drawn together: those of one dictionary, or of several that share some"""
    multiples: dict[str, float | None]
    """for each hook, how many times the median norm is too long for a row; None where no row is left out"""
    identity: dict[str, dict[str, Any]]
    """for each SAE, everything that decides its weights"""

    @classmethod
    def of(cls, config: TrainConfig, store: Store, processes: int = 1) -> "Run":
        """What is not said is as the run was begun, whose folder this process, or the first of several, holds."""
        places = config.places(store.hooks)
        first = places[0].reads if isinstance(places[0], Ends) else (places[0],)
        specs = grid(config, sum(store.d_in(hook) for hook in first), places)
        window = None if config.rolling is None else window_shards(store, config.rolling, config.batch)
        begun = begun_as(config.out / "saes")
        specs = [_as_begun(spec, begun[spec.name], config) if spec.name in begun else spec for spec in specs]
        streams = _streams([spec.ends.hooks for spec in specs])
        multiples = {}
        for stream in streams:
            mine = [begun[spec.name] for spec in specs if spec.ends.hooks[0] in stream and spec.name in begun]
            multiples |= dict.fromkeys(stream, _multiple(config, store, stream, mine, window))
        mine = [begun[spec.name] for spec in specs if spec.name in begun]
        buffer, buffers = _buffers(config, store, list(multiples), mine)
        partitions = config.partitions or (mine[0].get("partitions", 1) if mine else _readers(config, processes))
        if partitions > 1:
            buffer["partitions"] = partitions
        shared = {
            **{name: to_json(config)[name] for name in ("tokens", "batch", "dtype")},
            **buffer,
            "order": config.seed[0],
            "store": store.hash,
        }
        if isinstance(store, PairedStore):
            shared["beside"] = store.beside.hash
        if window:
            shared["window_shards"] = window
            if len(multiples) > 1 and any(multiples.values()):
                shared["left_out_at"] = sorted(multiples)
        identity = {}
        for spec in specs:
            multiple = multiples[spec.ends.reads[0]]
            left_out = {} if multiple is None else {"exclude_outliers": multiple}
            identity[spec.name] = {**spec.to_json(), **shared, "dead_steps": config.dead_steps(spec), **left_out}
        return cls(
            config=config, specs=specs, store=store, window=window, buffers=buffers, partitions=partitions, streams=streams,
            multiples=multiples, identity=identity,
        )  # fmt: skip

    @property
    def folder(self) -> Path:
        """Where the SAEs' directories are."""
        return self.config.out / "saes"

    @property
    def folders(self) -> list[Path]:
        """The SAEs' directories."""
        return [self.folder / name for name in self.identity]

    def to_do(self) -> list[Spec]:
        """Those not trained yet; of a joint set all, or none."""
        left = [spec for spec in self.specs if not self._is_done(spec.name)]
        sets = {spec.set for spec in left if spec.joint}
        return [spec for spec in self.specs if spec in left or (spec.joint and spec.set in sets)]

    def _is_done(self, name: str) -> bool:
        """Whether this SAE was trained already. Raises ValueError when the folder has another of its name."""
        folder = self.folder / name
        if not (folder / "cfg.json").exists():
            return False
        if changed := differences(read_config(folder)["metadata"]["saebench"]["identity"], self.identity[name]):
            raise ValueError(
                f"{folder} holds an SAE trained with other settings: {'; '.join(changed)}. Choose another --out"
            )
        return True

    def widths(self, hooks: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(self.store.d_in(hook) for hook in hooks)

    def inputs(self, hook: str) -> tuple[float, Float[Tensor, " D"]]:
        """(the factor that brings E‖x‖² to D, the mean of the rows times it), both of the rows trained on.

        Raises ValueError where all rows are the same.
        """
        statistics, multiple = self.store.statistics(hook), self.multiples[hook]
        mean, squared = np.array(statistics["mean"]), statistics["mean_squared_norm"]
        if multiple is not None:
            histogram = self.store.norm_histogram(hook)
            log.info(
                "%s: %s of %s rows are left out, longer than %g × the median norm of %.4g",
                hook, f"{rows_beyond(histogram, multiple):,}", f"{int(histogram.sum()):,}",
                multiple, statistics["median_norm"],
            )  # fmt: skip
            mean, squared = moments_within(self.store, hook, self._longest(hook))
        if squared - float((mean**2).sum()) <= FLAT * squared:
            raise ValueError(
                f"{hook} in {self.store.folder} is the same in every row; expected vectors that vary: choose another --hook, "
                "or look at the model"
            )
        scale = math.sqrt(self.store.d_in(hook) / squared)
        return scale, torch.tensor(mean, dtype=torch.float32) * scale

    def say_how_well_it_shuffles(self) -> None:
        """And warn where a batch has rows of clearly fewer documents than chance would give it."""
        rows = min(self.buffers.values())
        found = quality(self.store, self.config.batch, rows)
        said = "rows are shuffled in buffers of %s, %.1f GB in all: a batch has %.2f of the documents of a perfect shuffle's"
        known = f"{int(rows):,}", self.buffer_bytes / 1e9, found
        if found >= GOOD_SHUFFLE:
            log.info(said, *known)
        else:
            log.warning(said + "; a larger --buffer-rows, or fewer hooks at a time, brings it nearer", *known)

    @property
    def buffer_bytes(self) -> int:
        """Memory of the two buffers of all hooks."""
        rows, dtype = self.store.rows("train"), self.store.manifest["dtype"]
        return sum(int(2 * min(n, rows)) * row_bytes(dtype, self.store.d_in(hook)) for hook, n in self.buffers.items())

    def batches(
        self, stream: tuple[str, ...], own: range, starts: Mapping[str, Cursor], shards: ShardsOf, device: str
    ) -> Iterator[tuple[dict[str, Tensor], dict[str, Cursor]]]:
        """The rows to train on, of each hook of a stream, on their device and without end: those of each of these partitions behind
        the other's, with the cursors after them, by `place`; from cursors on, or from the first."""
        # A row is left out at all hooks of a dictionary if at one, so that they stay in step; in a rolling run at every
        # hook, so that none gets ahead of the others' windows.
        apart = self.multiples if self.window else stream
        longest = {name: self._longest(name) for name in apart if self.multiples[name] is not None}
        parts = [
            joint_batches(
                self.store, stream, self.config.batch // self.partitions,
                seed=self.config.seed[0], buffer_rows=self.buffers[stream[0]], start=starts.get(self.place(stream[0], n), Cursor()),
                longest=longest, shards=shards, device=device, partition=Partition(n, self.partitions),
            )
            for n in own
        ]  # fmt: skip
        for drawn in zip(*parts, strict=True):
            rows = {
                hook: torch.cat([some[hook] for some, _ in drawn]) if drawn[1:] else drawn[0][0][hook]
                for hook in stream
            }
            yield (
                rows,
                {self.place(hook, n): cursor for n, (_, cursor) in zip(own, drawn, strict=True) for hook in stream},
            )

    def place(self, hook: str, partition: int) -> str:
        """What the cursor of a hook's rows in a partition is kept under."""
        return hook if self.partitions == 1 else f"{hook}, partition {partition + 1} of {self.partitions}"

    def facts(self, member: Member, seconds: float, epochs: float) -> dict[str, Any]:
        """Metadata of a saved SAE: what SAELens' tools read, and under `saebench` how it came about."""
        (hook, *_), writes = member.spec.ends
        made = self.store.manifest["identity"]
        others: dict[str, Any] = {}
        if member.spec.reads:
            others = {"reads": list(member.spec.reads), "writes": list(writes)}
        if not member.spec.ends.tied:
            others["hook_name_out"] = writes[0]
        if member.spec.set:
            reads = [spec.ends.reads[0] for spec in self.specs if spec.set == member.spec.set]
            others |= {"set": member.spec.set, "set_reads": reads, "joint": member.spec.joint}
        return {
            # Vectors of one's own need not say what they are of.
            "model_name": model_path(made["model"]["id"]) if "model" in made else None,
            "model_class_name": "HookedTransformer",
            "hook_name": hook,
            **others,
            "hook_head_index": None,
            "context_size": self.store.context,
            "prepend_bos": self.store.prepends_bos,
            "seqpos_slice": [None],
            "dataset_path": made.get("text", {}).get("dataset"),
            "exclude_special_tokens": True,
            "neuronpedia_id": None,
            "training_architecture": member.spec.architecture,
            "saebench": {
                "identity": self.identity[member.spec.name],
                "store": str(self.config.store),
                **({"beside": str(self.config.beside)} if self.config.beside else {}),
                "longest_row": None if self.multiples[hook] is None else self._longest(hook),
                "tokens_trained": self.config.n_steps * self.config.batch,
                "epochs": epochs,
                "seconds": seconds,
                "lambda": None if member.spec.k else float(member.sparsity.log_coefficient.exp()),
                "provenance": provenance(),
            },
        }

    def _longest(self, hook: str) -> float:
        """The norm of the longest row to train on."""
        return (self.multiples[hook] or math.inf) * self.store.statistics(hook)["median_norm"]


def _readers(config: TrainConfig, processes: int) -> int:
    """Processes that share the rows of an SAE."""
    if processes == 1:
        return 1
    return (config.share or processes) if config.ranks == "rows" else config.replicas or 1


def _as_begun(spec: Spec, begun: dict[str, Any], config: TrainConfig) -> Spec:
    """What is not said, and the pace, which was 1 before it followed the learning rate, as those of what this SAE was begun with."""
    known = {"pace": begun.get("pace", 1.0), "edition": begun.get("edition", 1)}
    known |= {} if config.lr else {"lr": begun["lr"]}
    known |= {} if config.decay is not None else {"decay": begun["decay"]}
    return replace(spec, **known)


def _streams(groups: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Groups of hooks, those that share some joined."""
    streams: list[tuple[str, ...]] = []
    for group in groups:
        shared = [stream for stream in streams if set(stream) & set(group)]
        joined = tuple(dict.fromkeys(hook for stream in [*shared, group] for hook in stream))
        streams = [stream for stream in streams if stream not in shared] + [joined]
    return streams


def _buffers(
    config: TrainConfig, store: Store, hooks: list[str], begun: list[dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, int | float]]:
    """(what an identity says of the buffers, the rows of each hook's), as asked or as begun.

    Runs were begun with so many bytes for each hook, once.
    """
    sizes = {hook: row_bytes(store.manifest["dtype"], store.d_in(hook)) for hook in hooks}
    first = begun[0] if begun else {}
    if "memory_gb" in first and config.buffer_rows is None:
        gb = first["memory_gb"] if config.memory_gb is None else config.memory_gb / len(hooks)
        return {"memory_gb": gb}, {hook: int(gb * 2**30) / size / 2 for hook, size in sizes.items()}
    rows = config.rows_of_a_buffer(sum(sizes.values()))
    if config.memory_gb is None and config.buffer_rows is None:
        rows = first.get("buffer_rows", rows)
    return {"buffer_rows": rows}, dict.fromkeys(hooks, rows)


def _multiple(
    config: TrainConfig, store: Store, hooks: tuple[str, ...], begun: list[dict[str, Any]], window: int | None
) -> float | None:
    """That of hooks whose rows are left out together; their SAEs may have been begun before massive rows were."""
    before = begun[0].get("exclude_outliers") if begun else None
    if config.exclude_outliers is None and begun:
        return before
    asked = MASSIVE if config.exclude_outliers is None else config.exclude_outliers
    # Windows may have such rows where their head has none.
    beyond = any(rows_beyond(store.norm_histogram(hook), asked) for hook in hooks)
    if asked == math.inf or asked == before or window or beyond:
        return None if asked == math.inf else asked
    return None

"""What a run is: which rows its SAEs see, what decides their weights, and what they say of themselves once saved."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saebench.config import differences, to_json
from saebench.files import hash_files
from saebench.models import model_path
from saebench.runlog import provenance
from saebench.sae import read_config
from saebench.store import Cursor, Store, shuffled_batches
from saebench.store.norms import moments_within, rows_beyond
from saebench.store.schema import MANIFEST, MASSIVE
from saebench.store.shuffle import ShardsOf
from saebench.train.checkpoint import begun_as
from saebench.train.member import Member, Spec
from saebench.train.settings import TrainConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A grid of SAEs on a store."""

    config: TrainConfig
    store: Store
    window: int | None
    """shards of a window, where rows come in windows"""
    multiples: dict[str, float | None]
    """for each hook, how many times the median norm is too long for a row; None where no row is left out"""
    identity: dict[str, dict[str, Any]]
    """for each SAE, everything that decides its weights"""

    @classmethod
    def of(cls, config: TrainConfig, store: Store, specs: list[Spec], window: int | None) -> "Run":
        """What is not said is as the run was begun, whose folder this process holds."""
        begun = begun_as(config.out / "saes")
        multiples = {}
        for hook in dict.fromkeys(spec.hook for spec in specs):
            mine = [begun[spec.name] for spec in specs if spec.hook == hook and spec.name in begun]
            multiples[hook] = _multiple(config, store, hook, mine, window)
        shared = {
            **{name: to_json(config)[name] for name in ("tokens", "batch", "dtype")},
            "memory_gb": config.memory_gb / len(multiples),
            "order": config.seed[0],
            "dead_steps": config.dead_steps,
            "store": hash_files([store.folder / MANIFEST]),
        }
        if window:
            shared["window_shards"] = window
            if len(multiples) > 1 and any(multiples.values()):
                shared["left_out_at"] = sorted(multiples)
        identity = {}
        for spec in specs:
            multiple = multiples[spec.hook]
            left_out = {} if multiple is None else {"exclude_outliers": multiple}
            identity[spec.name] = {**spec.to_json(), **shared, **left_out}
        return cls(config=config, store=store, window=window, multiples=multiples, identity=identity)

    @property
    def folder(self) -> Path:
        """Where the SAEs' directories are."""
        return self.config.out / "saes"

    @property
    def folders(self) -> list[Path]:
        """The SAEs' directories."""
        return [self.folder / name for name in self.identity]

    def is_done(self, name: str) -> bool:
        """Whether this SAE was trained already. Raises ValueError when the folder has another of its name."""
        folder = self.folder / name
        if not (folder / "cfg.json").exists():
            return False
        if changed := differences(read_config(folder)["metadata"]["saebench"]["identity"], self.identity[name]):
            raise ValueError(
                f"{folder} holds an SAE trained with other settings: {'; '.join(changed)}. Choose another --out"
            )
        return True

    def inputs(self, hook: str) -> tuple[float, Float[Tensor, " D"]]:
        """(the factor that brings E‖x‖² to D, the mean of the rows times it), both of the rows trained on."""
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
        scale = math.sqrt(self.store.d_in(hook) / squared)
        return scale, torch.tensor(mean, dtype=torch.float32) * scale

    def batches(self, hook: str, start: Cursor | None, shards: ShardsOf) -> Iterator[tuple[Tensor, Cursor]]:
        """The rows to train on, without end, from a cursor on or from the first."""
        memory = int(self.config.memory_gb * 2**30 / len(self.multiples))
        # In a rolling run a row is left out at every hook if at one, so that no hook gets ahead of the others' windows.
        apart = self.multiples if self.window else (hook,)
        longest = {name: self._longest(name) for name in apart if self.multiples[name] is not None}
        return shuffled_batches(
            self.store, hook, self.config.batch,
            seed=self.config.seed[0], memory=memory, start=start or Cursor(), longest=longest, shards=shards,
        )  # fmt: skip

    def facts(self, member: Member, seconds: float, epochs: float) -> dict[str, Any]:
        """Metadata of a saved SAE: what SAELens' tools read, and under `saebench` how it came about."""
        hook, made = member.spec.hook, self.store.manifest["identity"]
        return {
            # Vectors of one's own need not say what they are of.
            "model_name": model_path(made["model"]["id"]) if "model" in made else None,
            "model_class_name": "HookedTransformer",
            "hook_name": hook,
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


def _multiple(
    config: TrainConfig, store: Store, hook: str, begun: list[dict[str, Any]], window: int | None
) -> float | None:
    """That of a hook, whose SAEs may have been begun before massive rows were left out."""
    before = begun[0].get("exclude_outliers") if begun else None
    if config.exclude_outliers is None and begun:
        return before
    asked = MASSIVE if config.exclude_outliers is None else config.exclude_outliers
    # Windows may have such rows where their head has none.
    if asked == math.inf or asked == before or window or rows_beyond(store.norm_histogram(hook), asked):
        return None if asked == math.inf else asked
    return None

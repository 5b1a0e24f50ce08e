"""Harvest: text -> contexts -> one truncated forward pass -> an activation store.

Contexts are dealt into shards of one split each, in an order that the text alone decides, and every
shard is run in batches that begin at its first context. A harvest that was killed therefore goes on
at its last whole shard and ends with the same bytes as one that was not.
"""

import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from saebench.config import Count, to_json
from saebench.files import hash_files, locked
from saebench.models import (
    EMBEDDED_MODEL,
    HookKind,
    LanguageModel,
    ModelDtype,
    capture,
    check_hook,
    hook_name,
    load_model,
)
from saebench.runlog import interruptible, progress
from saebench.store import Store, StoreWriter, open_store
from saebench.store.coding import encode, row_bytes
from saebench.store.schema import PROVENANCE, StoreDtype
from saebench.text import SPLITS, Context, Split, TextConfig, encoder_of, fingerprint, open_documents, pack

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class HarvestConfig:
    """What to run, on how much text, and how to keep it."""

    model: str = EMBEDDED_MODEL
    """`embedded`, a directory made by save_pretrained, or a hub id"""
    model_revision: str | None = None
    """branch, tag or commit of a hub model"""
    layers: tuple[int, ...]
    """layers whose vectors to keep, for instance 1,2"""
    kinds: tuple[HookKind, ...] = ("resid_post",)
    """positions in each layer: resid_pre, resid_post, mlp_out, attn_out"""
    tokens: Count = 1_000_000
    """training tokens to harvest (special tokens included)"""
    validation_tokens: Count = 1_000_000
    """held-out tokens to keep at most, of those met on the way"""
    context: Count = 256
    """tokens in a context, BOS included"""
    batch: Count = 32
    """contexts in a forward pass"""
    shard_contexts: Count = 256
    """contexts in a shard, the unit in which a harvest is resumed"""
    dtype: StoreDtype = "float16"
    """how vectors are kept on disk"""
    model_dtype: ModelDtype | None = None
    """how the model computes (default: bfloat16 on GPUs that have it, else float32)"""
    device: str | None = None
    """cuda, mps or cpu (default: the first of these at hand)"""
    trust_remote_code: bool = False
    """run code that comes with a hub model"""
    out: Path
    """folder of the store, for instance activations/NAME"""

    def __post_init__(self) -> None:
        if not self.layers or min(self.layers) < 0:
            raise ValueError(f"layers is {self.layers}; expected at least one layer, counted from 0")
        if len(set(self.hooks)) < len(self.hooks):
            raise ValueError(f"layers {self.layers} with kinds {self.kinds} name a hook twice; expected each once")
        for name in ("tokens", "validation_tokens", "context", "batch", "shard_contexts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.context < 2:
            raise ValueError(f"context is {self.context}; expected at least 2: BOS and a token")

    @property
    def hooks(self) -> list[str]:
        return [hook_name(layer, kind) for layer in self.layers for kind in self.kinds]


class _Plan(NamedTuple):
    """The next shard: contexts of one split, and where that split's text goes on."""

    split: Split
    contexts: list[Context]
    cursor: tuple[int, int]


def harvest(config: HarvestConfig, text: TextConfig) -> Store | None:
    """Make, continue or reopen the store in `config.out`; None when Ctrl-C ended it early.

    Raises ValueError for a model, hook or data set that does not exist, for a data set with nothing
    in one of the splits, for a disk too small, and for a store made with other settings.
    """
    source = fingerprint(text)
    with locked(config.out):
        model = load_model(
            config.model,
            device=config.device,
            dtype=config.model_dtype,
            revision=config.model_revision,
            trust_remote_code=config.trust_remote_code,
        )
        for hook in config.hooks:
            check_hook(model, hook)
        if config.context > model.max_context:
            raise ValueError(
                f"context is {config.context}, model {model.id!r} takes at most {model.max_context} tokens"
            )
        encoder = encoder_of(model.tokenizer)
        if encoder.bos >= model.n_vocab:
            raise ValueError(
                f"the tokenizer of model {model.id!r} opens contexts with token {encoder.bos}, beyond the model's "
                f"{model.n_vocab} embeddings: set a bos_token that the model knows and save the tokenizer again"
            )
        widths = dict.fromkeys(config.hooks, model.d_model)
        writer = StoreWriter(config.out, _identity(config, text, model, source), widths, config.dtype)
        if writer.manifest["complete"]:
            log.info("%s is complete already", config.out)
            return open_store(config.out)
        expected = _expected_rows(config, text.validation_fraction)
        done = sum(entry["rows"] for entry in writer.shards)
        _check_disk(config, model, expected - done)
        writer.add_tokenizer(model.tokenizer_files)
        with interruptible() as interrupt, progress(expected, f"harvest {config.out.name}", initial=done) as bar:
            for plan in _plans(config, text, model, writer.shards):
                _write_shard(config, model, writer, plan, bar)
                if interrupt.requested:
                    log.warning("stopped after %d whole shards; the same command continues", len(writer.shards))
                    return None
        _finish(config, text, writer)
        return open_store(config.out)


def _identity(config: HarvestConfig, text: TextConfig, model: LanguageModel, source: str | None) -> dict[str, Any]:
    """Everything that decides the store's contents."""
    kept = to_json(config)
    for name in ("out", "device", "trust_remote_code", "model", "model_revision"):
        del kept[name]
    return {
        **kept,
        "model_dtype": model.dtype,
        "model": {"id": model.id, "revision": config.model_revision, "weights": model.weights_hash},
        "tokenizer": {"files": hash_files(list(model.tokenizer_files))},
        "text": {**to_json(text), "fingerprint": source},
    }


def _expected_rows(config: HarvestConfig, fraction: float) -> int:
    """Training rows asked for, and the held-out rows that come with them."""
    return int(config.tokens + min(config.validation_tokens, config.tokens * fraction / (1 - fraction)))


def _row_bytes(config: HarvestConfig, model: LanguageModel) -> int:
    vectors = len(config.hooks) * row_bytes(config.dtype, model.d_model)
    return vectors + sum(kind.itemsize for kind in PROVENANCE.values())


def _check_disk(config: HarvestConfig, model: LanguageModel, rows: int) -> None:
    need, free = rows * _row_bytes(config, model) / 1e6, shutil.disk_usage(config.out).free / 1e6
    log.info("%s needs about %s MB more on disk; %s MB are free", config.out, f"{need:,.0f}", f"{free:,.0f}")
    if need > free:
        raise ValueError(
            f"{config.out} needs about {need:,.1f} MB for {rows:,} rows and the disk has {free:,.1f} MB free: "
            "ask for fewer --tokens or --layers, use a smaller --dtype, or choose another --out"
        )


def _plans(
    config: HarvestConfig, text: TextConfig, model: LanguageModel, shards: Sequence[dict[str, Any]]
) -> Iterator[_Plan]:
    """The shards still to write."""
    cursors: dict[Split, tuple[int, int]] = dict.fromkeys(SPLITS, (0, 0))
    done: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    for entry in shards:
        cursors[entry["split"]] = tuple(entry["cursor"])
        done[entry["split"]] += entry["rows"] // config.context
    limits: dict[Split, int] = {
        "train": -(-config.tokens // config.context),
        "validation": -(-config.validation_tokens // config.context),
    }
    # A split that has its fill needs no more text, so the place to go on from is the others'.
    start = min((cursors[split][0] for split in SPLITS if done[split] < limits[split]), default=cursors["train"][0])
    documents = open_documents(text, start)
    contexts = pack(documents, encoder_of(model.tokenizer), config.context, text.validation_fraction, cursors)
    return deal(contexts, config.shard_contexts, limits, done, cursors["train"])


def deal(
    contexts: Iterator[Context],
    per_shard: int,
    limits: dict[Split, int],
    done: dict[Split, int],
    train_cursor: tuple[int, int],
) -> Iterator[_Plan]:
    """Deal contexts into shards until the training split has its fill or the text ends.

    `done` contexts of each split are in earlier shards, the last training one of which ended at
    `train_cursor`. Held-out contexts are taken up to their limit from the same stretch of text, or
    beyond it from the first held-out document where the stretch has none.
    """
    count = dict(done)
    pending: dict[Split, list[Context]] = {split: [] for split in SPLITS}
    for context in contexts:
        full = count["train"] >= limits["train"]
        if full and count["validation"] and context.cursor[0] >= train_cursor[0]:
            break  # the text beyond the last training context belongs to nobody
        if count[context.split] >= limits[context.split]:
            continue
        pending[context.split].append(context)
        count[context.split] += 1
        if context.split == "train":
            train_cursor = context.cursor
        if len(pending[context.split]) == per_shard or count[context.split] == limits[context.split]:
            yield _Plan(context.split, pending[context.split], context.cursor)
            pending[context.split] = []
    for split in SPLITS:
        if pending[split]:
            yield _Plan(split, pending[split], pending[split][-1].cursor)


def _write_shard(config: HarvestConfig, model: LanguageModel, writer: StoreWriter, plan: _Plan, bar: Any) -> None:
    contexts = plan.contexts
    with writer.shard(len(contexts) * config.context) as (shard, documents, attributes):
        for start in range(0, len(contexts), config.batch):
            batch = contexts[start : start + config.batch]
            tokens = torch.from_numpy(np.stack([context.tokens for context in batch])).long()
            _check_vocabulary(batch, model)
            vectors = capture(model, tokens.to(model.device), config.hooks)
            provenance = {name: np.concatenate([getattr(context, name) for context in batch]) for name in PROVENANCE}
            rows = {hook: encode(value.flatten(0, 1), config.dtype).cpu() for hook, value in vectors.items()}
            shard.write(provenance, rows)
            bar.update(tokens.numel())
            shown = bar.format_dict
            rate = (bar.n - shown["initial"]) / max(shown["elapsed"], 1e-9)
            bar.set_postfix_str(f"{rate * _row_bytes(config, model) / 1e6:.1f} MB/s", refresh=False)
        for context in contexts:
            documents |= context.documents
        attributes |= {"split": plan.split, "context": config.context, "cursor": plan.cursor}


def _check_vocabulary(contexts: Sequence[Context], model: LanguageModel) -> None:
    for context in contexts:
        if (beyond := np.flatnonzero((context.tokens < 0) | (context.tokens >= model.n_vocab))).size:
            name = context.documents[int(context.doc_id[beyond[0]])]
            raise ValueError(
                f"document {name} has token {context.tokens[beyond[0]]}, model {model.id!r} knows 0 to {model.n_vocab - 1}: "
                "the data set was tokenized for another model"
            )


def _finish(config: HarvestConfig, text: TextConfig, writer: StoreWriter) -> None:
    rows = {split: sum(entry["rows"] for entry in writer.shards if entry["split"] == split) for split in SPLITS}
    if missing := [split for split in SPLITS if not rows[split]]:
        raise ValueError(
            f"dataset {text.dataset!r} is too small: it ended before a document fell into the {missing[0]} split "
            f"(validation_fraction {text.validation_fraction}); give more documents, or another --validation-fraction, and delete {config.out}"
        )
    if rows["train"] < config.tokens:
        log.warning(
            "the data set ended after %s training tokens of the %s asked for",
            f"{rows['train']:,}",
            f"{config.tokens:,}",
        )
    writer.complete({"rows": rows, "exhausted": rows["train"] < config.tokens})
    log.info("%s: %s training and %s held-out rows", config.out, f"{rows['train']:,}", f"{rows['validation']:,}")

"""All stages for one model: harvest, train, evaluate, index, report. Whatever is done already is not done again."""

import dataclasses
import gc
import logging
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from saebench.config import Count
from saebench.evaluate import EvalConfig, evaluate, write_report
from saebench.files import read_json, write_json
from saebench.harvest import HarvestConfig, harvest
from saebench.harvest.run import open_model
from saebench.harvest.settings import as_made, begun_store, settled, text_of
from saebench.index import IndexConfig, build_index
from saebench.models import EMBEDDED_MODEL, LanguageModel, capturer, choose_device, head, last_states
from saebench.sae import encode_sparse
from saebench.store.coding import row_bytes
from saebench.text import Document, TextConfig, fingerprint, open_documents
from saebench.train import TrainConfig, train
from saebench.train.member import Member
from saebench.train.recipes import Architecture
from saebench.train.settings import grid

log = logging.getLogger(__name__)

EPOCHS = 4
"""times that an SAE sees the store's rows"""
_STEPS = 1000  # at least, unless a batch would be tiny
_HELD_OUT = 100_000  # tokens that figures are measured on, at most
_DEFAULT_K = 32
_CONTEXT = 256  # tokens, where the model takes as many
_TRIED = 4  # contexts whose passes are timed


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A model from its name to the browser. Whatever else is to be set, the stages take one by one."""

    model: str = EMBEDDED_MODEL
    """a directory made by save_pretrained, a hub id, or `embedded`"""
    dataset: str | None = None
    """a file or folder (txt, md, py, jsonl, parquet, jsonl.gz), or a data set on the hub"""
    layers: tuple[int, ...] = ()
    """layers behind which the residual stream is kept and SAEs are trained (default: the middle one)"""
    tokens: Count = 1_000_000
    """training tokens to harvest; each SAE sees them four times"""
    arch: tuple[Architecture, ...] = ("topk",)
    """architectures: topk, batchtopk, matryoshka, relu, gated, jumprelu"""
    k: tuple[int, ...] = ()
    """active latents per row, for topk, batchtopk and matryoshka (default: 32)"""
    target_l0: tuple[float, ...] = ()
    """the same for relu, gated and jumprelu, whose mean L0 is brought there (default: k)"""
    d_sae: tuple[Count, ...] = ()
    """latents, one width or several (default: expansion × the model's width)"""
    expansion: Count = 8
    """latents per dimension of the model"""
    out: Path | None = None
    """run directory (default: runs/MODEL); the store goes to activations/ under the same name"""
    device: str | None = None
    """cuda or cpu (default: the first of these at hand)"""

    @property
    def folder(self) -> Path:
        local = Path(self.model).expanduser()
        return self.out or Path("runs") / (local.resolve() if local.is_dir() else local).name


class Stages(NamedTuple):
    """What is done one after another, each stage with settings of its own."""

    harvest: HarvestConfig
    text: TextConfig
    train: TrainConfig
    evaluate: EvalConfig
    indexed: tuple[str, ...] | None
    """names of the SAEs to index; None for all of them"""

    @property
    def out(self) -> Path:
        return self.train.out


def run(config: RunConfig) -> dict[str, Any] | None:
    """Run all stages for a model; returns the summary, or None when Ctrl-C ended it early: the same call continues.

    Before it starts, the plan is logged. Raises ValueError as the stages do.
    """
    store = Path("activations") / config.folder.resolve().name
    if manifest := begun_store(store):
        return run_stages(stages_of(config, *_as_made(config, store, manifest["identity"])))
    first = HarvestConfig(model=config.model, layers=config.layers or (0,), context=2, out=store)
    text, _ = text_of(first, TextConfig(dataset=config.dataset))
    row = _first_document(text, store).input_ids  # before a model is loaded that there is no text for
    model = open_model(first, config.device)
    told = HarvestConfig(
        model=config.model, layers=config.layers or (model.n_layers // 2,), tokens=config.tokens,
        validation_tokens=max(config.tokens // 10, 1), context=min(_CONTEXT, model.max_context) if row is None else len(row),
        device=config.device, out=store,
    )  # fmt: skip
    stages = stages_of(config, told, text)
    log.info("%s", "\n".join(plan(model, stages)))
    del model
    gc.collect()
    return run_stages(stages)


def _first_document(text: TextConfig, store: Path) -> Document:
    """Raises ValueError where the text cannot be read as it is, with the way round."""
    try:
        fingerprint(text)
        return next(open_documents(text))
    except ValueError as error:
        raise ValueError(
            f"{error}. (What `run` has no option for is one of `saebench harvest … --out {store}`; then run this again)"
        ) from error


def _as_made(config: RunConfig, store: Path, identity: dict[str, Any]) -> tuple[HarvestConfig, TextConfig]:
    """The settings of a store that is there, but for what the run says otherwise, which the harvest will refuse."""
    told, text = as_made(store, identity)
    told = dataclasses.replace(
        told, model=config.model, layers=config.layers or told.layers, tokens=config.tokens, device=config.device
    )
    return told, text if config.dataset in (None, text.dataset) else dataclasses.replace(text, dataset=config.dataset)


def stages_of(config: RunConfig, told: HarvestConfig, text: TextConfig) -> Stages:
    """The settings of each stage."""
    sparsity = config.k or (() if config.target_l0 else (_DEFAULT_K,))
    rows = EPOCHS * config.tokens
    return Stages(
        told,
        text,
        TrainConfig(
            store=told.out, hook=tuple(told.hooks), out=config.folder, arch=config.arch, k=sparsity,
            target_l0=config.target_l0 or tuple(map(float, sparsity)), d_sae=config.d_sae, expansion=config.expansion,
            tokens=rows, batch=min(max(rows // _STEPS, 256), 4096), device=config.device,
        ),
        EvalConfig(run=config.folder, tokens=min(max(config.tokens // 20, 1), _HELD_OUT), device=config.device),
        None,
    )  # fmt: skip


def run_stages(stages: Stages) -> dict[str, Any] | None:
    """Run what is not done yet; returns the summary with the seconds of each stage, or None when Ctrl-C ended it early."""
    out = stages.out
    with _clock(out, "harvest"):
        store = harvest(stages.harvest, stages.text)
    if store is None:
        return None
    with _clock(out, "train"):
        folders = train(stages.train)
    if folders is None:
        return None
    with _clock(out, "evaluate"):
        folders = evaluate(stages.evaluate)
    with _clock(out, "index"):
        for folder in folders:
            if stages.indexed is not None and folder.name not in stages.indexed:
                continue
            if build_index(IndexConfig(sae=folder, device=stages.train.device)) is None:
                return None
    return write_report(out, folders, seconds=_seconds(out))


@contextmanager
def _clock(out: Path, stage: str) -> Iterator[None]:
    """Add the time a stage takes to `seconds.json`, across interruptions."""
    started = time.monotonic()
    try:
        yield
    finally:
        out.mkdir(parents=True, exist_ok=True)
        path = out / "seconds.json"
        seconds = read_json(path) if path.exists() else {}
        write_json(path, seconds | {stage: seconds.get(stage, 0.0) + time.monotonic() - started})


def _seconds(out: Path) -> dict[str, float]:
    seconds = read_json(out / "seconds.json")
    return {**seconds, "total": sum(seconds.values())}


# ------------------------------------------------------------------------------------------ the plan


def plan(model: LanguageModel, stages: Stages) -> list[str]:
    """What a run comes to, in lines of text: rows, disk, memory, and the time by a few passes and steps tried here and now."""
    told, trained = stages.harvest, stages.train
    held_out = min(told.validation_tokens, int(told.tokens / 9))
    specs = grid(trained, model.d_model, tuple(told.hooks))
    stored = len(told.hooks) * row_bytes(settled(told, model).stored_as, model.d_model)
    disk = (told.tokens + held_out) * stored
    buffers = 2 * min(trained.rows_of_a_buffer(stored), told.tokens) * stored
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.module.parameters())
    saes = sum(8 * spec.d_sae * model.d_model * 4 for spec in specs)  # encoder and decoder, their gradients and moments
    memory = max(weights + 2**29, saes + buffers)
    seconds = _estimate(model, stages)
    each = ", ".join(f"{stage} {_duration(value)}" for stage, value in seconds.items())
    layers = ", ".join(map(str, told.layers))
    free = shutil.disk_usage(Path.cwd()).free
    return [
        f"{model.id}: layer {layers} of {model.n_layers}, {model.d_model} dimensions, in {model.dtype} on {model.device}",
        f"  rows    {told.tokens:,} for training and about {held_out:,} held out, into {told.out}",
        f"  SAEs    {len(specs)} of {', '.join(f'{n:,}' for n in dict.fromkeys(spec.d_sae for spec in specs))} latents "
        f"({', '.join(spec.name for spec in specs[:6])}{', …' if len(specs) > 6 else ''}), {trained.tokens:,} rows each, into {trained.out}",
        f"  disk    about {disk / 1e9:.1f} GB; {free / 1e9:,.0f} GB are free",
        f"  memory  about {memory / 1e9:.1f} GB",
        f"  time    about {_duration(sum(seconds.values()))}: {each} (by a short trial on this machine)",
    ]


def _estimate(model: LanguageModel, stages: Stages) -> dict[str, float]:
    """Seconds of each stage."""
    told, trained = stages.harvest, stages.train
    specs = grid(trained, model.d_model, tuple(told.hooks))
    tokens = torch.randint(model.n_vocab // 2, (_TRIED, told.context), device=model.device)
    forward = capturer(model, told.hooks)
    cut = _timed(lambda: forward(tokens, lambda name, value: None)) / tokens.numel()
    whole = _timed(lambda: last_states(model, tokens)) / tokens.numel()
    states = last_states(model, tokens[:1])[0]
    unembed = _timed(lambda: head(model, states)) / len(states)
    behind = whole * (1 - min(told.layers) / model.n_layers)
    # Each layer's SAEs are evaluated by passes of their own: one whole, and one from the hook on for each SAE and two ablations.
    arms = len(specs) + 2 * len(told.layers)
    per_token = len(told.layers) * (whole + unembed) + arms * (behind + unembed)
    device = choose_device(trained.device, float64=True)
    x = torch.randn(trained.batch, model.d_model, generator=torch.Generator().manual_seed(0)).to(device)
    training = indexing = 0.0
    for spec in specs:
        member = Member(spec, torch.zeros(model.d_model), 10**6, trained.n_steps, device)
        for _ in range(2):  # the first step of those that begin dense is none to go by
            member.step(x, 0)
        training += trained.n_steps * _timed(lambda member=member: member.step(x, 1))
        indexing += told.tokens * 3 * _timed(lambda member=member: encode_sparse(member.sae, x[:1024])) / len(x[:1024])
        del member
    return {
        "harvest": (told.tokens + told.validation_tokens) * cut,
        "train": training,
        "evaluate": stages.evaluate.tokens * per_token,
        "index": indexing,
    }


def _timed(action: Any) -> float:
    """Seconds that something takes the second time."""
    action()
    started = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _duration(seconds: float) -> str:
    return (
        f"{math.ceil(seconds)} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )

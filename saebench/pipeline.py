"""All stages for one model: harvest, train, evaluate, index, report. Whatever is done already is not done again."""

import dataclasses
import gc
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saebench.config import Count
from saebench.evaluate import EvalConfig, evaluate, write_report
from saebench.files import read_json, write_json
from saebench.harvest import HarvestConfig, harvest
from saebench.harvest.run import open_model
from saebench.harvest.settings import Kind, as_made, begun_store, text_of
from saebench.index import IndexConfig, build_index
from saebench.models import (
    EMBEDDED_MODEL,
    choose_device,
    model_path,
    parse_hook,
    same_model,
)
from saebench.plan import Stages, plan
from saebench.sae import ends_of, read_config, take_in
from saebench.sae.hub import local
from saebench.text import Document, TextConfig, fingerprint, open_documents
from saebench.train import TrainConfig, train
from saebench.train.recipes import Architecture

log = logging.getLogger(__name__)

EPOCHS = 4
"""times that an SAE sees the store's rows"""
_STEPS = 1000  # at least, unless a batch would be tiny
_HELD_OUT = 100_000  # tokens that figures are measured on, at most
_DEFAULT_K = 32
_CONTEXT = 256  # tokens, where the model takes as many


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A model from its name to the browser. Whatever else is to be set, the stages take one by one."""

    model: str = EMBEDDED_MODEL
    """a directory made by save_pretrained, a hub id, or `embedded`"""
    dataset: str | None = None
    """a file or folder (txt, md, py, jsonl, parquet, jsonl.gz), or a data set on the hub"""
    sae: tuple[str, ...] = ()
    """SAEs that exist already, to be checked, evaluated and indexed on this text instead of training: directories of any known format, hf:OWNER/REPO[@REVISION][/FOLDER], or releases by SAELens' names"""
    layers: tuple[int, ...] = ()
    """layers behind which the residual stream is kept and SAEs are trained (default: the middle one, or those of --sae)"""
    kinds: tuple[Kind, ...] = ()
    """positions in each layer: resid_pre, attn_z, attn_out, resid_mid, ln2_normalized, mlp_in, mlp_post, mlp_out, resid_post (default: resid_post, or those of --sae)"""
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

    def __post_init__(self) -> None:
        for name in ("k", "target_l0", "d_sae"):
            if self.sae and getattr(self, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)} beside --sae, which trains nothing: leave one of them out"
                )

    @property
    def folder(self) -> Path:
        local = Path(self.model).expanduser()
        return self.out or Path("runs") / (local.resolve() if local.is_dir() else local).name


def run(config: RunConfig) -> dict[str, Any] | None:
    """Run all stages for a model; returns the summary, or None when Ctrl-C ended it early: the same call continues.

    Before it starts, the plan is logged. Raises ValueError as the stages do.
    """
    choose_device(config.device)  # it trains as well, where a model has no place on several
    given = _given(config)
    if given:
        config = dataclasses.replace(config, **_places(config, given))
    store = Path("activations") / config.folder.resolve().name
    if manifest := begun_store(store):
        return run_stages(stages_of(config, *_as_made(config, store, manifest["identity"])))
    kinds = config.kinds or ("resid_post",)
    first = HarvestConfig(model=config.model, layers=config.layers or (0,), kinds=kinds, context=2, out=store)
    text, _ = text_of(first, TextConfig(dataset=config.dataset))
    row = _first_document(text, store).input_ids  # before a model is loaded that there is no text for
    model = open_model(first, config.device)
    context = min(_CONTEXT, model.max_context, *map(_context_of, given)) if row is None else len(row)
    told = HarvestConfig(
        model=config.model, layers=config.layers or (model.n_layers // 2,), kinds=kinds, tokens=config.tokens,
        validation_tokens=max(config.tokens // 10, 1), context=context, device=config.device, out=store,
    )  # fmt: skip
    stages = stages_of(config, told, text)
    log.info("%s", "\n".join(plan(model, stages)))
    del model
    gc.collect()
    return run_stages(stages)


def _given(config: RunConfig) -> list[Path]:
    """The directories, in the run's own `saes/`, of the SAEs that exist already. Raises ValueError for one of another model."""
    folders = [_given_one(source, config.folder) for source in config.sae]
    for folder in folders:
        stated = read_config(folder)["metadata"].get("model_name")
        if stated is None or same_model(stated, config.model):
            continue
        if not Path(model_path(config.model)).is_dir():
            raise ValueError(f"{folder} is of model {stated!r}, not of {config.model!r}: give its own model")
        log.warning("%s states model %r: that %s is the same one, its name does not say", folder, stated, config.model)
    return folders


def _given_one(source: str, run: Path) -> Path:
    """An SAE's directory in the run: fetched there, or taken in from where it lies."""
    folder = local(source, run)
    inside = folder.exists() and folder.resolve().parent == (run / "saes").resolve()
    return folder if inside else take_in(folder, run / "saes")


def _places(config: RunConfig, given: list[Path]) -> dict[str, Any]:
    """Layers and kinds, from the hooks of SAEs that exist already. Raises ValueError where others are asked for."""
    if config.layers or config.kinds:
        raise ValueError(
            f"layers is {config.layers} and kinds {config.kinds} beside --sae; expected neither: they follow from the SAEs"
        )
    hooks = [parse_hook(hook) for folder in given for hook in ends_of(folder, read_config(folder)).hooks]
    return {
        "layers": tuple(sorted({layer for layer, _ in hooks})),
        "kinds": tuple(dict.fromkeys(kind for _, kind in hooks)),
    }


def _context_of(sae: Path) -> int:
    """The length of context that an SAE was trained on, or the usual one where it does not say."""
    return int(read_config(sae)["metadata"].get("context_size") or _CONTEXT)


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
        told, model=config.model, layers=config.layers or told.layers, kinds=config.kinds or told.kinds,
        tokens=config.tokens, device=config.device,
    )  # fmt: skip
    return told, text if config.dataset in (None, text.dataset) else dataclasses.replace(text, dataset=config.dataset)


def stages_of(config: RunConfig, told: HarvestConfig, text: TextConfig) -> Stages:
    """The settings of each stage."""
    evaluated = EvalConfig(
        run=config.folder, store=told.out if config.sae else None, tokens=min(max(config.tokens // 20, 1), _HELD_OUT),
        device=config.device,
    )  # fmt: skip
    if config.sae:
        return Stages(told, text, None, evaluated, None)
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
        evaluated,
        None,
    )  # fmt: skip


def run_stages(stages: Stages) -> dict[str, Any] | None:
    """Run what is not done yet; returns the summary with the seconds of each stage, or None when Ctrl-C ended it early."""
    out = stages.out
    with _clock(out, "harvest"):
        store = harvest(stages.harvest, stages.text)
    if store is None:
        return None
    if stages.train is not None:
        with _clock(out, "train"):
            trained = train(stages.train)
        if trained is None:
            return None
    with _clock(out, "evaluate"):
        folders = evaluate(stages.evaluate)
    with _clock(out, "index"):
        for folder in folders:
            if stages.indexed is not None and folder.name not in stages.indexed:
                continue
            told = IndexConfig(sae=folder, store=stages.evaluate.store, device=stages.evaluate.device)
            if build_index(told, looked=True) is None:  # by the evaluation
                return None
    return write_report(out, folders, stages.evaluate.store, seconds=_seconds(out))


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

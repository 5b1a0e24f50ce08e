"""What a run of all stages comes to, said before it starts: rows, disk, memory, and the time by a short trial here and now."""

import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from saebench.evaluate import EvalConfig
from saebench.harvest import HarvestConfig
from saebench.harvest.settings import settled
from saebench.models import LanguageModel, capturer, choose_device, head, last_states, widths_of
from saebench.sae import SAE, encode_sparse, load_sae, read_config
from saebench.sae.formats import CONFIG
from saebench.store.coding import row_bytes
from saebench.text import TextConfig
from saebench.train import TrainConfig
from saebench.train.member import Member
from saebench.train.settings import grid
from saebench.train.spec import Spec

_TRIED = 4  # contexts whose passes are timed


class Stages(NamedTuple):
    """What is done one after another, each stage with settings of its own."""

    harvest: HarvestConfig
    text: TextConfig
    train: TrainConfig | None
    """None for SAEs that exist already"""
    evaluate: EvalConfig
    indexed: tuple[str, ...] | None
    """names of the SAEs to index; None for all of them"""

    @property
    def out(self) -> Path:
        return self.evaluate.run


def plan(model: LanguageModel, stages: Stages) -> list[str]:
    """What a run comes to, in lines of text."""
    told, trained = stages.harvest, stages.train
    held_out = min(told.validation_tokens, int(told.tokens / 9))
    stored = _stored(model, told)
    disk = (told.tokens + held_out) * stored
    if trained is None:
        names = {folder.name: read_config(folder)["d_sae"] for folder in _saes_of(stages.out)}
        rows = "there already"
    else:
        names = {spec.name: spec.d_sae for spec in _specs(model, stages)}
        rows = f"{trained.tokens:,} rows each, into {trained.out}"
    widths, memory = list(names.values()), memory_of(model, stages)
    seconds = _estimate(model, stages)
    each = ", ".join(f"{stage} {_duration(value)}" for stage, value in seconds.items())
    layers = ", ".join(map(str, told.layers))
    free = shutil.disk_usage(Path.cwd()).free
    return [
        f"{model.id}: layer {layers} of {model.n_layers}, {model.d_model} dimensions, in {model.dtype} on {model.device}",
        f"  rows    {told.tokens:,} for training and about {held_out:,} held out, into {told.out}",
        f"  SAEs    {len(widths)} of {', '.join(f'{n:,}' for n in dict.fromkeys(widths))} latents "
        f"({', '.join([*names][:6])}{', …' if len(names) > 6 else ''}), {rows}",
        f"  disk    about {disk / 1e9:.1f} GB; {free / 1e9:,.0f} GB are free",
        f"  memory  about {memory / 1e9:.1f} GB",
        f"  time    about {_duration(sum(seconds.values()))}: {each} (by a short trial on this machine)",
    ]


def memory_of(model: LanguageModel, stages: Stages) -> int:
    """Bytes that a run takes at once, about: the model in a pass, or the SAEs in training and the rows shuffled for them."""
    told, trained = stages.harvest, stages.train
    running = 2**29 + sum(parameter.numel() * parameter.element_size() for parameter in model.module.parameters())
    if trained is None:
        saes = [read_config(folder) for folder in _saes_of(stages.out)]
        return running + max(4 * sae["d_sae"] * (sae["d_in"] + sae.get("d_out", sae["d_in"])) for sae in saes)
    stored, width = _stored(model, told), widths_of(model, told.hooks)
    buffers = 2 * min(trained.rows_of_a_buffer(stored), told.tokens) * stored
    # encoder and decoder, their gradients and moments
    return max(running, buffers + sum(8 * spec.d_sae * width[spec.hook] * 4 for spec in _specs(model, stages)))


def _stored(model: LanguageModel, told: HarvestConfig) -> int:
    """Bytes of a store's row, of all hooks."""
    dtype = settled(told, model).stored_as
    return sum(row_bytes(dtype, width) for width in widths_of(model, told.hooks).values())


def _specs(model: LanguageModel, stages: Stages) -> list[Spec]:
    """The SAEs that will be trained; as in training, their width follows from that of the first hook."""
    assert stages.train is not None
    hooks = stages.harvest.hooks
    return grid(stages.train, widths_of(model, hooks)[hooks[0]], tuple(hooks))


def _saes_of(run: Path) -> list[Path]:
    return [path.parent for path in sorted((run / "saes").glob(f"*/{CONFIG}"))]


def _estimate(model: LanguageModel, stages: Stages) -> dict[str, float]:
    """Seconds of each stage."""
    told, trained = stages.harvest, stages.train
    tokens = torch.randint(model.n_vocab // 2, (_TRIED, told.context), device=model.device)
    forward = capturer(model, told.hooks)
    cut = _timed(lambda: forward(tokens, lambda name, value: None)) / tokens.numel()
    whole = _timed(lambda: last_states(model, tokens)) / tokens.numel()
    states = last_states(model, tokens[:1])[0]
    unembed = _timed(lambda: head(model, states)) / len(states)
    behind = whole * (1 - min(told.layers) / model.n_layers)
    device = choose_device(stages.evaluate.device, float64=True)
    n_saes, training, indexing = 0, 0.0, 0.0
    for sae, steps in _tried(stages, model, device):
        x = torch.randn(1024, sae.d_in, generator=torch.Generator().manual_seed(0)).to(device)
        n_saes, training = n_saes + 1, training + steps
        indexing += told.tokens * 3 * _timed(lambda sae=sae, x=x: encode_sparse(sae, x)) / len(x)
    # Each layer's SAEs are evaluated by passes of their own: one whole, and one from the hook on for each SAE and two ablations.
    arms = n_saes + 2 * len(told.layers)
    per_token = len(told.layers) * (whole + unembed) + arms * (behind + unembed)
    seconds = {"harvest": (told.tokens + told.validation_tokens) * cut, "train": training}
    seconds |= {"evaluate": stages.evaluate.tokens * per_token, "index": indexing}
    return seconds if trained is not None else {name: value for name, value in seconds.items() if name != "train"}


def _tried(stages: Stages, model: LanguageModel, device: str) -> Iterator[tuple[SAE, float]]:
    """(an SAE, the seconds that its training takes) of each that there will be."""
    trained = stages.train
    if trained is None:
        yield from ((load_sae(folder, device=device), 0.0) for folder in _saes_of(stages.out))
        return
    width = widths_of(model, stages.harvest.hooks)
    for spec in _specs(model, stages):
        d_in = width[spec.hook]
        x = torch.randn(trained.batch, d_in, generator=torch.Generator().manual_seed(0)).to(device)
        member = Member(spec, torch.zeros(d_in), 10**6, trained.n_steps, device)
        for _ in range(2):  # the first step of those that begin dense is none to go by
            member.step(x, 0)
        yield member.sae, trained.n_steps * _timed(lambda member=member, x=x: member.step(x, 1))


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

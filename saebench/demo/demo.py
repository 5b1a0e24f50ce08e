"""The whole pipeline on the embedded default: harvest two layers, train six SAEs, evaluate and report, index one."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saebench.evaluate import EvalConfig, evaluate, write_report
from saebench.files import read_json, write_json
from saebench.harvest import HarvestConfig, harvest
from saebench.index import IndexConfig, build_index
from saebench.text import TextConfig
from saebench.train import TrainConfig, train

STORE = Path("activations/demo")
HOOK = "blocks.2.hook_resid_post"
INDEXED = "topk-k48"


def run_demo(out: Path) -> dict[str, Any] | None:
    """Run what is not done yet; returns the summary, or None when Ctrl-C ended it early."""
    with _clock(out, "harvest"):
        store = harvest(
            HarvestConfig(layers=(1, 2), tokens=1_050_000, validation_tokens=100_000, out=STORE), TextConfig()
        )
    if store is None:
        return None
    with _clock(out, "train"):
        folders = train(
            TrainConfig(
                store=STORE, hook=(HOOK,), out=out, arch=("relu", "topk", "gated"), target_l0=(16.0, 48.0),
                d_sae=(2048,), tokens=1_050_000, batch=1024,
            )
        )  # fmt: skip
    if folders is None:
        return None
    with _clock(out, "evaluate"):
        folders = evaluate(EvalConfig(run=out))
    with _clock(out, "index"):
        index = build_index(IndexConfig(sae=out / "saes" / INDEXED))
    if index is None:
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

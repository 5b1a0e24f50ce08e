"""The run of the embedded default: harvest two layers, train six SAEs on one of them, index one."""

from pathlib import Path

from saebench.evaluate import EvalConfig
from saebench.harvest import HarvestConfig
from saebench.plan import Stages
from saebench.text import TextConfig
from saebench.train import TrainConfig

STORE = Path("activations/demo")
HOOK = "blocks.2.hook_resid_post"
INDEXED = "topk-k48"


def stages(out: Path) -> Stages:
    """Its settings, with the run directory `out`."""
    return Stages(
        HarvestConfig(layers=(1, 2), tokens=1_050_000, validation_tokens=100_000, out=STORE),
        TextConfig(),
        TrainConfig(
            store=STORE, hook=(HOOK,), out=out, arch=("relu", "topk", "gated"), target_l0=(16.0, 48.0), d_sae=(2048,),
            tokens=1_050_000, batch=1024,
        ),
        EvalConfig(run=out),
        (INDEXED,),
    )  # fmt: skip

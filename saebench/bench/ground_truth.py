"""`saebench bench synthetic`: architectures trained on data whose features are known, and what they recover of them.

Controls: `oracle` has the true directions and coefficients of as many of the most frequent features as there are latents; `untrained`
is a TopK SAE as training begins it, with the one factor that reconstructs best. Suffixes: B rows, D dimension.
"""

import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saebench.bench.recovery import recovery_of_oracle, recovery_of_sae
from saebench.bench.results import Figure, Results, over_units
from saebench.bench.synthetic import SIZES, Synthetic, SyntheticSettings
from saebench.config import Count
from saebench.models import choose_device
from saebench.runlog import interruptible, progress
from saebench.sae import SAE, fold, initialise, new_sae
from saebench.train import Member, Spec
from saebench.train.checkpoint import Checkpoint
from saebench.train.clock import Clock
from saebench.train.recipes import RECIPES, Architecture
from saebench.train.settings import dead_steps_of, schedule_of

_log = logging.getLogger(__name__)
_SCALE_ROWS = 8192
_SCALE_SEED, _EVAL_SEED = 2_000_003, 1_000_003
_VERSION = 1
SHOWN = ("f1", "mcc", "uniqueness", "explained_variance", "signed_mcc", "matched_f1", "rare_f1", "l0", "dead")


class Preset(NamedTuple):
    """What decides a version of the bench, but for the data."""

    data: SyntheticSettings
    d_sae: int
    samples: int
    l0: int
    eval_samples: int


PRESETS = {
    "mini": Preset(SIZES["mini"], 512, 5_000_000, 6, 100_000),
    "16k": Preset(SIZES["16k"], 4096, 200_000_000, 25, 500_000),
}
PUBLISHED: dict[int, dict[str, dict[str, float]]] = {
    25: {
        "batchtopk": {"f1": 0.732, "mcc": 0.757, "uniqueness": 0.984, "explained_variance": 0.792},
        "matryoshka": {"f1": 0.879, "mcc": 0.793, "uniqueness": 0.999, "explained_variance": 0.779},
        "jumprelu": {"f1": 0.732, "mcc": 0.753, "uniqueness": 0.989, "explained_variance": 0.795},
        "relu": {"f1": 0.556, "mcc": 0.604, "uniqueness": 0.898, "explained_variance": 0.765},
    },
    20: {
        "batchtopk": {"f1": 0.818, "mcc": 0.753},
        "jumprelu": {"f1": 0.824, "mcc": 0.743},
        "relu": {"f1": 0.578, "mcc": 0.583},
    },
}
"""SynthSAEBench-16k, by L0 (arXiv 2602.14687; width 4,096, 200M samples)"""


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Which data, and which architectures are trained on it."""

    out: Path
    """run directory; figures go to OUT/bench/synthetic.json"""
    preset: Literal["mini", "16k"] = "mini"
    """mini: 1,024 features in 128 dimensions, minutes on a CPU; 16k: SynthSAEBench-16k, for a GPU"""
    arch: tuple[Architecture, ...] = ("relu", "topk", "gated", "batchtopk", "jumprelu", "matryoshka")
    """architectures; all of a seed see the same batches"""
    l0: int | None = None
    """latents per row to aim at (default: 6 of mini, 25 of 16k)"""
    samples: Count | None = None
    """training rows (default: 5M of mini, 200M of 16k)"""
    eval_samples: Count | None = None
    """fresh rows to score on (default: 100k of mini, 500k of 16k)"""
    batch: Count = 1024
    """rows in a step"""
    lr: float | None = None
    """peak learning rate (default: that of `saebench train`)"""
    seed: tuple[int, ...] = (0,)
    """of weights and samples, several for intervals; the data's features stay"""
    device: str | None = None
    """cuda or cpu (default: cuda where it is at hand)"""

    def __post_init__(self) -> None:
        if not self.arch:
            raise ValueError(f"arch is empty; expected one or more of {', '.join(RECIPES)}")
        for name, least in (("l0", 1), ("samples", self.batch), ("eval_samples", 1), ("batch", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; expected at least {least}")

    @property
    def settled(self) -> Preset:
        """The preset, with what is given instead."""
        given = {name: getattr(self, name) for name in ("l0", "samples", "eval_samples") if getattr(self, name)}
        return PRESETS[self.preset]._replace(**given)


def bench_synthetic(config: SyntheticConfig, data: Synthetic | None = None) -> list[Figure]:
    """Train what is not trained yet, score it, and return a figure for each architecture, control and score: means over seeds.

    A seed's architectures are trained at once, and go on from a checkpoint under OUT/bench. Intervals are 95%, Student's over three or more
    seeds; of fewer there are none. Raises ValueError for one whose loss stopped being finite, KeyboardInterrupt on Ctrl-C.
    """
    preset = config.settled
    device = choose_device(config.device, float64=True)
    data = data or Synthetic(preset.data, device)
    results = Results(config.out / "bench" / "synthetic.json", "synthetic")
    found: list[list[Figure]] = []
    for seed in config.seed:
        specs = [_spec(config, preset, arch, seed) for arch in config.arch]
        units = {spec.name: _identity(config, preset, spec) for spec in specs}
        known = {name: results.get(name, identity) for name, identity in units.items()}
        todo = [spec for spec in specs if known[spec.name] is None]
        if todo:
            for member in _trained(config, preset, data, todo, units, seed):
                name, sae = member.spec.name, member.sae
                scores = recovery_of_sae(sae, data, preset.eval_samples, _generator(data, _EVAL_SEED))
                known[name] = results.put(name, units[name], _figures(member.spec.architecture, preset, scores))
        found += [figures for spec in specs if (figures := known[spec.name])]
        found.append(_control(results, config, preset, data, "untrained", seed))
    found.append(_control(results, config, preset, data, "oracle", None))
    return [*_over_seeds(found), *_published(config, preset)]


def _spec(config: SyntheticConfig, preset: Preset, arch: Architecture, seed: int) -> Spec:
    sparsity: dict[str, Any] = {"k": preset.l0} if RECIPES[arch].takes_k else {"target_l0": float(preset.l0)}
    name = f"{config.preset}-{arch}-l0-{preset.l0}-seed{seed}"
    schedule = schedule_of(arch, preset.data.d_in, preset.d_sae, preset.samples // config.batch, config.lr)
    return Spec(name=name, architecture=arch, d_sae=preset.d_sae, seed=seed, **schedule, **sparsity)


def _identity(config: SyntheticConfig, preset: Preset, spec: Spec | None) -> dict[str, Any]:
    own = {} if spec is None else spec.to_json() | {"samples": preset.samples, "batch": config.batch}
    data = asdict(preset.data) | {
        "mean_coefficients": list(preset.data.mean_coefficients),
        "std_coefficients": list(preset.data.std_coefficients),
    }
    return {"version": _VERSION, "data": data, "eval_samples": preset.eval_samples, **own}


def _generator(data: Synthetic, seed: int) -> torch.Generator:
    return torch.Generator(data.device).manual_seed(seed)


def _scale_and_mean(data: Synthetic) -> tuple[float, Float[Tensor, " D"], Float[Tensor, "B D"]]:
    """(factor to E‖x‖² = D, mean of rows so scaled, some of these)."""
    x_BD = data.sample(_SCALE_ROWS, _generator(data, _SCALE_SEED)).x
    scale = math.sqrt(data.settings.d_in / float(x_BD.pow(2).sum(1).mean()))
    return scale, (x_BD.mean(0) * scale).cpu(), x_BD * scale


def _trained(
    config: SyntheticConfig, preset: Preset, data: Synthetic, specs: list[Spec], units: dict[str, Any], seed: int
) -> list[Member]:
    """The members, trained on the same batches: batch n of a seed is always the same."""
    n_steps = preset.samples // config.batch
    scale, mean_D, _ = _scale_and_mean(data)
    dead = [dead_steps_of(spec, n_steps * config.batch, config.batch) for spec in specs]
    members = [Member(spec, mean_D, steps, n_steps, data.device) for spec, steps in zip(specs, dead, strict=True)]
    folder = config.out / "bench" / f"synthetic-{config.preset}-seed{seed}"
    checkpoint = Checkpoint(folder, {spec.name: units[spec.name] for spec in specs})
    first, _, seconds = checkpoint.restore(members)
    clock = Clock(seconds, first * config.batch)
    about = f"train {len(specs)} on synthetic {config.preset}, seed {seed}"
    with interruptible() as interrupt, progress(n_steps * config.batch, about, "row", first * config.batch) as bar:
        for step in range(first, n_steps):
            x_BD = data.sample(config.batch, _generator(data, seed * 1_000_000_007 + step)).x * scale
            for member in members:
                member.step(x_BD, step)
            bar.update(config.batch)
            if clock.save_is_due or interrupt.requested:
                with clock.saving():
                    checkpoint.save(members, step + 1, {}, clock.total)
            if interrupt.requested:
                _log.warning("stopped after step %d of %d; the same command continues", step + 1, n_steps)
                raise KeyboardInterrupt
    for member in members:
        if member.diverged is not None:
            raise ValueError(
                f"the loss of {member.spec.name} was no longer finite at step {member.diverged + 1}: lower --lr"
            )
        fold(member.sae, scale)
    checkpoint.remove()
    return members


@torch.no_grad()
def _untrained(preset: Preset, data: Synthetic, seed: int) -> SAE:
    """A TopK SAE as training begins it, its reconstruction scaled to fit some rows best."""
    scale, mean_D, x_BD = _scale_and_mean(data)
    sae = new_sae("topk", len(mean_D), preset.d_sae, k=preset.l0)
    initialise(sae, mean_D, torch.Generator().manual_seed(seed))
    sae.to(x_BD.device)
    decoded_BD, wanted_BD = sae(x_BD).x_hat - sae.b_dec, x_BD - sae.b_dec
    sae.W_dec *= (decoded_BD * wanted_BD).sum() / decoded_BD.pow(2).sum()
    fold(sae, scale)
    return sae


def _control(
    results: Results, config: SyntheticConfig, preset: Preset, data: Synthetic, kind: str, seed: int | None
) -> list[Figure]:
    unit = f"{config.preset}-{kind}-l0-{preset.l0}" + ("" if seed is None else f"-seed{seed}")
    identity = _identity(config, preset, None) | {"control": kind, "seed": seed, "d_sae": preset.d_sae, "l0": preset.l0}
    if (known := results.get(unit, identity)) is not None:
        return known
    rng = _generator(data, _EVAL_SEED)
    if seed is None:
        scores = recovery_of_oracle(data, preset.d_sae, preset.eval_samples, rng)
    else:
        scores = recovery_of_sae(_untrained(preset, data, seed), data, preset.eval_samples, rng)
    return results.put(unit, identity, _figures(kind, preset, scores))


def _figures(name: str, preset: Preset, scores: dict[str, float]) -> list[Figure]:
    return [Figure(name, "synthetic", figure, None, value, n=preset.eval_samples) for figure, value in scores.items()]


def _over_seeds(found: list[list[Figure]]) -> list[Figure]:
    """Of each architecture and control what is worth a table; n counts the seeds."""
    return over_units([figure for figures in found for figure in figures if figure.figure in SHOWN])


def _published(config: SyntheticConfig, preset: Preset) -> list[Figure]:
    rows = PUBLISHED.get(preset.l0, {}) if config.preset == "16k" else {}
    return [
        Figure(f"{arch} (published)", "synthetic", name, None, value)
        for arch, scores in rows.items()
        for name, value in scores.items()
    ]

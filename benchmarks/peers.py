"""Other packages' training: the time of their step, and SAEs trained by their own recipe.

Run it with the Python of an environment that has the peers (`pip install sae-lens eai-sparsify
dictionary-learning`); it needs nothing of saebench. X.npy holds activations `[rows, d_in]`, shuffled.

    python benchmarks/peers.py step --data X.npy --arch topk gated --f 8192 --batch 4096 --k 32 --steps 6
    python benchmarks/peers.py train --data X.npy --package saelens --arch relu --l1 5 --f 8192 --tokens 10_000_000 --out SAE

Both drive each package's own training loop (`SAETrainer.fit`, sparsify's `Trainer.fit`, `trainSAE`), fed
from the file, so that a step has all that theirs has: forward, backward, clipping, optimizer, projection,
bookkeeping; logging to a server is off. float32, on the CPU unless `train` is given `--device cuda`.

`step` prints a JSON line per package and architecture. A step's time is that between two batches being
asked for, a median without the first; no latent is dead yet, so no AuxK is in it. The relu, gated and
jumprelu steps of the peers are dense: what they cost does not depend on L0. `fvu` and `l0` are those of the last
batch after these few steps, to show that something was trained. `gemm_ms` is x @ W alone, in the same process.

`train` writes an SAE directory in SAELens' layout and recomputes reconstructions from the file; they must
agree with those of the package's own saved SAE. It prints a JSON line, with FVU and L0 of `--held-out` rows where
those are given. `--scale` multiplies rows as they are read and is folded into the file's weights again.

`serve` does many of these in one process: a JSON list of `train`'s arguments a line on stdin, a JSON line each on stdout.

Recipes: the defaults of each package, read in its source at these versions. A dash: it has none.

                    SAELens 6.54            sparsify 1.3             dictionary_learning 0.1
    architectures   all six                 topk                     all six (relu: the April update's trainer)
    optimizer       Adam                    sign SGD, schedule-free, Adam; β₁ = 0 for gated, jumprelu
                                            momentum 0.95
    lr              3e-4                    5e-3/√(F/2¹⁴)            top-k family 2e-4/√(F/2¹⁴), relu 1e-3,
                                                                     gated 5e-5, jumprelu 7e-5
    lr warm-up      0                       -                        1,000 steps (*)
    lr decay        0                       -                        0
    sparsity        1.0; quadratic towards  -                        0.1 (jumprelu: 1.0 towards target L0 20)
                    --target-l0 if given
    ... warm-up     0                       -                        2,000 steps (*)
    AuxK            1.0, dead: 1,000 steps  0                        1/32, dead: 10M tokens
    clipping        1.0                     -                        1.0 (gated: none)
    decoder         free, starts at 0.1     unit rows                unit rows (relu: free, starts at 0.1)
    b_dec           0                       first batch's mean       0; top-k family: the first batch's geometric
                                                                     median
    input scale     E‖x‖ = √D               -                        E‖x‖² = 1
    jumprelu        θ from 0.01, ε = 0.05   -                        θ from 0.001, ε = 0.001
    inference θ     EMA, rate 0.01          -                        EMA, rate 0.001, from step 1,000 (*)

The input scale is what the package offers; `--normalize none` leaves it off, which is what its
constructors do when nothing is said. (*) shortened in short runs, which the package would refuse or leave
unfinished: to at most 5% of the steps, sparsity 10%, θ from half way. Matryoshka has no default groups: the nested
prefixes end at 1/32, 3/32, 7/32, 15/32 and all of F for both packages.
"""

import argparse
import contextlib
import functools
import gc
import importlib.metadata
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

DISTRIBUTIONS = {"saelens": "sae-lens", "sparsify": "eai-sparsify", "dictionary_learning": "dictionary-learning"}
ARCHITECTURES = ("relu", "topk", "gated", "batchtopk", "jumprelu", "matryoshka")
TOP_K = ("topk", "batchtopk", "matryoshka")
GROUPS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One SAE to train. None stands for the package's default."""

    arch: str
    d_in: int
    d_sae: int
    batch: int
    steps: int
    k: int
    l1: float | None = None
    target_l0: float | None = None
    lr: float | None = None
    decay: float = 0.0
    """Part of the steps, at the end, in which the learning rate falls to 0."""
    normalize: bool = False
    seed: int = 0
    timed: bool = False
    """Only a few steps, for the clock: warm-ups are over from the start."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"batch is {self.batch}, more than the tokens; expected at least one batch")
        if self.l1 is not None and self.arch in TOP_K:
            raise ValueError(f"l1 is {self.l1}, but {self.arch} has no sparsity coefficient; set k")
        if self.target_l0 is not None and self.arch != "jumprelu":
            raise ValueError(f"target_l0 is {self.target_l0}, but only jumprelu trains towards one; set k or l1")


@dataclass
class Rows:
    """Batches of a file's rows in its order, from the start again at its end; notes when each was asked for."""

    x: Tensor
    job: Job
    scale: float = 1.0
    clock: list[float] = field(default_factory=list)

    def __iter__(self) -> Iterator[Tensor]:
        for index in itertools.count():
            yield self.take(self.indices(index))

    def indices(self, batch: int) -> Tensor:
        return torch.arange(batch * self.job.batch, (batch + 1) * self.job.batch, device=self.x.device) % len(self.x)

    def take(self, indices: Tensor) -> Tensor:
        self.clock.append(time.perf_counter())
        return self.x[indices].float() * self.scale


class Trained(NamedTuple):
    """An SAE as the package's own file gives it, in SAELens' names."""

    architecture: str
    tensors: dict[str, Tensor]
    reconstruct: Callable[[Tensor], Tensor]
    recipe: dict[str, Any]
    apply_b_dec_to_input: bool = True


def given(**values: Any) -> dict[str, Any]:
    """Arguments without those that are left to the package."""
    return {name: value for name, value in values.items() if value is not None}


# --- SAELens -------------------------------------------------------------------------------------


def train_saelens(job: Job, rows: Rows) -> Trained:
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]
    from sae_lens.config import LoggingConfig, SAETrainerConfig  # pyright: ignore[reportMissingImports]
    from sae_lens.registry import get_sae_training_class  # pyright: ignore[reportMissingImports]
    from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore[reportMissingImports]

    torch.manual_seed(job.seed)
    sae_class, config_class = get_sae_training_class(
        {"relu": "standard", "matryoshka": "matryoshka_batchtopk"}.get(job.arch, job.arch)
    )
    normalize = "expected_average_only_in" if job.normalize else "none"
    options = saelens_options(job) | {"normalize_activations": normalize}
    sae = sae_class(config_class(d_in=job.d_in, d_sae=job.d_sae, device=job.device, **options))
    lr = 3e-4 if job.lr is None else job.lr
    config = SAETrainerConfig(
        total_training_samples=job.steps * job.batch,
        train_batch_size_samples=job.batch,
        lr=lr,
        lr_end=lr / 10,
        lr_decay_steps=round(job.decay * job.steps),
        device=job.device,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=iter(rows))
    if job.normalize:  # from its own pass over the rows: training then starts at the first, as in every package
        passes = min(config.n_batches_for_norm_estimate, max(1, len(rows.x) // job.batch))
        trainer.activation_scaler.estimate_scaling_factor(job.d_in, iter(rows), passes)
    trainer.fit()
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        saved = SAE.load_from_disk(folder, device=job.device)
    tensors = {name: value.detach() for name, value in saved.state_dict().items()}
    return Trained(saved.cfg.architecture(), tensors, saved, options | {"lr": lr, "decay": job.decay})


def saelens_options(job: Job) -> dict[str, Any]:
    if job.arch in ("relu", "gated"):
        return given(l1_coefficient=job.l1)
    if job.arch == "jumprelu":
        mode = None if job.target_l0 is None else "quadratic"
        return given(l0_coefficient=job.l1, target_l0=job.target_l0, jumprelu_sparsity_loss_mode=mode)
    widths = np.cumsum([int(part * job.d_sae) for part in GROUPS[:-1]]).tolist()
    return {"k": job.k} | ({"matryoshka_widths": [*widths, job.d_sae]} if job.arch == "matryoshka" else {})


# --- sparsify ------------------------------------------------------------------------------------


class RowSource(nn.Module):
    """Stands where sparsify expects a language model: its one module gives the rows that the "tokens" number."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.source, self.rows, self.device = rows, nn.Identity(), torch.device(rows.job.device)
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long, device=self.device)}

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.rows(self.source.take(input_ids))


def train_sparsify(job: Job, rows: Rows) -> Trained:
    from sparsify import Sae, SaeConfig, TrainConfig, Trainer  # pyright: ignore[reportMissingImports]

    if job.decay or job.normalize:
        raise ValueError("sparsify trains without schedule and without input scale; leave --decay at 0")
    dataset = [{"input_ids": rows.indices(step)} for step in range(job.steps)]
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            SaeConfig(num_latents=job.d_sae, k=job.k),
            batch_size=1,  # in sequences; one has a batch's tokens
            lr=job.lr,
            hookpoints=["rows"],
            init_seeds=[job.seed],
            save_every=job.steps + 2,
            log_to_wandb=False,
            save_dir=folder,
        )
        trainer = Trainer(config, dataset, RowSource(rows))
        rows.clock.clear()  # the trainer has run the model to learn its width
        trainer.fit()
        saved = Sae.load_from_disk(f"{folder}/unnamed/rows", device=job.device)
    tensors = {
        "W_enc": saved.encoder.weight.T,
        "b_enc": saved.encoder.bias,
        "W_dec": saved.W_dec,
        "b_dec": saved.b_dec,
    }
    recipe = {"optimizer": config.optimizer, "lr": job.lr or 5e-3 / (job.d_sae / 2**14) ** 0.5, "k": job.k}
    return Trained("topk", tensors, lambda x: saved(x).sae_out, recipe)


# --- dictionary_learning -------------------------------------------------------------------------

_NAMES = {
    **{name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "r_mag")},
    **{"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "bias": "b_dec"},
    **{"gate_bias": "b_gate", "mag_bias": "b_mag", "decoder_bias": "b_dec"},
}


def train_dictionary_learning(job: Job, rows: Rows) -> Trained:
    from dictionary_learning.dictionary import (  # pyright: ignore[reportMissingImports]
        AutoEncoder,
        GatedAutoEncoder,
        JumpReluAutoEncoder,
    )
    from dictionary_learning.trainers import (  # pyright: ignore[reportMissingImports]
        batch_top_k,
        gdm,
        jumprelu,
        matryoshka_batch_top_k,
        standard,
        top_k,
    )
    from dictionary_learning.training import trainSAE  # pyright: ignore[reportMissingImports]

    trainer, sae_class = {
        "relu": (standard.StandardTrainerAprilUpdate, AutoEncoder),
        "topk": (top_k.TopKTrainer, top_k.AutoEncoderTopK),
        "gated": (gdm.GatedSAETrainer, GatedAutoEncoder),
        "batchtopk": (batch_top_k.BatchTopKTrainer, batch_top_k.BatchTopKSAE),
        "jumprelu": (jumprelu.JumpReluTrainer, JumpReluAutoEncoder),
        "matryoshka": (
            matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer,
            matryoshka_batch_top_k.MatryoshkaBatchTopKSAE,
        ),
    }[job.arch]
    torch.manual_seed(job.seed)  # the JumpReLU trainer ignores its seed
    options = dictionary_learning_options(job)
    fixed = {"trainer": trainer, "activation_dim": job.d_in, "dict_size": job.d_sae, "layer": 0, "lm_name": "none"}
    with tempfile.TemporaryDirectory() as folder:
        trainSAE(
            data=rows,
            trainer_configs=[fixed | options | {"steps": job.steps, "seed": job.seed, "device": job.device}],
            steps=job.steps,
            save_dir=folder,
            normalize_activations=job.normalize,
            device=job.device,
        )
        keep_norms = {"normalize_decoder": False} if job.arch == "relu" else {}
        saved = sae_class.from_pretrained(f"{folder}/trainer_0/ae.pt", device=job.device, **keep_norms)
    architecture = {"relu": "standard", "topk": "topk", "gated": "gated"}.get(job.arch, "jumprelu")
    tensors = dictionary_learning_tensors(saved, architecture)
    recipe = options | {"normalize_activations": job.normalize}
    return Trained(architecture, tensors, saved, recipe, apply_b_dec_to_input=job.arch != "jumprelu")


def dictionary_learning_options(job: Job) -> dict[str, Any]:
    def at_most(default: int, part: float) -> int:
        return 0 if job.timed else min(default, int(part * job.steps))

    decay_start = round((1 - job.decay) * job.steps) if job.decay else None
    options = {"warmup_steps": at_most(1000, 0.05)} | given(lr=job.lr, decay_start=decay_start)
    if job.arch in TOP_K:
        options |= {"k": job.k, "threshold_start_step": at_most(1000, 0.5)}
        return options | ({"group_fractions": list(GROUPS)} if job.arch == "matryoshka" else {})
    options |= {"sparsity_warmup_steps": at_most(2000, 0.1)}
    if job.arch == "jumprelu":
        return options | given(sparsity_penalty=job.l1, target_l0=job.target_l0)
    return options | given(l1_penalty=job.l1)


def dictionary_learning_tensors(saved: nn.Module, architecture: str) -> dict[str, Tensor]:
    """Tensors of a saved dictionary; `nn.Linear` holds its weights transposed."""
    state = saved.state_dict()
    tensors = {
        ours: state[theirs].T if theirs.endswith("weight") else state[theirs]
        for theirs, ours in _NAMES.items()
        if theirs in state
    }
    if architecture == "jumprelu":  # the top-k family has one threshold for all latents
        tensors["threshold"] = state["threshold"].expand(len(tensors["b_enc"]))
    return tensors


PACKAGES: dict[str, tuple[Callable[[Job, Rows], Trained], tuple[str, ...]]] = {
    "saelens": (train_saelens, ARCHITECTURES),
    "sparsify": (train_sparsify, ("topk",)),
    "dictionary_learning": (train_dictionary_learning, ARCHITECTURES),
}


# --- from tensors: activations, the file, the check --------------------------------------------------


def activations(x_BD: Tensor, architecture: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    """Activations [B, F] by plain arithmetic. `batchtopk` is that rule in training, over the rows given."""
    z_BD = x_BD - tensors["b_dec"] if config["apply_b_dec_to_input"] else x_BD
    h_BF = z_BD @ tensors["W_enc"]
    if architecture == "gated":
        gate_BF = h_BF + tensors["b_gate"] > 0
        return gate_BF * torch.relu(h_BF * tensors["r_mag"].exp() + tensors["b_mag"])
    h_BF = h_BF + tensors["b_enc"]
    if architecture == "jumprelu":
        return torch.relu(h_BF) * (h_BF > tensors["threshold"])
    if architecture == "topk":
        values, indices = h_BF.topk(config["k"], dim=-1)
        return torch.zeros_like(h_BF).scatter(-1, indices, values.relu())
    if architecture == "batchtopk":
        values, indices = h_BF.flatten().topk(config["k"] * len(h_BF))
        return torch.zeros_like(h_BF).flatten().scatter(0, indices, values.relu()).view_as(h_BF)
    return torch.relu(h_BF)


def quality(x_BD: Tensor, acts_BF: Tensor, tensors: dict[str, Tensor]) -> dict[str, float]:
    residual = x_BD - (acts_BF @ tensors["W_dec"] + tensors["b_dec"])
    fvu = residual.pow(2).sum() / (x_BD - x_BD.mean(0)).pow(2).sum()
    return {"fvu": round(fvu.item(), 4), "l0": round((acts_BF > 0).sum(1).float().mean().item(), 2)}


def held_out(x_BD: Tensor, architecture: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, float]:
    """FVU, L0 and the share of latents that fire on none of these rows, 4,096 rows at a time."""
    error = active = 0.0
    fires_F = torch.zeros(config["d_sae"], dtype=torch.bool, device=x_BD.device)
    for part_BD in x_BD.split(4096):
        acts_BF = activations(part_BD, architecture, config, tensors)
        error += (part_BD - (acts_BF @ tensors["W_dec"] + tensors["b_dec"])).double().pow(2).sum().item()
        active += (acts_BF > 0).sum().item()
        fires_F |= (acts_BF > 0).any(0)
    variance = (x_BD - x_BD.mean(0)).double().pow(2).sum().item()
    dead = 1 - fires_F.float().mean().item()
    return {"fvu": round(error / variance, 5), "l0": round(active / len(x_BD), 3), "dead": round(dead, 4)}


def config_of(trained: Trained, job: Job, metadata: dict[str, Any]) -> dict[str, Any]:
    config = {
        "architecture": trained.architecture,
        "d_in": job.d_in,
        "d_sae": job.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": trained.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.0.0", **metadata},
    }
    return config | ({"k": job.k, "rescale_acts_by_decoder_norm": False} if trained.architecture == "topk" else {})


def save(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights, described = folder / "sae_weights.safetensors", folder / "cfg.json"
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, f"{weights}.tmp")
    os.replace(f"{weights}.tmp", weights)
    Path(f"{described}.tmp").write_text(json.dumps(config, indent=2) + "\n")
    os.replace(f"{described}.tmp", described)


def mismatch(folder: Path, x_BD: Tensor, reconstruct: Callable[[Tensor], Tensor]) -> float:
    """Relative distance between the file's reconstructions and the package's own, for the worst row but 1%.

    (Where rounding puts a pre-activation on the other side of its threshold, a row may differ by a latent.)
    """
    config, tensors = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    acts_BF = activations(x_BD, config["architecture"], config, tensors)
    own_BD = reconstruct(x_BD)
    error_B = (acts_BF @ tensors["W_dec"] + tensors["b_dec"] - own_BD).norm(dim=1) / own_BD.norm(dim=1)
    return torch.quantile(error_B, 0.99).item()


# --- commands ----------------------------------------------------------------------------------------


def run(package: str, job: Job, rows: Rows) -> Trained:
    """Train with what the package prints sent to stderr: stdout holds results only."""
    trainer, architectures = PACKAGES[package]
    if job.arch not in architectures:
        raise ValueError(f"{package} has no {job.arch}; it has {', '.join(architectures)}")
    with contextlib.redirect_stdout(sys.stderr):
        return trainer(job, rows)


def gemm_ms(x: Tensor, d_sae: int, times: int) -> float:
    """Median milliseconds of x @ W, after one to warm up."""
    weights = torch.randn(x.shape[1], d_sae)
    clock = [time.perf_counter()]
    for _ in range(times + 1):
        _ = x @ weights
        clock.append(time.perf_counter())
    return 1000 * statistics.median(np.diff(clock)[1:])


def step(args: argparse.Namespace) -> None:
    x = torch.from_numpy(np.load(args.data, mmap_mode="c")[: args.batch * (args.steps + 2)]).float()
    for arch in args.arch:
        job = Job(
            arch=arch, d_in=x.shape[1], d_sae=args.f, batch=args.batch, steps=args.steps + 2, k=args.k, timed=True
        )
        for package in args.package:
            if arch not in PACKAGES[package][1]:
                continue
            rows = Rows(x, job)
            trained = run(package, job, rows)
            step_ms = 1000 * statistics.median(np.diff(rows.clock)[1 : args.steps + 1])
            with torch.no_grad():
                rule = "batchtopk" if arch in ("batchtopk", "matryoshka") else trained.architecture
                last = rows.take(rows.indices(job.steps - 1))
                acts = activations(last, rule, config_of(trained, job, {}) | {"k": job.k}, trained.tensors)
                measured = quality(last, acts, trained.tensors)
            line = {
                "package": package,
                "version": importlib.metadata.version(DISTRIBUTIONS[package]),
                "arch": arch,
                "tokens_per_s": round(1000 * args.batch / step_ms),
                "step_ms": round(step_ms, 1),
                "gemm_ms": round(gemm_ms(last, args.f, args.steps), 1),
                **measured,
            }
            print(json.dumps(line), flush=True)
            del trained, acts
            gc.collect()


@functools.lru_cache(maxsize=4)
def loaded(path: Path, device: str) -> Tensor:
    """Rows of a file, kept for the next job where they lie on a GPU."""
    rows = torch.from_numpy(np.load(path, mmap_mode="c"))
    return rows if device == "cpu" else rows.to(device)


def scaled_back(tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Weights for rows as the file has them, of those for rows times `scale`."""
    factors = {"W_enc": scale, "W_dec": 1 / scale, "b_dec": 1 / scale}
    return {name: value * factors.get(name, 1.0) for name, value in tensors.items()}


def train(args: argparse.Namespace) -> None:
    x = loaded(args.data, args.device)
    normalize = args.normalize == "own" and args.package != "sparsify"
    names = ("arch", "k", "l1", "target_l0", "lr", "decay", "seed", "batch", "device")
    settings = {name: getattr(args, name) for name in names}
    job = Job(d_in=x.shape[1], d_sae=args.f, steps=args.tokens // args.batch, normalize=normalize, **settings)
    started = time.perf_counter()
    trained = run(args.package, job, Rows(x, job, args.scale))
    seconds = time.perf_counter() - started
    version = importlib.metadata.version(DISTRIBUTIONS[args.package])
    peer = {"package": args.package, "version": version, "recipe": trained.recipe, "job": asdict(job)}
    config, tensors = config_of(trained, job, {"hook_name": args.hook}), scaled_back(trained.tensors, args.scale)
    save(args.out, config, tensors)
    (args.out / "peer.json").write_text(json.dumps(peer | {"scale": args.scale, "seconds": round(seconds, 1)}))
    with torch.no_grad():
        sample, scale = x[:1024].float().cpu(), args.scale
        apart = mismatch(
            args.out, sample, lambda rows: trained.reconstruct((rows * scale).to(job.device)).cpu() / scale
        )
        sample = sample if args.held_out is None else loaded(args.held_out, args.device).float()
        on_device = {name: value.to(sample.device) for name, value in tensors.items()}
        measured = held_out(sample, trained.architecture, config, on_device)
    line = {"package": args.package, "version": version, "arch": args.arch, "tokens": job.steps * job.batch}
    print(json.dumps(line | {"seconds": round(seconds, 1), **measured, "mismatch": apart, "out": str(args.out)}))
    # Latents beside their threshold differ between devices, and sparsify's passes are in bfloat16 on a GPU.
    if not apart <= (1e-4 if args.device == "cpu" else 1.0 if args.package == "sparsify" else 1e-2):
        raise SystemExit(f"{args.out} does not reconstruct as {args.package} does: rows differ by {apart:.1e}")


def serve(_: argparse.Namespace) -> None:
    """A job a line; one that fails is answered with `error`, and the next goes on."""
    for line in sys.stdin:
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                arguments = parser().parse_args(["train", *json.loads(line)])
                arguments.command(arguments)
            answer = said.getvalue().strip().splitlines()[-1]
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            answer = json.dumps({"error": f"{type(error).__name__}: {error}"})
        print(answer, flush=True)
        gc.collect()
        torch.cuda.empty_cache()


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    stepping, training = commands.add_parser("step"), commands.add_parser("train")
    commands.add_parser("serve").set_defaults(command=serve)
    for command in (stepping, training):
        command.add_argument("--data", type=Path, required=True, help="activations [rows, d_in], .npy, shuffled")
        command.add_argument("--f", type=int, required=True, help="number of latents")
        command.add_argument("--batch", type=int, default=4096)
        command.add_argument("--k", type=int, default=32)
    stepping.set_defaults(command=step)
    stepping.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=["relu", "topk", "gated"])
    stepping.add_argument("--package", nargs="+", choices=PACKAGES, default=list(PACKAGES))
    stepping.add_argument("--steps", type=int, default=6)
    training.set_defaults(command=train)
    training.add_argument("--package", choices=PACKAGES, required=True)
    training.add_argument("--arch", choices=ARCHITECTURES, required=True)
    training.add_argument("--l1", type=float, help="sparsity coefficient of relu, gated, jumprelu")
    training.add_argument("--target-l0", type=float, help="jumprelu only")
    training.add_argument("--tokens", type=int, required=True)
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--lr", type=float)
    training.add_argument("--decay", type=float, default=0.0, help="part of the steps in which the rate falls to 0")
    training.add_argument("--normalize", choices=("own", "none"), default="own", help="the package's input scale")
    training.add_argument("--device", default="cpu")
    training.add_argument("--scale", type=float, default=1.0, help="of rows, folded into the weights again")
    training.add_argument(
        "--held-out", type=Path, help=".npy of rows that FVU and L0 are of (default: 1,024 of --data)"
    )
    training.add_argument("--hook", default="", help="hook_name in the SAE's metadata")
    training.add_argument("--out", type=Path, required=True)
    return parser


if __name__ == "__main__":
    arguments = parser().parse_args()
    arguments.command(arguments)

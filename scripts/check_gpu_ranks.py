"""Check on a CUDA machine that several processes, which share SAEs or deal out a grid, compute what one does.

    python scripts/check_gpu_ranks.py

Steps and whole trainings, by NCCL in a world of one, in two processes, and in four that share rows and latents: by NCCL where there are
as many GPUs, else on those at hand by gloo.
`--device cpu` tries the script itself. Prints a JSON line per check; exits 1 when one fails, 2 without a GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from saebench.harvest import HarvestConfig, harvest
from saebench.harvest.ranks import joined
from saebench.models import hook_name
from saebench.text import TextConfig
from saebench.train import Member, Spec
from saebench.train.recipes import RECIPES
from saebench.train.shares import SHARES, Share, share_of

D, F, K, ROWS = 64, 512, 8, 128
STRIDE, N_STEPS, SILENT = (
    10,
    200,
    11,
)  # every tenth step, so that a GPU is looked at, and dead latents revived, within a few
TOLERANCE = 1e-3  # of what the log says of a step, in float32: a latent on the edge moves it by 1e-4
FVU = 0.01  # of a training by shares, relative
WORLDS = (
    ("alone", 0, ()),
    ("in a world of one", 1, ()),
    ("grid", 2, ("--ranks", "grid")),
    ("rows", 2, ("--ranks", "rows")),
    ("latents", 2, ("--ranks", "latents")),
    ("both", 4, ("--ranks", "latents", "--replicas", "2")),
)
"""Trainings: processes that torchrun starts, and what they are told."""
DEAD = (3, 200, 201, 500)  # latents, not as many for each of two processes


def said(name: str, ok: bool, **more: Any) -> bool:
    print(json.dumps({"check": name, **more, "ok": ok}), flush=True)
    return ok


# -------------------------------------------------------------------------------------------- steps


def course(architecture: str, device: str, share: Share) -> Tensor:
    """What the log says of each step: AuxK and resampling included, since some latents are dead from the first on."""
    recipe = RECIPES[architecture]
    how: dict[str, Any] = {"edition": recipe.edition, "k" if recipe.takes_k else "target_l0": K}
    spec = Spec(name=architecture, hook="x", architecture=architecture, d_sae=F, lr=1e-3, seed=0, **how)
    member = Member(spec, torch.zeros(D), SILENT, N_STEPS, device, share=share)
    first = share.first_latent(member.sae.d_sae)
    for name in {"b_enc", "b_gate", "b_mag"} & {*member.parameters}:
        for dead in DEAD:
            if 0 <= dead - first < member.sae.d_sae:
                member.parameters[name].data[dead - first] = -20.0
    generator, lines = torch.Generator().manual_seed(1), []
    directions = torch.randn(200, D, generator=generator)
    for step in range(0, N_STEPS, STRIDE):
        active = (torch.rand(ROWS, 200, generator=generator) < 0.05) * torch.rand(ROWS, 200, generator=generator)
        x = active @ directions
        x *= (D / x.square().sum(1).mean()).sqrt()
        member.step(share.rows_of(x.to(device)), step)
        lines.append(list(member.log_line(step).values()))
    return torch.tensor(lines, dtype=torch.float64)


def check_steps(asked: str) -> None:
    """In a process of several, or of one, that torchrun started."""
    with joined("training") as world:
        device = world.device(asked) or asked
        shares = {over: kind(world, ROWS) for over, kind in SHARES.items()}
        if world.size == 4:
            shares = {"both": share_of(world, ROWS, 2, 2)}
        for architecture in RECIPES:
            alone = course(architecture, device, Share())
            for over, share in shares.items():
                found = course(architecture, device, share)
                difference = (found - alone).abs() / alone.abs().clamp(min=1e-6)
                error = float(difference.masked_fill(found.isnan() & alone.isnan(), 0.0).max())
                everyones = world.gather(found.tolist())
                ok = error <= TOLERANCE and all(one == everyones[0] for one in everyones)
                if world.leads:
                    name = f"steps of {architecture}, {over}, processes: {world.size}"
                    said(name, ok, backend=dist.get_backend_config(), error=error, tolerance=TOLERANCE)


# ---------------------------------------------------------------------------------------- trainings


def launch(size: int, *command: object) -> subprocess.CompletedProcess[str]:
    """A Python command in so many processes of torchrun, or in one without it."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)] if size else []
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    argv = [sys.executable, *torchrun, *map(str, command)]
    return subprocess.run(argv, text=True, capture_output=True, env=threads)


def figures(out: Path) -> dict[str, float]:
    paths = sorted(out.glob("saes/*/metrics.jsonl"))
    return {path.parent.name: json.loads(path.read_text().splitlines()[-1])["fvu"] for path in paths}


def same_bits(one: Path, other: Path) -> bool:
    for path in one.glob("saes/*/sae_weights.safetensors"):
        mine, theirs = load_file(path), load_file(other / path.relative_to(one))
        if not all(torch.equal(mine[name], theirs[name]) for name in mine):
            return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--steps", action="store_true", help="in a process that this script starts")
    told = parser.parse_args()
    if told.steps:
        check_steps(told.device)
        return 0
    if told.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu tries this script", file=sys.stderr)
        return 2
    began, fine = time.perf_counter(), True
    names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    print(json.dumps({"devices": names, "torch": torch.__version__}), flush=True)
    train = Path(__file__).with_name("train.py")
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(max((os.cpu_count() or 2) // 2, 1)) as pool:
        steps = [pool.submit(launch, size, __file__, "--steps", "--device", told.device) for size in (1, 2, 4)]
        store = Path(scratch) / "store"
        made = HarvestConfig(layers=(2,), tokens=100_000, batch=8, shard_contexts=64, device=told.device, out=store)
        assert harvest(made, TextConfig()) is not None
        runs = {}
        for name, size, more in WORLDS:
            out = Path(scratch) / name.replace(" ", "-")
            command = [train, "--store", store, "--hook", hook_name(2), "--arch", "relu,topk,batchtopk", "--out", out]
            command += ["--target-l0", "8", "--d-sae", "512", "--tokens", "64K", "--batch", "1024", "--seed", "0"]
            command += ["--device", told.device, "--partitions", "2", *more]  # of all, the same batches
            runs[name] = out, pool.submit(launch, size, *command)
        for future in steps:
            done = future.result()
            print(done.stdout, end="", flush=True)
            fine &= '"ok": false' not in done.stdout
            fine &= done.returncode == 0 or said("steps", False, error=done.stderr[-4000:])
        alone, done = runs.pop("alone")
        fine &= done.result().returncode == 0 or said("training alone", False, error=done.result().stderr[-4000:])
        expected = figures(alone)
        for name, (out, future) in runs.items():
            if future.result().returncode:
                fine = said(f"training, {name}", False, error=future.result().stderr[-4000:])
                continue
            found = figures(out)
            error = max((abs(found[sae] / expected[sae] - 1) for sae in expected), default=1.0)
            same = same_bits(alone, out)
            ok = error <= FVU if name in ("rows", "latents", "both") else same
            fine &= said(f"training, {name}", ok, fvu=found, error=error, same_bits=same)
    print(json.dumps({"seconds": round(time.perf_counter() - began, 1), "ok": fine}))
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())

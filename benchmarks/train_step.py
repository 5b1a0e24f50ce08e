"""Time a training step of each architecture against the encoder product alone, in one run.

    python benchmarks/train_step.py --arch topk --d 512 --f 8192 --batch 4096 --k 32 --steps 6

Prints JSON lines. `gemm_ms` is x @ W_enc at the same shape, timed in turn with the steps; `step_over_gemm`
is what to compare between commits, since most machines are noisy. ReLU, Gated and JumpReLU are timed in
the state of a run past its warm-up (biases or thresholds set so that the mean L0 is k; `"phase": "sparse"`)
and at initialisation (`"phase": "dense"`). With --reference the dense autograd step is timed as well, and
with --peers the trainers of SAELens, sparsify and dictionary_learning, installed in that virtual
environment, on the same rows. `peak_mb` is what a step allocates at its peak beside the weights, their
gradients and moments.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from saebench.sae import GatedSAE, JumpReLUSAE, ReLUSAE
from saebench.train import Member, Spec
from saebench.train.objectives import Context
from saebench.train.recipes import RECIPES

PEERS = Path(__file__).with_name("peers.py")


def seconds(run: Callable[[], object]) -> float:
    """Wall time of a call, the device's part included."""
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_mb(run: Callable[[], object]) -> float:
    """Most memory allocated at once during a call beyond what was allocated before it, in 2²⁰ bytes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    now = peak = 0
    for event in cast(Any, profile.profiler).kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak / 2**20


@torch.no_grad()
def set_l0(member: Member, x_BD: torch.Tensor, k: int) -> None:
    """Shift the biases or thresholds so that k latents are active on the mean row."""
    sae = member.sae
    least = sae.project(x_BD).flatten().topk(k * len(x_BD), sorted=False).values.min()
    if isinstance(sae, JumpReLUSAE):
        sae.threshold.fill_(least)
    elif isinstance(sae, GatedSAE):
        sae.b_gate.fill_(-least)
    elif isinstance(sae, ReLUSAE):
        sae.b_enc.fill_(-least)


def new_member(arch: str, x_BD: torch.Tensor, args: argparse.Namespace) -> Member:
    level: dict[str, Any] = {"k": args.k} if RECIPES[arch].takes_k else {"l1": 1.0}
    spec = Spec(name=arch, architecture=arch, d_sae=args.f, lr=1e-4, seed=0, **level)
    return Member(spec, torch.zeros(args.d), dead_steps=10**6, n_steps=10**6, device=str(x_BD.device))


def reference_step(member: Member, x_BD: torch.Tensor) -> None:
    """The same step by dense autograd."""
    context = Context(torch.ones((), device=x_BD.device), torch.empty(0, dtype=torch.int64), member.spec.k)
    member.recipe.objective(member.sae, x_BD, context, x_BD).total.backward()
    torch.nn.utils.clip_grad_norm_(member.parameters.values(), 1.0)
    member.optimizer.step()
    member.optimizer.zero_grad()


def measure(arch: str, phase: str, x_BD: torch.Tensor, args: argparse.Namespace) -> dict[str, Any]:
    member = new_member(arch, x_BD, args)
    if phase == "sparse" and not RECIPES[arch].takes_k:
        set_l0(member, x_BD, args.k)
    weights, steps = member.sae.W_enc.detach(), iter(range(10**6))
    product = torch.empty(len(x_BD), args.f, device=x_BD.device)
    calls = {
        "gemm": lambda: torch.mm(x_BD, weights, out=product),
        "step": lambda: member.step(x_BD, next(steps)),
    }
    if args.reference:
        reference = new_member(arch, x_BD, args)
        calls["reference"] = lambda: reference_step(reference, x_BD)
    for call in calls.values():
        call()
        call()
    member.log_line(0)
    times = [{name: seconds(call) for name, call in calls.items()} for _ in range(args.steps)]
    median = {name: 1000 * statistics.median(each[name] for each in times) for name in calls}
    line = member.log_line(0)
    result = {
        "arch": arch,
        "phase": phase,
        "tokens_per_s": round(1000 * len(x_BD) / median["step"]),
        "step_ms": round(median["step"], 1),
        "gemm_ms": round(median["gemm"], 1),
        "step_over_gemm": round(statistics.median(each["step"] / each["gemm"] for each in times), 2),
        "fvu": round(line["fvu"], 4),
        "density": round(line["l0"] / args.f, 4),
        "peak_mb": round(peak_mb(calls["step"])) if x_BD.device.type == "cpu" else None,
    }
    if args.reference:
        result["reference_ms"] = round(median["reference"], 1)
        result["reference_peak_mb"] = round(peak_mb(calls["reference"])) if x_BD.device.type == "cpu" else None
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--f", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--data", type=Path, help="float32 rows [N, d], N at least the batch (default: normal ones)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--reference", action="store_true", help="also time dense autograd")
    parser.add_argument("--peers", type=Path, help="virtual environment with the other packages")
    args = parser.parse_args()
    x = torch.randn(args.batch, args.d, generator=torch.Generator().manual_seed(0))
    if args.data:
        x = torch.from_numpy(np.load(args.data, mmap_mode="r")[: args.batch].astype(np.float32))
        args.d = x.shape[1]
        x = (x - x.mean(0)) * (args.d / (x - x.mean(0)).pow(2).sum(1).mean()).sqrt()
    for arch in args.arch:
        phases = ("sparse",) if RECIPES[arch].takes_k else ("sparse", "dense")
        for phase in phases:
            print(json.dumps(measure(arch, phase, x.to(args.device), args)), flush=True)
        if args.peers:
            with tempfile.TemporaryDirectory() as folder:
                rows = Path(folder) / "x.npy"
                np.save(rows, x.numpy())
                shape = ("--f", str(args.f), "--batch", str(args.batch), "--k", str(args.k), "--steps", str(args.steps))
                command = [args.peers / "bin/python", PEERS, "step", "--data", rows, "--arch", arch, *shape]
                subprocess.run(command, check=True)


if __name__ == "__main__":
    main()

"""Time a training step of each architecture against the encoder product alone, in one run.

    python benchmarks/train_step.py --arch topk --d 512 --f 8192 --batch 4096 --k 32 --steps 6
    python benchmarks/train_step.py --arch batchtopk --kind sae transcoder crosscoder clt --d 512 --f 2048

Prints JSON lines. `gemm_ms` is x @ W_enc at the same shape, timed in turn with the steps; `step_over_gemm`
is what to compare between commits, since most machines are noisy. ReLU, Gated and JumpReLU are timed in
the state of a run past its warm-up (biases or thresholds set so that the mean L0 is k; `"phase": "sparse"`)
and at initialisation (`"phase": "dense"`). With --reference the dense autograd step is timed as well, and
with --peers the trainers of SAELens, sparsify and dictionary_learning, installed in that virtual
environment, on the same rows. Of --kind, a transcoder reads d and writes d, a crosscoder reads and writes two hooks of d, and a clt has four
layers, whose members have f latents each and write to one to four hooks: `gemm_ms` is then the encoder products of all of them. `peak_mb` is what a step allocates at its peak beside the weights, their
gradients and moments.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from saebench.sae import GatedSAE, JumpReLUSAE, ReLUSAE
from saebench.train import Member, Spec
from saebench.train.objectives import Context
from saebench.train.recipes import EDITIONS, RECIPES
from saebench.train.teams import team_step

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


LAYERS = 4  # of a clt


def new_members(arch: str, kind: str, x_BD: torch.Tensor, args: argparse.Namespace) -> list[Member]:
    level: dict[str, Any] = {"k": args.k} if RECIPES[arch].takes_k else {"l1": 1.0}
    common: dict[str, Any] = {"architecture": arch, "d_sae": args.f, "lr": 1e-4, "seed": 0, **level}
    common["edition"] = args.edition or RECIPES[arch].edition
    hooks = [f"hook {n}" for n in range(LAYERS)]
    reads, writes = {
        "sae": ([("",)], [("",)]),
        "transcoder": ([("in",)], [("out",)]),
        "crosscoder": ([("a", "b")], [("a", "b")]),
        "clt": ([(f"in {n}",) for n in range(LAYERS)], [tuple(hooks[n:]) for n in range(LAYERS)]),
    }[kind]
    members = []
    for read, written in zip(reads, writes, strict=True):
        ends = {} if kind == "sae" else {"reads": read, "writes": written}
        spec = Spec(
            name=f"{arch} {read}", **ends, skip=args.skip and kind == "transcoder", joint=kind == "clt", **common
        )
        members.append(
            Member(
                spec, torch.zeros(args.d * len(read)), dead_steps=10**6, n_steps=10**6, device=str(x_BD.device),
                mean_E=None if read == written else torch.zeros(args.d * len(written)), parts=(args.d,) * len(written),
            )
        )  # fmt: skip
    for member in members:
        member.company = members
    return members


def reference_step(member: Member, x_BD: torch.Tensor) -> None:
    """The same step by dense autograd."""
    context = Context(torch.ones((), device=x_BD.device), torch.empty(0, dtype=torch.int64), member.spec.k)
    member.recipe.objective(member.sae, x_BD, context, x_BD).total.backward()
    torch.nn.utils.clip_grad_norm_(member.parameters.values(), 1.0)
    member.optimizer.step()
    member.optimizer.zero_grad()


def measure(arch: str, kind: str, phase: str, x_BD: torch.Tensor, args: argparse.Namespace) -> dict[str, Any]:
    members = new_members(arch, kind, x_BD, args)
    member = members[0]
    # Every hook has rows of its own: the same ones in another order.
    hooks = list(dict.fromkeys(hook for member in members for hook in member.spec.ends.hooks))
    rows = {hook: x_BD if n == 0 else x_BD.roll(n, 1) for n, hook in enumerate(hooks)}
    read = [torch.cat([rows[hook] for hook in one.spec.ends.reads], 1) for one in members]
    if phase == "sparse" and not RECIPES[arch].takes_k:
        for one, x in zip(members, read, strict=True):
            set_l0(one, x, args.k)
    steps = iter(range(10**6))
    acts = torch.empty(len(x_BD), args.f, device=x_BD.device)

    def products() -> None:
        for one, x in zip(members, read, strict=True):
            torch.mm(x, one.sae.W_enc.detach(), out=acts)

    calls: dict[str, Callable[[], object]] = {
        "gemm": products,
        "step": lambda: team_step(members, rows, next(steps)),
    }
    if args.reference:
        (reference,) = new_members(arch, "sae", x_BD, args)
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
        "kind": kind,
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
    parser.add_argument("--kind", nargs="*", default=["sae"], choices=["sae", "transcoder", "crosscoder", "clt"])
    parser.add_argument("--skip", action="store_true", help="of transcoders: a linear map beside the latents")
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--f", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--data", type=Path, help="float32 rows [N, d], N at least the batch (default: normal ones)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--edition", type=int, choices=list(EDITIONS), help="how weights move (default: as now)")
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
        for kind, phase in product(args.kind, phases):
            print(json.dumps(measure(arch, kind, phase, x.to(args.device), args)), flush=True)
        if args.peers:
            with tempfile.TemporaryDirectory() as folder:
                rows = Path(folder) / "x.npy"
                np.save(rows, x.numpy())
                shape = ("--f", str(args.f), "--batch", str(args.batch), "--k", str(args.k), "--steps", str(args.steps))
                command = [args.peers / "bin/python", PEERS, "step", "--data", rows, "--arch", arch, *shape]
                subprocess.run(command, check=True)


if __name__ == "__main__":
    main()

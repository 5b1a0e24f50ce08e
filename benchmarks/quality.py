"""SAEs of this package and of others at equal tokens, width and held-out L0, on one store.

    python benchmarks/quality.py --store activations/demo --peers VENV --out runs/quality

Each peer trains every architecture that it has by two recipes: `own`, its own recipe (the table in
peers.py), and `tuned`, with the learning rate and decay below, which suit so short a run. Where λ sets the sparsity,
it is searched for at the first seed until L0 is within 5% of --l0. The best peer of each architecture and recipe, by FVU,
is trained with the other seeds as well. This package then trains with `--target-l0` at the mean held-out L0 that the
best of these reached. All are evaluated on the store's validation documents; the table goes to OUT/table.md. What is
done already is not done again.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from saebench.evaluate import EvalConfig, evaluate
from saebench.files import read_json, write_json
from saebench.store import open_store, shuffled_batches
from saebench.train import TrainConfig, train

PACKAGES = {
    "topk": ("saelens", "sparsify", "dictionary_learning"),
    "relu": ("saelens", "dictionary_learning"),
    "gated": ("saelens", "dictionary_learning"),
}
TUNED = {
    "saelens": {"lr": 2e-3, "decay": 0.2},
    "dictionary_learning": {"lr": 2e-3, "decay": 0.2},
    "sparsify": {"lr": 5e-3},  # schedule-free sign SGD has no decay
}
FIRST_L1 = {"saelens": 5.0, "dictionary_learning": 0.5}
CLOSE, TRIES = 0.05, 5


@dataclass(frozen=True)
class Job:
    """One SAE of a peer."""

    package: str
    arch: str
    recipe: str
    seed: int = 0
    l1: float | None = None

    @property
    def name(self) -> str:
        sparsity = "" if self.l1 is None else f"-l1-{self.l1:.4g}"
        return f"{self.package}-{self.arch}-{self.recipe}{sparsity}-seed{self.seed}"


class Peers:
    """Runs benchmarks/peers.py, each run in a process of one thread."""

    def __init__(self, args: argparse.Namespace, rows: Path) -> None:
        self.args, self.rows, self.out = args, rows, args.out / "peers"

    def train(self, job: Job) -> dict[str, Any]:
        """The line that `peers.py train` prints, of this run or an earlier one."""
        folder, args = self.out / job.name, self.args
        result = folder / "line.json"
        if result.exists():
            return read_json(result)
        options = {"package": job.package, "arch": job.arch, "f": args.d_sae, "k": args.l0, "batch": args.batch}
        options |= {"tokens": args.tokens, "seed": job.seed, "hook": args.hook, "out": folder, "data": self.rows}
        options |= {"l1": job.l1} if job.l1 is not None else {}
        options |= TUNED[job.package] if job.recipe == "tuned" else {}
        command = [args.peers / "bin/python", Path(__file__).with_name("peers.py"), "train"]
        command += [part for name, value in options.items() for part in (f"--{name}", value)]
        threads = os.environ | {"OMP_NUM_THREADS": "1"}
        run = subprocess.run([str(part) for part in command], env=threads, text=True, capture_output=True)
        if run.returncode:
            raise RuntimeError(f"{job.name}: {run.stderr[-2000:]}")
        line = json.loads(run.stdout.splitlines()[-1])
        write_json(result, line)
        print(json.dumps({"job": job.name, **line}), flush=True)
        return line

    def search(self, job: Job) -> tuple[Job, dict[str, Any]]:
        """`job` with the λ that brings L0 closest to the target: secant steps of log L0 over log λ."""
        if job.arch == "topk":
            return job, self.train(job)
        tried: list[tuple[float, float, Job, dict[str, Any]]] = []  # (log λ, log L0 error, …)
        log_l1 = math.log(FIRST_L1[job.package])
        for _ in range(TRIES):
            candidate = replace(job, l1=math.exp(log_l1))
            line = self.train(candidate)
            tried.append((log_l1, math.log(max(line["l0"], 0.1) / self.args.l0), candidate, line))
            tried.sort(key=lambda entry: abs(entry[1]))
            if abs(tried[0][1]) < CLOSE:
                break
            slope = -1.0
            if len(tried) > 1 and tried[0][0] != tried[1][0]:
                slope = min(-0.3, (tried[0][1] - tried[1][1]) / (tried[0][0] - tried[1][0]))
            log_l1 = tried[0][0] - tried[0][1] / slope
        return tried[0][2], tried[0][3]


def export(args: argparse.Namespace, path: Path) -> None:
    """The store's training rows, shuffled, as one file."""
    store = open_store(args.store)
    n_batches = store.rows("train", kept=True) // args.batch
    batches = shuffled_batches(store, args.hook, args.batch, seed=0, buffer_rows=store.rows("train"))
    rows = np.concatenate([next(batches)[0].numpy() for _ in range(n_batches)])
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, rows)


def best(found: list[tuple[Job, dict[str, Any]]]) -> list[Job]:
    """Of each architecture and recipe the one with the lowest FVU."""
    chosen: dict[tuple[str, str], tuple[Job, dict[str, Any]]] = {}
    for job, line in found:
        key = (job.arch, job.recipe)
        if key not in chosen or line["fvu"] < chosen[key][1]["fvu"]:
            chosen[key] = (job, line)
    return [job for job, _ in chosen.values()]


def measured(args: argparse.Namespace, folders: list[Path]) -> dict[Path, dict[str, Any]]:
    """Held-out figures of SAEs."""
    evaluate(EvalConfig(run=args.out, sae=tuple(folders), store=args.store, tokens=args.eval_tokens))
    return {folder: read_json(folder / "evaluation.json")["metrics"] for folder in folders}


def row(label: str, figures: list[dict[str, Any]]) -> str:
    def spread(name: str) -> str:
        values = [figure[name] for figure in figures]
        return f"{statistics.mean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else 0:.4f}"

    l0 = statistics.mean(figure["l0"] for figure in figures)
    return f"| {label} | {l0:.2f} | {spread('fvu')} | {spread('delta_ce')} | {spread('loss_recovered_zero')} | {spread('dead_fraction')} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--hook", default="blocks.2.hook_resid_post")
    parser.add_argument("--peers", type=Path, required=True, help="virtual environment with the other packages")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arch", nargs="+", choices=sorted(PACKAGES), default=list(PACKAGES))
    parser.add_argument("--recipe", nargs="+", choices=("own", "tuned"), default=["own", "tuned"])
    parser.add_argument("--d_sae", type=int, default=2048)
    parser.add_argument("--l0", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1_045_504)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--eval-tokens", type=int, default=100_000)
    parser.add_argument("--peers-only", action="store_true")
    args = parser.parse_args()
    args.store, args.out = args.store.resolve(), args.out.resolve()

    rows = args.out / "rows.npy"
    if not rows.exists():
        export(args, rows)
    peers = Peers(args, rows)
    jobs = [Job(package, arch, recipe) for recipe in args.recipe for arch in args.arch for package in PACKAGES[arch]]
    with ThreadPoolExecutor(args.jobs) as pool:
        chosen = best(list(pool.map(peers.search, jobs)))
        seeds = [replace(job, seed=seed) for job in chosen for seed in range(args.seeds)]
        list(pool.map(peers.train, seeds))
    if args.peers_only:
        return

    figures = measured(args, [peers.out / job.name for job in seeds])
    lines = ["| SAE | L0 | FVU | ΔCE | loss recovered | dead |", "|---|---|---|---|---|---|"]
    for arch in args.arch:
        groups = {
            f"{job.package} {arch}, {job.recipe}": [
                figures[peers.out / replace(job, seed=seed).name] for seed in range(args.seeds)
            ]
            for job in chosen
            if job.arch == arch
        }
        l0 = statistics.mean(figure["l0"] for figure in min(groups.values(), key=lambda found: found[0]["fvu"]))
        config = TrainConfig(
            store=args.store, hook=(args.hook,), out=args.out / f"ours-{arch}", arch=(arch,), d_sae=(args.d_sae,),
            target_l0=(round(l0, 1),), tokens=args.tokens, batch=args.batch, seed=tuple(range(args.seeds)),
        )  # fmt: skip
        groups[f"saebench {arch}"] = list(measured(args, train(config) or []).values())
        lines += [row(label, found) for label, found in groups.items()]
    (args.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

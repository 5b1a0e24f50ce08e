"""Time a rolling training against harvesting all of its text first and training then, on the embedded model.

    python benchmarks/rolling.py --rolling 6 --tokens 400k [--turns 2]

Prints a JSON line. Both ways are the command line's own, in processes of their own, on the same tokens and settings, in turns
(the model is loaded, and Python starts, once more in each). `peak_mb` is the most that the store's folder held, looked at
every 50 ms; seconds are of the median turn. `waited_s` is how long the trainer waited for windows.
The rows that both train on are the same, in another order: those of a window are mixed among themselves. `fvu` is of the
SAEs of the last turn on the same held-out rows.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from saebench.config import parse_count
from saebench.sae import load_sae
from saebench.store import Store, open_store

LAYER = "2"


class Turn(NamedTuple):
    seconds: float
    peak_mb: float
    waited: float


def held(folder: Path) -> int:
    """Bytes in a folder whose files come and go."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(path, name)).st_size
            except FileNotFoundError:
                continue
    return total


def watched(command: list[str], store: Path) -> tuple[float, int, str]:
    """(seconds, most bytes in the store, what it printed) of a command."""
    most, started = 0, time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([sys.executable, "-m", "saebench.cli", *command], stderr=output, stdout=output)
        while process.poll() is None:
            most = max(most, held(store))
            time.sleep(0.05)
        seconds = time.perf_counter() - started
        output.seek(0)
        printed = output.read()
    if process.returncode:
        raise RuntimeError(printed)
    return seconds, most, printed


def turn(args: argparse.Namespace, folder: Path, *, rolling: bool) -> Turn:
    shutil.rmtree(folder, ignore_errors=True)
    store, run = folder / "store", folder / "run"
    text = [
        "--layers", LAYER, "--context", str(args.context), "--shard-contexts", str(args.shard_contexts),
        "--validation-tokens", "10k",
    ]  # fmt: skip
    training = [
        "train", "--store", str(store), "--out", str(run), "--arch", "topk", "--k", "32", "--d-sae", str(args.d_sae),
        "--tokens", str(args.tokens), "--batch", "1024",
    ]  # fmt: skip
    commands = [[*training, "--rolling", str(args.rolling), "--", *text]]
    if not rolling:
        commands = [["harvest", *text, "--tokens", str(args.tokens), "--out", str(store)], training]
    found = [watched(command, store) for command in commands]
    waited = re.search(r"training waited ([\d.]+) s", found[-1][2])
    return Turn(
        sum(seconds for seconds, _, _ in found),
        max(most for _, most, _ in found) / 1e6,
        float(waited[1]) if waited else 0.0,
    )


def fvu(run: Path, store: Store) -> float:
    """Of a run's SAE, on the held-out rows of a store."""
    sae = load_sae(run / "saes" / "topk-k32")
    x_RD = torch.cat(list(store.usual_rows(store.hooks[0], "validation")))
    with torch.no_grad():
        error = (x_RD - sae(x_RD).x_hat).square().sum()
    return float(error / (x_RD - x_RD.mean(0)).square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rolling", type=int, default=6)
    parser.add_argument("--tokens", type=parse_count, default=400_000)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--shard-contexts", type=int, default=128)
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=2)
    args = parser.parse_args()
    turns: dict[str, list[Turn]] = {"rolling": [], "harvest_then_train": []}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(args.turns):
            for name, done in turns.items():
                done.append(turn(args, Path(scratch) / name, rolling=name == "rolling"))
                print(f"turn {number + 1} of {args.turns}, {name}: {done[-1]}", file=sys.stderr)
        whole = open_store(Path(scratch) / "harvest_then_train" / "store")
        line: dict[str, object] = {
            name: {
                "seconds": round(statistics.median(each.seconds for each in done), 1),
                "peak_mb": round(max(each.peak_mb for each in done), 1),
                "fvu": round(fvu(Path(scratch) / name / "run", whole), 4),
                "turns_s": [round(each.seconds, 1) for each in done],
            }
            for name, done in turns.items()
        }
    line |= {"waited_s": [round(each.waited, 1) for each in turns["rolling"]], "options": vars(args)}
    print(json.dumps(line))


if __name__ == "__main__":
    main()

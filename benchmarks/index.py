"""Time the feature index, and what reads it.

    python benchmarks/index.py --sae runs/demo/saes/topk-k48 [--tokens 1M] [--peers VENV] [--synthetic 65536]

Indexes the SAE as the command line does, on the store that it was trained on (with --tokens, on one of so many that is
harvested anew, so that a comparison can be given with and without harvest), and times the reader from a file that is not in the page cache. With --peers, SAEDashboard does
all latents on the same contexts in the same run, in that virtual environment. With --synthetic F, an untrained TopK SAE of F
latents (K 32) is indexed instead. Prints JSON lines; `peak_mb` is the peak resident memory of the process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saebench.config import parse_count
from saebench.harvest import HarvestConfig, harvest
from saebench.index import open_feature_index
from saebench.index.examples import show
from saebench.models import model_path
from saebench.sae import initialise, load_sae, new_sae, read_config, save_sae
from saebench.store import Store, open_store
from saebench.store.source import recorded_store
from saebench.text import TextConfig

DASHBOARD = Path(__file__).with_name("dashboards.py")


# A process begins with the peak of the one that it is forked from, so a small one starts it and reports on it.
_STARTER = """
import json, resource, subprocess, sys, time
started = time.perf_counter()
status = subprocess.call(sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print("\\n" + json.dumps([status, time.perf_counter() - started, peak / 1024]))
"""


def measured(command: list[str | Path]) -> tuple[float, float, str]:
    """(seconds, peak resident memory in 2²⁰ bytes, output) of a process."""
    starter = [sys.executable, "-c", _STARTER, *(str(part) for part in command)]
    output = subprocess.run(starter, stdout=subprocess.PIPE, text=True, check=True).stdout
    output, _, last = output.rstrip().rpartition("\n")
    status, seconds, peak = json.loads(last)
    if status:
        raise RuntimeError(f"{command} ended with {status}")
    return seconds, peak, output.rstrip()


def synthetic(folder: Path, store: Store, hook: str, n_latents: int, metadata: dict[str, Any]) -> None:
    """An untrained TopK SAE on disk."""
    statistics_of_hook = store.statistics(hook)
    sae = new_sae("topk", len(statistics_of_hook["mean"]), n_latents, k=32)
    initialise(sae, torch.tensor(statistics_of_hook["mean"]), torch.Generator().manual_seed(0))
    save_sae(sae, folder, metadata)


def reader_figures(path: Path, sae_folder: Path) -> dict[str, Any]:
    """Milliseconds of what the browser asks of an index, the file out of the page cache at first."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    random = np.random.default_rng(0)
    sae = load_sae(sae_folder)

    def timed(call: Any) -> float:
        started = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - started)

    with open_feature_index(path, sae=sae_folder) as index:
        latents = [int(latent) for latent in random.choice(index.d_sae, 100, replace=False)]
        reads = [timed(lambda latent=latent: index[latent]) for latent in latents]
        columns = timed(lambda: index.columns)
        table = index.columns
        sorts = [timed(lambda: np.argsort(-table["max"], kind="stable")[:1000]) for _ in range(5)]
        filters = [
            timed(lambda: np.flatnonzero((table["density"] < 0.01) & (table["max"] > 1) & ~index.flagged("dead")))
            for _ in range(5)
        ]
        shown = [timed(lambda latent=latent: show(index, sae, latent, index[latent].top)) for latent in latents[:20]]
    return {
        "d_sae": sae.d_sae, "latent_ms": round(statistics.median(reads), 2), "latent_ms_first": round(reads[0], 2),
        "latent_ms_worst": round(max(reads), 2), "columns_ms": round(columns, 1), "sort_ms": round(statistics.median(sorts), 2),
        "filter_ms": round(statistics.median(filters), 2), "top_examples_ms": round(statistics.median(shown), 1),
        "file_mb": round(path.stat().st_size / 2**20, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", type=Path, default=Path("runs/demo/saes/topk-k48"))
    parser.add_argument("--tokens", type=parse_count, help="harvest so many first (default: the SAE's own store)")
    parser.add_argument("--peers", type=Path, help="virtual environment with sae-dashboard")
    parser.add_argument("--synthetic", type=int, metavar="F", help="an untrained SAE of F latents instead")
    parser.add_argument("--out", type=Path, default=Path("runs/index-benchmark"))
    args = parser.parse_args()
    args.out = args.out.resolve()

    config = read_config(args.sae)
    hook, folder = config["metadata"]["hook_name"], recorded_store(args.sae)
    assert folder is not None
    store, harvest_s = open_store(folder), 0.0
    identity = store.manifest["identity"]
    if args.tokens:
        settings = HarvestConfig(
            model=identity["model"]["id"], layers=(int(hook.split(".")[1]),), tokens=args.tokens,
            validation_tokens=min(100_000, args.tokens // 10), out=args.out / f"store-{args.tokens}",
        )  # fmt: skip
        started = time.perf_counter()
        made = harvest(settings, TextConfig(dataset=identity["text"]["dataset"]))
        if made is None:
            raise KeyboardInterrupt
        store, harvest_s = made, time.perf_counter() - started

    sae = args.sae.resolve()
    if args.synthetic:
        sae = args.out / "saes" / f"synthetic-{args.synthetic}"
        metadata = {name: value for name, value in config["metadata"].items() if name != "saebench"}
        synthetic(sae, store, hook, args.synthetic, metadata)
    path = args.out / "index" / f"{sae.name}-{args.tokens or store.folder.name}.h5"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "saebench.cli", "index", "--sae", sae, "--store", store.folder, "--out", path]
    seconds, peak, _ = measured(command)
    n_rows = store.rows("train", kept=False)
    line = {
        "package": "saebench",
        "tokens": n_rows,
        "latents": load_sae(sae).d_sae,
        "harvest_s": round(harvest_s, 1) if args.tokens else None,
    }
    line |= {"index_s": round(seconds, 1), "tokens_per_s": round(n_rows / seconds), "peak_mb": round(peak)}
    print(json.dumps(line), flush=True)
    print(json.dumps({"reader": reader_figures(path, sae)}), flush=True)

    if args.peers:
        contexts = args.out / "contexts.npy"
        tokens = np.concatenate([shard.column("tokens") for shard in store.of_split("train")])
        np.save(contexts, tokens.reshape(-1, int(identity["context"])).astype(np.int64))
        out = args.out / f"dashboard-{args.tokens or store.folder.name}"
        out.mkdir(parents=True, exist_ok=True)
        command = [args.peers / "bin/python", DASHBOARD, "--model", model_path(identity["model"]["id"]), "--sae", sae]
        command += ["--tokens", contexts, "--features", str(line["latents"]), "--out", out]
        _, peak, output = measured(command)
        took = json.loads(output.splitlines()[-1])["seconds"]
        theirs = {
            "package": "sae-dashboard",
            "tokens": tokens.size,
            "latents": line["latents"],
            "seconds": round(took, 1),
        }
        theirs |= {"peak_mb": round(peak), "times_as_long": round(took / seconds, 1)}
        theirs |= {"times_as_long_with_harvest": round(took / (seconds + harvest_s), 1)}
        print(json.dumps(theirs), flush=True)


if __name__ == "__main__":
    main()

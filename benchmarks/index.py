"""Time the feature index, and what reads it.

    python benchmarks/index.py --sae runs/demo/saes/topk-k48 [--tokens 1M] [--peers VENV] [--synthetic 65536]
    python benchmarks/index.py --synthetic 65536 --wide [--arch jumprelu --l0 64] [--rows 200k]

Indexes the SAE as the command line does, on the store that it was trained on (with --tokens, on one of so many that is
harvested anew, so that a comparison can be given with and without harvest), and times the reader from a file that is not in the page cache. With --peers, SAEDashboard does
all latents on the same contexts in the same run, in that virtual environment. With --synthetic F, an untrained SAE of F
latents is indexed instead (a JumpReLU's one threshold lets --l0 fire), and with --wide, on a store that is made of that one: all of
its hooks side by side as one hook, the vectors of the demo's two layers as one of 512. Prints JSON lines; `peak_mb` is the peak resident
memory of the process.

The encoder's product alone, x W_enc in blocks as the encoder has them, is timed on some of the rows before and after the
index, and the mean given for all of them: `times_product` is the index's seconds over its, and `times_product_cpu` the same in
processor time of all threads, which other programs on the machine disturb less.
"""

import argparse
import json
import os
import shutil
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
from saebench.sae.sparse import rows_of_a_block
from saebench.store import Store, StoreWriter, open_store
from saebench.store.coding import encode
from saebench.store.schema import MANIFEST_HASH
from saebench.store.source import recorded_store
from saebench.text import TextConfig

DASHBOARD = Path(__file__).with_name("dashboards.py")


# A process begins with the peak of the one that it is forked from, so a small one starts it and reports on it.
_STARTER = """
import json, resource, subprocess, sys, time
started = time.perf_counter()
status = subprocess.call(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print("\\n" + json.dumps([status, time.perf_counter() - started, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]))
"""


def measured(command: list[str | Path]) -> tuple[float, float, float, str]:
    """(seconds, processor seconds, peak resident memory in 2²⁰ bytes, output) of a process."""
    starter = [sys.executable, "-c", _STARTER, *(str(part) for part in command)]
    output = subprocess.run(starter, stdout=subprocess.PIPE, text=True, check=True).stdout
    output, _, last = output.rstrip().rpartition("\n")
    status, seconds, processor, peak = json.loads(last)
    if status:
        raise RuntimeError(f"{command} ended with {status}")
    return seconds, processor, peak, output.rstrip()


@torch.no_grad()
def synthetic(
    folder: Path,
    store: Store,
    hook: str,
    n_latents: int,
    metadata: dict[str, Any],
    architecture: str = "topk",
    l0: int = 32,
) -> None:
    """An untrained SAE on disk, of which `l0` latents fire on a row: TopK, or JumpReLU of one threshold."""
    statistics_of_hook = store.statistics(hook)
    sae = new_sae(architecture, len(statistics_of_hook["mean"]), n_latents, k=l0)
    initialise(sae, torch.tensor(statistics_of_hook["mean"]), torch.Generator().manual_seed(0))
    if architecture == "jumprelu":
        x_RD = next(store.usual_rows(hook, "train", spread=512))
        sae.get_parameter("threshold").fill_(sae.project(x_RD).flatten().topk(l0 * len(x_RD)).values[-1].item())
    save_sae(sae, folder, metadata)


def side_by_side(folder: Path, store: Store) -> Store:
    """A store like another, whose one hook, named as its last, has the vectors of all of its hooks side by side."""
    hooks = store.hooks
    if not (folder / MANIFEST_HASH).exists():
        shutil.rmtree(folder, ignore_errors=True)
        width, names, done = sum(map(store.d_in, hooks)), store.document_names(), {"train": 0, "validation": 0}
        writer = StoreWriter(folder, store.manifest["identity"], {hooks[-1]: width}, "float16")
        writer.add_tokenizer(list((store.folder / "tokenizer").iterdir()))
        W_U, gamma, centred, scale = store.unembedding()
        W_U, gamma = torch.cat([W_U] * len(hooks)), torch.cat([gamma] * len(hooks))
        writer.add_unembedding(W_U, gamma, centred=centred, scale=scale)
        for shard in store.shards:
            with writer.shard(shard.n_rows) as (opened, documents, attributes):
                vectors = torch.cat([shard.rows(hook).float() for hook in hooks], 1)
                columns = {name: shard.column(name) for name in ("tokens", "doc_id", "position", "keep")}
                opened.write(columns, {hooks[-1]: encode(vectors, "float16")})
                documents |= {int(number): names[int(number)] for number in np.unique(columns["doc_id"])}
                attributes |= {"split": shard.split, "context": store.context, "cursor": (0, 0)}
            done[shard.split] += shard.n_rows
        writer.complete({"rows": done, "exhausted": False})
    return open_store(folder)


@torch.no_grad()
def product(sae_folder: Path, store: Store, hook: str) -> tuple[float, float]:
    """(seconds, processor seconds) of the encoder's product for a row, over 8,192 rows."""
    sae, shard = load_sae(sae_folder), store.of_split("train")[0]
    step = rows_of_a_block(sae.d_sae, sae.W_enc.device)
    x_RD = shard.rows(hook, 0, min(8192, shard.n_rows)).float()
    out = torch.zeros(step, sae.d_sae)
    blocks = x_RD.split(step)
    torch.mm(blocks[0], sae.W_enc, out=out[: len(blocks[0])])
    started, processor = time.perf_counter(), time.process_time()
    for block in blocks:
        torch.mm(block, sae.W_enc, out=out[: len(block)])
    return (time.perf_counter() - started) / len(x_RD), (time.process_time() - processor) / len(x_RD)


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
    parser.add_argument("--arch", choices=("topk", "jumprelu"), default="topk", help="of that SAE")
    parser.add_argument("--l0", type=int, default=32, help="of that SAE")
    parser.add_argument("--wide", action="store_true", help="all hooks of the store side by side, for that SAE")
    parser.add_argument("--rows", type=parse_count, help="training rows to index at most")
    parser.add_argument("--out", type=Path, default=Path("runs/index-benchmark"))
    args = parser.parse_args()
    if args.wide and not args.synthetic:
        parser.error("--wide needs --synthetic: an SAE of that width")
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
    if args.wide:
        store = side_by_side(args.out / "wide", store)
        hook = store.hooks[-1]
    if args.synthetic:
        sae = args.out / "saes" / f"{args.arch}-{args.l0}-{args.synthetic}"
        metadata = {name: value for name, value in config["metadata"].items() if name != "saebench"}
        metadata |= {"hook_name": hook}
        synthetic(sae, store, hook, args.synthetic, metadata, args.arch, args.l0)
    path = args.out / "index" / f"{sae.name}-{args.tokens or store.folder.name}.h5"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "saebench.cli", "index", "--sae", sae, "--store", store.folder, "--out", path]
    if args.rows:
        command += ["--tokens", str(args.rows)]
    alone = [product(sae, store, hook)]
    seconds, processor, peak, _ = measured(command)
    alone.append(product(sae, store, hook))
    n_rows = min(args.rows or 10_000_000, store.rows("train", kept=False))
    line = {
        "package": "saebench",
        "tokens": n_rows,
        "latents": load_sae(sae).d_sae,
        "harvest_s": round(harvest_s, 1) if args.tokens else None,
    }
    line |= {"index_s": round(seconds, 1), "tokens_per_s": round(n_rows / seconds), "peak_mb": round(peak)}
    product_s, product_cpu_s = (statistics.mean(times) * n_rows for times in zip(*alone, strict=True))
    line |= {"product_s": round(product_s, 1), "times_product": round(seconds / product_s, 2)}
    line |= {"cpu_s": round(processor, 1), "times_product_cpu": round(processor / product_cpu_s, 2)}
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
        _, _, peak, output = measured(command)
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

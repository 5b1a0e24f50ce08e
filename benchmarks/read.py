"""Time shuffled reading of a store from page cache, and measure how well it shuffles.

    python benchmarks/read.py                      # a synthetic store: 2.5M rows of 2,500 documents, d 512, float16
    python benchmarks/read.py activations/gpt2 --hooks 2 --buffer-rows 500k

Prints one JSON line. `rows_per_s` and `gb_per_s` (10⁹ bytes, as stored) are those of one pass over the
training rows, checksums verified, in batches as training takes them; the files are read once before, so that
the kernel has them. `quality` is the mean number of different documents in a batch over that of a perfect
global shuffle of the same kept rows, Σ_docs (1 - C(N - n_doc, B) / C(N, B)), over the same pass and in the
same order as the rows; `quality_estimated` is what a run says at its start. `gb_per_core_s` counts processor time instead, all threads together, which other
programs on the machine disturb less. `copy_gb_per_s`, for scale, is a copy in memory of as many bytes, timed just before.
With `--hooks n` n hooks are read side by side, a batch of each in turn, and the figures are their sum.
"""

import argparse
import json
import resource
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from scipy.special import gammaln

from saebench.config import parse_count
from saebench.store import Store, StoreWriter, open_store, shuffled_batches
from saebench.store.coding import encode, row_bytes
from saebench.store.schema import StoreDtype
from saebench.store.shuffle import quality, shuffled_documents

CONTEXT = 256


def synthesize(folder: Path, rows: int, documents: int, d_in: int, dtype: StoreDtype, hooks: int) -> Store:
    """A store of normal vectors whose documents have log-normal lengths, a mean of rows / documents and σ = 1."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(0.0, 1.0, documents)
    ends = np.cumsum(np.maximum(1, lengths * rows / lengths.sum()).astype(np.int64))
    doc_id = np.searchsorted(ends, np.arange(rows), side="right").clip(max=documents - 1).astype(np.int32)
    position = (np.arange(rows) % CONTEXT).astype(np.int32)
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(hooks)]
    writer = StoreWriter(folder, {"context": CONTEXT}, dict.fromkeys(names, d_in), dtype)
    per_shard, part = 256 * CONTEXT, 1 << 14
    noise = torch.randn(part, d_in, generator=torch.Generator().manual_seed(0))
    for first in range(0, rows, per_shard):
        end = min(first + per_shard, rows)
        with writer.shard(end - first) as (shard, names_of, attributes):
            for start in range(first, end, part):
                stop = min(start + part, end)
                columns = {"tokens": position, "doc_id": doc_id, "position": position, "keep": position > 0}
                columns = {
                    name: (value[start:stop] if len(value) == rows else value) for name, value in columns.items()
                }
                vectors = encode(noise[: stop - start] + start % 97, dtype)
                shard.write(columns, dict.fromkeys(names, vectors))
            names_of |= {int(i): f"document {i}" for i in np.unique(doc_id[first:end])}
            attributes |= {"split": "train", "context": CONTEXT, "cursor": (0, 0)}
    writer.complete({"rows": {"train": rows}, "exhausted": False})
    return open_store(folder)


def perfect(store: Store, batch: int) -> float:
    """Mean number of documents in `batch` kept training rows drawn without putting back."""
    kept = [shard.column("doc_id")[shard.column("keep")] for shard in store.of_split("train")]
    _, counts = np.unique(np.concatenate(kept), return_counts=True)
    total = counts.sum()
    rest = (total - counts).astype(np.float64)
    enough = rest >= batch
    log_none = np.full(len(counts), -np.inf)
    log_none[enough] = gammaln(rest[enough] + 1) - gammaln(rest[enough] - batch + 1)
    log_none[enough] -= gammaln(total + 1.0) - gammaln(total - batch + 1.0)
    return float((1 - np.exp(log_none)).sum())


def measured(store: Store, batch: int, buffer_rows: int) -> dict[str, float]:
    batches = store.rows("train", kept=True) // batch
    documents = islice(shuffled_documents(store, batch, seed=0, buffer_rows=buffer_rows), batches)
    here, best = float(np.mean([len(rows.unique()) for rows in documents])), perfect(store, batch)
    return {
        "quality": round(here / best, 4),
        "quality_estimated": round(quality(store, batch, buffer_rows), 4),
        "documents_per_batch": round(here, 1),
        "documents_per_perfect_batch": round(best, 1),
    }


def copy_gb_per_s(n_bytes: int) -> float:
    source, target = np.ones(n_bytes, np.uint8), np.ones(n_bytes, np.uint8)
    started = time.perf_counter()
    np.copyto(target, source)
    return n_bytes / (time.perf_counter() - started) / 1e9


def read(store: Store, hooks: list[str], batch: int, buffer_rows: int) -> dict[str, float]:
    """One pass over the training rows of each hook."""
    stored = sum(row_bytes(store.manifest["dtype"], store.d_in(hook)) for hook in hooks)
    for shard in store.shards:
        shard.path.read_bytes()
    copy = copy_gb_per_s(1 << 28)
    started, spent = time.perf_counter(), time.process_time()
    streams = [shuffled_batches(store, hook, batch, seed=0, buffer_rows=buffer_rows) for hook in hooks]
    batches = store.rows("train", kept=True) // batch
    first = None
    for _ in range(batches):
        for stream in streams:
            next(stream)
        first = first or time.perf_counter() - started
    seconds, spent = time.perf_counter() - started, time.process_time() - spent
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]
    return {
        "rows_per_s": round(batches * batch * len(hooks) / seconds),
        "gb_per_s": round(batches * batch * stored / seconds / 1e9, 3),
        "gb_per_core_s": round(batches * batch * stored / spent / 1e9, 3),
        "copy_gb_per_s": round(copy, 2),
        "first_batch_s": round(first or 0.0, 3),
        "seconds": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, nargs="?", help="a store (default: a synthetic one, made and deleted)")
    parser.add_argument("--hooks", type=int, default=1, help="hooks to read side by side")
    parser.add_argument("--batch", type=parse_count, default=4096)
    parser.add_argument("--buffer-rows", type=parse_count, default=500_000, help="rows of the shuffle buffer")
    parser.add_argument("--rows", type=parse_count, default=2_500_000, help="of the synthetic store")
    parser.add_argument("--documents", type=parse_count, default=2500)
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32", "int8"])
    parser.add_argument("--repeats", type=int, default=3, help="the fastest pass counts")
    parser.add_argument("--folder", type=Path, help="where to make the synthetic store (default: temporary files)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.store:
            store = open_store(args.store)
        else:
            store = synthesize(Path(folder) / "store", args.rows, args.documents, args.d, args.dtype, args.hooks)
        hooks = store.hooks[: args.hooks]
        dtype, d_in = store.manifest["dtype"], store.d_in(hooks[0])
        passes = [read(store, hooks, args.batch, args.buffer_rows) for _ in range(args.repeats)]
        line = {
            "rows": store.rows("train"), "documents": store.manifest["documents"], "d_in": d_in, "dtype": dtype,
            "hooks": len(hooks), "batch": args.batch, "buffer_rows": args.buffer_rows,
            **max(passes, key=lambda each: each["gb_per_s"]),
            "all_gb_per_s": [each["gb_per_s"] for each in passes],
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            **measured(store, args.batch, args.buffer_rows),
        }  # fmt: skip
        print(json.dumps(line))


if __name__ == "__main__":
    main()

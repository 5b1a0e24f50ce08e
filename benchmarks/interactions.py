"""What few interactions say of a latent, beside least squares and ANDs alone; whether the way of masking matters; what it costs.

    python benchmarks/interactions.py --sae runs/demo/saes/topk-k48 --pairs 100

Pairs of a latent and one of its examples are drawn by chance. For each, at n = 10 units: R² over all 1,024 maskings (a constant is free in
all of them), the share of salient interactions in common under two ways of masking, whether masking the largest positive set alone
silences the latent, and the same for as many of the units on which it fires most. Figures are printed as they come, their medians at the end.
"""

import argparse
import itertools
import logging
import time
from pathlib import Path

import numpy as np
import torch

from saebench.interactions import activation, corpus_counts, interactions, mask_of
from saebench.interactions.found import curve
from saebench.interactions.mobius import and_only
from saebench.interactions.run import activations
from saebench.steer import open_bench

KS = (5, 10, 20, 50)


def least_squares(v: np.ndarray, pairs: bool, most: int | None = None) -> float:
    """R² of a fit by linear terms, or these and pairs; `most` are taken one by one, each that which fits best beside those before."""
    n = len(v).bit_length() - 1
    bits = (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(float)
    terms = [*bits.T, *(bits[:, i] * bits[:, j] for i, j in itertools.combinations(range(n), 2) if pairs)]
    columns = np.stack(terms, 1) - np.mean(terms, 1)
    taken, rest = list(range(columns.shape[1])) if most is None else [], v - v.mean()
    for _ in range(most or 1):
        if most is not None:
            fit = np.abs(columns.T @ rest) / np.linalg.norm(columns, axis=0)
            fit[taken] = -1
            taken.append(int(fit.argmax()))
        rest = v - v.mean() - columns[:, taken] @ np.linalg.lstsq(columns[:, taken], v - v.mean(), rcond=None)[0]
    return float(1 - (rest**2).mean() / v.var())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--reach", type=int, default=32)
    parser.add_argument(
        "--ways", nargs=2, default=("unattended", "neutral"), help="of masking: the one measured, and the other"
    )
    parser.add_argument("--device")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    bench = open_bench(options.sae, device=options.device)
    assert bench.index is not None
    random, counts = np.random.default_rng(0), corpus_counts(bench)
    mask, other = (mask_of(bench.model, way, counts) for way in options.ways)
    alive = np.flatnonzero(bench.index.columns["fires"] >= 20)
    rows: list[dict[str, float]] = []
    while len(rows) < options.pairs:
        latent = int(random.choice(alive))
        of = bench.index[latent]
        examples = [*of.top, *of.random]
        context = bench.index.context_of(examples[int(random.integers(len(examples)))].row)
        ids = context.tokens[: context.peak + 1].astype(np.int64)
        if len(ids) < 12 or (ids[1:] == ids[0]).any():
            continue
        started, busy = time.perf_counter(), time.process_time()
        scalar = activation(bench.sae, bench.ends, latent)
        try:
            found = interactions(bench.model, ids, scalar, mask, other, reach=options.reach, step=lambda *_: None)
        except ValueError as error:
            print(f"latent {latent}: {error}")
            continue
        row = {"seconds": time.perf_counter() - started, "processor seconds": time.process_time() - busy}
        v, row["tokens"], row["gap"] = found.values, len(ids), found.gap
        row["faithful"] = float(np.abs(found.split.rebuilt() - v).max() / np.abs(v).max())
        ands, row["salient"] = curve(and_only(v), v), len(found.sets)
        for k in KS:
            row[f"R² by {k}"], row[f"R² by {k} ANDs"] = found.curve[k], ands[k]
        row["terms for 0.9"] = int(np.argmax(np.array(found.curve) >= 0.9)) or 101
        row["ANDs for 0.9"] = int(np.argmax(ands >= 0.9)) or 101
        row |= {"10 linear": least_squares(v, False), "10 linear, 45 pairs": least_squares(v, True)}
        row["best 20 of linear and pairs"] = least_squares(v, True, 20)
        row["agreement"] = found.agreement or 0.0
        acts = activations(bench, ids, latent)
        first = next((one for one in found.sets if one.strength > 0), found.sets[0])
        strongest = sorted(range(len(found.units)), key=lambda unit: -max(acts[list(found.units[unit])]))[: first.order]
        whole = len(v) - 1
        row["order of the largest"] = first.order
        row["silenced by the largest set"] = float(v[whole - sum(1 << unit for unit in first.units)] <= 0)
        row["silenced by the highlighted"] = float(v[whole - sum(1 << unit for unit in strongest)] <= 0)
        row["left by the largest set"] = float(v[whole - sum(1 << unit for unit in first.units)] / v[whole])
        row["left by the highlighted"] = float(v[whole - sum(1 << unit for unit in strongest)] / v[whole])
        rows.append(row)
        print(
            f"{len(rows)} latent {latent}, " + ", ".join(f"{name} {value:.3g}" for name, value in row.items()),
            flush=True,
        )
    print(f"\n{torch.get_num_threads()} threads, {len(rows)} pairs: median, mean")
    for name in rows[0]:
        values = [row[name] for row in rows]
        print(f"| {name} | {np.median(values):.3g} | {np.mean(values):.3g} |")


if __name__ == "__main__":
    main()

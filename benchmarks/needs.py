"""Whether interactions find what a latent is known to need, and whether it is silent without it.

    python benchmarks/needs.py --sae runs/demo/saes/topk-k48 --pairs 60

Known rules: pairs of a latent and a training row on which it fires and a literal of its name holds that says something of the token before
(`tokens "a" "b"`, `after …`), and none that says something of its own token alone. Is the largest AND that raises it the token that is named?
Deletion: on the strongest examples of latents by chance, the largest set that raises it is masked; and as many tokens on which the latent
fires most, as pages highlight them, or that lower it most when masked alone. How often is it silent, and what is left?
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import torch

from saebench.index.explain import labelled_rows
from saebench.index.names import Names
from saebench.interactions import activation, interactions, mask_of
from saebench.interactions.explain import Silent, Unmoved
from saebench.interactions.masking import Masked
from saebench.interactions.run import activations
from saebench.labels import labeller_of
from saebench.pieces import TokenBytes
from saebench.steer import Bench, open_bench


def known_rules(bench: Bench, pairs: int, least: float, random: np.random.Generator) -> list[tuple[int, int, str]]:
    """(latent, row, literal)."""
    index = bench.index
    assert index is not None
    names, f1 = Names(index), Names(index).columns["name_f1"]
    good = [
        int(latent) for latent in random.permutation(np.flatnonzero(f1 >= least)) if names[int(latent)].source == "rule"
    ]
    wanted = {latent: index.literals_of("rules", latent) for latent in good}
    only = list(dict.fromkeys(name for some in wanted.values() for name in some))
    sample = index.sample("train")
    labellers = [labeller_of(name) for name in dict.fromkeys(index.literals_now[name] for name in only)]
    texts = TokenBytes(index.store.tokenizer()).all()
    _, rows = labelled_rows(index.store, "train", sample, index.d_sae, texts, labellers, only)
    number, found = {name: place for place, name in enumerate(only)}, []
    for latent, literals in wanted.items():
        fires = rows.firing[:, [latent]].toarray()[:, 0] > 0
        before = [one for one in literals if re.match(r"tokens |after token |after class", one)]
        alone = [one for one in literals if one not in before]
        elsewhere = rows.literals[:, [number[one] for one in alone]].sum(1) > 0 if alone else np.zeros(len(fires), bool)
        for one in before:
            there = np.flatnonzero(fires & rows.literals[:, [number[one]]].toarray()[:, 0] & ~elsewhere)
            if len(there):
                found.append((latent, int(sample.rows[random.choice(there)]), one))
                break
        if len(found) >= pairs:
            break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", type=Path, required=True)
    parser.add_argument(
        "--known", type=int, default=60, help="pairs of a latent and a row that a known rule is held to"
    )
    parser.add_argument("--pairs", type=int, default=60, help="latents that are to be silenced")
    parser.add_argument("--n", type=int, default=6)
    parser.add_argument("--least", type=float, default=0.6, help="F1 of a name that is taken for known")
    options = parser.parse_args()
    bench, random = open_bench(options.sae), np.random.default_rng(0)
    index, mask = bench.index, mask_of(bench.model, "unattended")
    assert index is not None
    counts = {"is it alone": 0, "has it": 0, "by chance has it": 0.0, "among the salient": 0, "pairs": 0}
    known = known_rules(bench, options.known, options.least, random) if options.known else []
    for latent, row, literal in known:
        context = index.context_of(row)
        ids, scalar = context.tokens[: context.peak + 1].astype(np.int64), activation(bench.sae, bench.ends, latent)
        try:
            found = interactions(bench.model, ids, scalar, mask, n=options.n, step=lambda *_: None)
        except (Silent, Unmoved):
            continue
        raising = [one for one in found.sets if one.strength > 0 and one.kind == "and"]
        told = [{len(ids) - 1 - found.units[unit][-1] for unit in one.units} for one in raising]
        counts["pairs"] += 1
        counts["is it alone"] += bool(told) and told[0] == {1}
        counts["has it"] += bool(told) and 1 in told[0]
        counts["by chance has it"] += len(told[0]) / len(found.units) if told else 0
        counts["among the salient"] += {1} in told
        print(latent, literal, told[:3], flush=True)
    print("known rules:", json.dumps(counts), flush=True)

    rows: dict[str, list[float]] = {"set": [], "highlighted": [], "alone": []}
    sizes = []
    for latent in random.permutation(np.flatnonzero(index.columns["fires"] >= 20)).tolist():
        if len(sizes) == options.pairs:
            break
        context = index.context_of(index[latent].top[0].row)
        ids, scalar = context.tokens[: context.peak + 1].astype(np.int64), activation(bench.sae, bench.ends, latent)
        try:
            found = interactions(bench.model, ids, scalar, mask, n=options.n, step=lambda *_: None)
        except (Silent, Unmoved):
            continue
        first = next((one for one in found.sets if one.strength > 0), None)
        if first is None:
            continue
        within = range(max(1, len(ids) - 33), len(ids) - 1)
        acts, whole = activations(bench, ids, latent), len(found.values) - 1
        falls = [found.values[whole] - found.values[whole - (1 << unit)] for unit in range(len(found.units))]
        chosen = {
            "set": [found.units[unit][0] for unit in first.units],
            "highlighted": sorted(within, key=lambda place: -acts[place])[: first.order],
            "alone": [found.units[unit][0] for unit in np.argsort(falls)[::-1][: first.order]],
        }
        for what, places in chosen.items():
            units = [[place] for place in sorted(places)]
            masked = Masked(bench.model, torch.from_numpy(ids), units, scalar, mask)
            rows[what].append(float(masked.values(np.zeros((1, len(units)), bool))[0]) / found.whole)
        sizes.append(first.order)
    print(
        f"\ndeletion, {len(sizes)} examples, sets of {np.mean(sizes):.2f} tokens\n| masked | silent | left (mean) | left (median) |\n|---|---|---|---|"
    )
    for what, left in rows.items():
        print(f"| {what} | {np.mean(np.array(left) <= 0):.0%} | {np.mean(left):.2f} | {np.median(left):.2f} |")


if __name__ == "__main__":
    main()

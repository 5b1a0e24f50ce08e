"""How well an index' names tell where latents fire: medians over all latents, by where names come from, and some of them.

python benchmarks/names.py --sae runs/demo/saes/topk-k48 --show 20
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from saebench.index import IndexConfig, open_feature_index
from saebench.index.explanations import read_explanations
from saebench.index.names import Names
from saebench.index.needs import read_needs


def median(values: np.ndarray) -> str:
    known = values[~np.isnan(values)]
    return f"{np.median(known):.3f}" if len(known) else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", type=Path, default=Path("runs/demo/saes/topk-k48"))
    parser.add_argument("--index", type=Path, help="default: index/NAME.h5 beside saes/")
    parser.add_argument("--store", type=Path)
    parser.add_argument(
        "--show", type=int, default=0, help="so many latents at random, with their top logits and strongest examples"
    )
    args = parser.parse_args()
    with open_feature_index(args.index or IndexConfig(sae=args.sae).path, sae=args.sae, store=args.store) as index:
        judged, needs = read_explanations(index), read_needs(index)
        names = Names(index, judged=judged, needs=needs)
        columns, explained = names.columns, names.columns["explained"].astype(bool)
        f1, detection = columns["name_f1"], columns["name_detection"]
        print("| | latents | share | F1 | detection |\n|---|---|---|---|---|")
        rows = {"all that are scored": ~np.isnan(f1), "with a name": explained}
        sources = np.array([names[latent].source if explained[latent] else "" for latent in range(index.d_sae)])
        rows |= {
            f"named by {source}": sources == source
            for source in ("rule", "tokens", "interactions", "judge")
            if (sources == source).any()
        }
        for what, chosen in rows.items():
            print(
                f"| {what} | {chosen.sum():,} | {chosen.mean():.1%} | {median(f1[chosen])} | {median(detection[chosen])} |"
            )
        for what in ("rule", "tokens"):
            print(
                f"| {what}, whether it is the name or not | | | {median(index.columns[f'{what}_f1'])} | {median(index.columns[f'{what}_detection'])} |"
            )
        if needs:  # whether the rules that interactions make are worth having, in means
            without, named = Names(index, judged=judged).columns, np.flatnonzero(sources == "interactions")
            for whose, of in {"explained": np.array(list(needs)), "named by interactions": named}.items():
                for what, figures in {"with": columns, "without": without}.items() if len(of) else ():
                    share, f1, told = (figures[name][of] for name in ("explained", "name_f1", "name_detection"))
                    scores = f"{share.mean():.1%} named | {np.nanmean(f1):.3f} | {np.nanmean(told):.3f}"
                    print(f"| {whose}, {what} these: means | {len(of):,} | {scores} |")
        if args.show:
            print("\n| latent | name | scores | top logits | fires most on |\n|---|---|---|---|---|")
        for latent in np.random.default_rng(16).permutation(index.d_sae)[: args.show].tolist():
            name, found = names[latent], index[latent]
            said = name.text if name.explained else f"*{name.text}*"
            logits = " ".join(repr(piece) for piece in index.pieces(found.top_logits.ids[:5]))
            texts = " / ".join("".join(index.context_of(example.row, 4).pieces) for example in found.top[:2])
            print(
                "| "
                + " | ".join(
                    cell.replace("|", "\\|").replace("\n", "⏎")
                    for cell in (str(latent), said, name.scored, logits, texts)
                )
                + " |"
            )


if __name__ == "__main__":
    sys.exit(main())

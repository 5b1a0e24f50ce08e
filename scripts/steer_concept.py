"""Find a latent for a concept in an SAE of the demo, and steer with it: one command after `make demo`.

    python scripts/steer_concept.py "raise" [--prompt "def main("]

The concept is looked for in the rules of the index ('all capitals', 'number', 'raise', …). Of the latents whose rule names
it, those of the highest output score times the rule's held-out F1 are tried at several strengths, and the one of the best
dose-response is taken, at the strength marked as best. Printed are texts unsteered, steered, with a random direction of the same norm, and with the negative strength.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from saebench.index import IndexConfig, open_feature_index
from saebench.printed import show_texts
from saebench.steer import Sampling, arms_of, generate
from saebench.steer.dose import dose_response
from saebench.steer.run import SteerConfig, rank

TRIED = 6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("concept")
    parser.add_argument("--sae", type=Path, default=Path("runs/demo/saes/topk-k48"))
    parser.add_argument("--prompt", default="def main(")
    parser.add_argument("--n", type=int, default=3)
    args = parser.parse_args()
    try:
        index = open_feature_index(IndexConfig(sae=args.sae).path, sae=args.sae)
    except (ValueError, OSError) as error:
        print(f"{error} (the demo's SAE and index come from `make demo`)", file=sys.stderr)
        return 2
    rules = index.described("rules")
    named = [latent for latent, rule in enumerate(rules) if args.concept.lower() in rule.lower()]
    if not named:
        print(
            f"no rule in {index.path} names {args.concept!r}; try raise, docstring, decorator or comment",
            file=sys.stderr,
        )
        return 2
    if not all(index.applies("rules", latent) for latent in named):
        print(
            f"the rules of {index.path} are of labels that are no longer made; delete it and index again",
            file=sys.stderr,
        )
        return 2
    bench, scores, _ = rank(SteerConfig(sae=args.sae, latent=tuple(named)))  # each of them measured whole
    worth = scores.output * np.nan_to_num(scores.input)
    tried = sorted(named, key=lambda latent: -worth[latent])[:TRIED]
    doses = {latent: dose_response(bench.model, bench.intervention(latent, 0), index).best for latent in tqdm(tried)}
    latent = max(tried, key=lambda latent: doses[latent].score)
    start, best = bench.intervention(latent, 0), doses[latent]
    print(f"{len(named)} latents have a rule that names {args.concept!r}; taken is {latent}: {rules[latent]}")
    print(
        f"output score {scores.output[latent]:.3f}, rule's F1 {scores.input[latent]:.2f}, top logits {index.pieces(index[latent].top_logits.ids[:8])}"
    )
    concept, fluency, score = best.told()
    print(
        f"best strength {best.norm:.2f} of the median norm; on prompts that did not choose it: concept {concept}, fluency {fluency}, score {score}"
    )
    arms = arms_of([dataclasses.replace(start, strength=best.strength)])
    made = generate(bench.model, args.prompt, arms, Sampling(n_samples=args.n, max_new_tokens=48))
    print(show_texts(args.prompt, made))
    return 0


if __name__ == "__main__":
    sys.exit(main())

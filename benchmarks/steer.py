"""Does steering do what it says, and what does it cost?

    python benchmarks/steer.py --sae runs/demo/saes/topk-k48 [--latents 24] [--speed-only]
    python benchmarks/steer.py --sae runs/demo/saes/topk-k48 --screen 1000

Latents are chosen in two steps: the --pool of highest output score among those that are not dense and whose rule has an F1 of
at least 0.3 on held-out documents; of these the ones of the best dose-response at two strengths. Each at the strength that
its full dose-response marks as best continues prompts, with a seed, that chose neither latent nor strength. Counted is in how
many of the texts the latent's rule holds at a generated token, beside the unsteered texts and those under a random direction
of the same norm: odds ratios with ½ added to each cell and 95% intervals (Woolf 1955; Haldane's correction).
A prompt's texts count as independent. Prints a Markdown table, then the speed of steered generation as a JSON line.

With --screen N it ranks anew, measures N random latents whole, and prints one JSON line: the seconds of the ranking, and how many
of the N's best 100 are among those that the screen puts first of them, as many as a ranking measures.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from saebench.index import IndexConfig
from saebench.steer.dose import DoseConfig, dose_response, held_out
from saebench.steer.generate import UNSTEERED, Sampling, Text, arms_of, generate
from saebench.steer.run import Bench, SteerConfig, rank
from saebench.steer.scores import ScoreConfig

PROMPT = "def main("
COLUMNS = (
    "latent", "rule", "output score", "strength, of the norm",
    "texts in which the rule holds: unsteered / random / steered", "odds ratio against unsteered", "against random",
    "cross-entropy, nats: random / steered",
)  # fmt: skip


def odds_ratio(hits: int, other: int, count: int) -> tuple[float, float, float]:
    """(odds ratio, ends of its 95% interval) of hits of one arm against another's, of `count` texts each."""
    cells = [hits + 0.5, count - hits + 0.5, other + 0.5, count - other + 0.5]
    log_ratio = math.log(cells[0] * cells[3] / (cells[1] * cells[2]))
    spread = 1.96 * math.sqrt(sum(1 / cell for cell in cells))
    return math.exp(log_ratio), math.exp(log_ratio - spread), math.exp(log_ratio + spread)


def hits(bench: Bench, latent: int, prompts: Sequence[np.ndarray], texts: Sequence[Text]) -> int:
    """In how many texts the latent's rule holds at a generated token."""
    assert bench.index
    held = bench.index.holds(latent, [np.concatenate([prompts[text.prompt], text.tokens]) for text in texts])
    assert held is not None
    return sum(bool(mask[len(prompts[text.prompt]) :].any()) for mask, text in zip(held, texts, strict=True))


def screened(bench: Bench, pool: Sequence[int], doses: DoseConfig) -> list[int]:
    """The pool by the score of its better one of two strengths, best first."""
    assert bench.index
    short = dataclasses.replace(doses, strengths=("0.5n", "1n"), n_samples=2, held_out=1)
    scores = [
        dose_response(bench.model, bench.intervention(latent, 0), bench.index, short).best.score
        for latent in tqdm(pool, desc="screen", unit="latent")
    ]
    return [pool[place] for place in np.argsort(-np.array(scores), kind="stable")]


def measured(
    bench: Bench, latent: int, doses: DoseConfig, prompts: Sequence[np.ndarray], n_samples: int
) -> dict[str, Any]:
    """The figures of one latent, on prompts and with a seed that did not choose its strength."""
    assert bench.index
    best = dose_response(bench.model, bench.intervention(latent, 0), bench.index, doses).best
    arms = arms_of([bench.intervention(latent, best.strength)], seed=doses.seed + 1)
    del arms["negative"]
    sampling = Sampling(max_new_tokens=doses.max_new_tokens, n_samples=n_samples, seed=doses.seed + 1)
    made = generate(bench.model, prompts, arms, sampling, measure="clean")
    count = len(prompts) * n_samples
    counts = {arm: hits(bench, latent, prompts, made.of(arm)) for arm in arms}
    surprise = {arm: float(np.mean([text.cross_entropy for text in made.of(arm)])) for arm in arms}
    return {
        "latent": latent, "norm": best.norm, "count": count, "hits": counts,
        "against": {arm: odds_ratio(counts["steered"], counts[arm], count) for arm in (UNSTEERED, "random")},
        "cost": {arm: surprise[arm] - surprise[UNSTEERED] for arm in ("steered", "random")},
    }  # fmt: skip


def row(bench: Bench, found: dict[str, Any], output: float) -> str:
    assert bench.index
    ratios = [f"{ratio:.1f} ({low:.1f} to {high:.0f})" for ratio, low, high in found["against"].values()]
    text = bench.index.explanations[found["latent"]].replace("|", "\\|")
    shares = " / ".join(str(found["hits"][arm]) for arm in (UNSTEERED, "random", "steered"))
    cost = " / ".join(f"{found['cost'][arm]:+.2f}" for arm in ("random", "steered"))
    return f"| {found['latent']} | {text} | {output:.2f} | {found['norm']:.2f} | {shares} | {' | '.join(ratios)} | {cost} |"


def passes(found: dict[str, Any]) -> bool:
    return all(ratio >= 3 and low > 1.5 for ratio, low, _ in found["against"].values())


def speed(bench: Bench, latent: int, repeats: int = 15) -> dict[str, Any]:
    """Medians over alternating runs of one text: first token and tokens a second, steered over unsteered."""
    found: dict[str, list[float]] = {}
    for name in [UNSTEERED, "steered"] * (repeats + 1):
        arms = {UNSTEERED: [] if name == UNSTEERED else [bench.intervention(latent, "0.5n")]}
        made = generate(bench.model, PROMPT, arms, Sampling(max_new_tokens=64, temperature=0.0))
        found.setdefault(f"{name} first", []).append(made.seconds["first_token"])
        rate = len(made.texts[0].tokens) / made.seconds["generate"]
        found.setdefault(f"{name} rate", []).append(rate)
        found.setdefault(f"{name} measure", []).append(made.seconds["measure"])
    middle = {name: statistics.median(values[1:]) for name, values in found.items()}
    return {
        "first_token_ms": round(1e3 * middle["steered first"], 1), "first_token_ratio": round(middle["steered first"] / middle["unsteered first"], 3),
        "tokens_per_s": round(middle["steered rate"], 1), "tokens_per_s_ratio": round(middle["steered rate"] / middle["unsteered rate"], 3),
        "kl_pass_ms": round(1e3 * middle["steered measure"], 1),
    }  # fmt: skip


def screen(sae: Path, n: int) -> dict[str, Any]:
    """How fast a ranking is, and how many of the best of `n` random latents its screen keeps. The SAE's own scores stay."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{sae.name}.h5"
        path.symlink_to(IndexConfig(sae=sae).path.resolve())
        started = time.perf_counter()
        bench, scores, _ = rank(SteerConfig(sae=sae, index=path))
        seconds = time.perf_counter() - started
        some = np.random.default_rng(0).permutation(bench.sae.d_sae)[:n]
        _, measured, _ = rank(SteerConfig(sae=sae, index=path, latent=tuple(int(latent) for latent in some)))
    best = some[np.argsort(-measured.output[some])][:100]
    kept = some[np.argsort(-scores.screen[some])][: ScoreConfig().whole]
    return {
        "latents": bench.sae.d_sae, "seconds": round(seconds, 1), "among": len(some), "kept": len(kept), "best": len(best),
        "best_kept": int(np.isin(best, kept).sum()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", type=Path, default=Path("runs/demo/saes/topk-k48"))
    parser.add_argument("--latents", type=int, default=24)
    parser.add_argument("--pool", type=int, default=120)
    parser.add_argument("--prompts", type=int, default=16, help="that test, of 4 texts each in each arm")
    parser.add_argument("--max-new-tokens", type=int, default=DoseConfig().max_new_tokens)
    parser.add_argument("--speed-only", action="store_true")
    parser.add_argument(
        "--screen", type=int, metavar="N", help="time a ranking, and measure its screen on N random latents"
    )
    args = parser.parse_args()
    if args.screen:
        print(json.dumps(screen(args.sae, args.screen)))
        return

    bench, scores, order = rank(SteerConfig(sae=args.sae, top=2**31))
    index = bench.index
    assert index
    if not args.speed_only:
        doses = DoseConfig(max_new_tokens=args.max_new_tokens)
        prompts = held_out(index.store, doses.prompts + args.prompts, doses.prompt_tokens, doses.seed)[doses.prompts :]
        good = (scores.input >= 0.3) & ~index.flagged("dense")
        pool = [int(latent) for latent in order if good[latent]][: args.pool]
        chosen = screened(bench, pool, doses)[: args.latents]
        print(f"{good.sum()} latents have a rule of F1 0.3 and are not dense; {len(pool)} of them screened.\n")
        print("| " + " | ".join(COLUMNS) + " |")
        print("|" + "---|" * len(COLUMNS))
        passed = 0
        for latent in chosen:
            found = measured(bench, latent, doses, prompts, 4)
            passed += passes(found)
            print(row(bench, found, float(scores.output[latent])), flush=True)
        print(f"\n{passed} of {len(chosen)} have odds ratios of at least 3, lower bounds above 1.5, against both.")
    print(json.dumps(speed(bench, int(order[0]))))


if __name__ == "__main__":
    sys.exit(main())

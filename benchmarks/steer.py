"""Does steering do what it says, and what does it cost?

    python benchmarks/steer.py --sae runs/demo/saes/topk-k48 [--latents 20] [--random] [--strengths 0.2n,0.5n,1n] [--prompts 40]
    python benchmarks/steer.py --sae runs/demo/saes/topk-k48 --speed-only
    python benchmarks/steer.py --sae runs/demo/saes/topk-k48 --screen 1000

A dose-response (`saebench.steer.dose`) of each of some latents that are not dense: those of the highest output score, or with --random
any that fire, drawn by a seed. The best strength is chosen on half of the prompts; the table is of the other half, beside a random direction
and another latent's of like density at the same norm. A latent *stands clear* where the lower end of its score's interval lies above the
upper ends of both controls'. Prints a Markdown table; with --speed-only the speed of steered generation as a JSON line.

With --screen N it ranks anew, measures N random latents whole, and prints one JSON line: the seconds of the ranking, and how many
of the N's best 100 are among those that the screen puts first of them, as many as a ranking measures.
"""

import argparse
import json
import statistics
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np

from saebench.index import IndexConfig
from saebench.index.names import Names
from saebench.steer.dose import STRENGTHS, Dose, DoseConfig, DoseResponse, dose_response
from saebench.steer.generate import UNSTEERED, Sampling, generate
from saebench.steer.run import Bench, SteerConfig, rank
from saebench.steer.scores import ScoreConfig

PROMPT = "def main("
COLUMNS = (
    "latent", "name, its F1", "strength, of the norm", "concept", "fluency", "score", "score, random direction", "score, another latent",
    "texts in which the rule holds: unsteered / steered", "clear",
)  # fmt: skip


def clear(found: DoseResponse) -> bool:
    """Whether the best strength's score is above every control's, by their intervals."""
    best, *controls = found.tested
    return all(best.intervals["score"][0] > control.intervals["score"][1] for control in controls)


def row(bench: Bench, found: DoseResponse) -> str:
    assert bench.index
    best, *controls = found.tested
    scores = {control.arm: control.told()[-1] for control in controls}
    name = Names(bench.index)[found.latent]
    text = textwrap.shorten(name.text, 70, placeholder=" …").replace("|", "\\|") if name.explained else "–"
    cells = [
        str(found.latent), f"{text}, {name.f1:.2f}", "–" if best.norm is None else f"{best.norm:.2f}", *best.told(), scores["random"],
        scores.get("other", "–"), f"{share(found.doses[0])} / {share(best)}", "yes" if clear(found) else "",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def share(dose: Dose) -> str:
    return "–" if dose.rule is None else f"{dose.rule:.0%}"


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
    parser.add_argument("--latents", type=int, default=20)
    parser.add_argument("--random", action="store_true", help="any latents that fire and are not dense")
    parser.add_argument("--strengths", default=",".join(STRENGTHS))
    parser.add_argument("--prompts", type=int, default=40, help="half of them choose, half test")
    parser.add_argument("--speed-only", action="store_true")
    parser.add_argument(
        "--screen", type=int, metavar="N", help="time a ranking, and measure its screen on N random latents"
    )
    args = parser.parse_args()
    if args.screen:
        print(json.dumps(screen(args.sae, args.screen)))
        return

    if args.random:
        bench = SteerConfig(sae=args.sae).open()
        order = np.random.default_rng(0).permutation(bench.sae.d_sae)
    else:
        bench, _, order = rank(SteerConfig(sae=args.sae, top=2**31))
    index = bench.index
    assert index
    good = (index.columns["fires"] > 0) & ~index.flagged("dense")
    chosen = [int(latent) for latent in order if good[latent]][: args.latents]
    if not args.speed_only:
        doses = DoseConfig(strengths=tuple(args.strengths.split(",")), prompts=args.prompts, n_samples=1)
        print("| " + " | ".join(COLUMNS) + " |")
        print("|" + "---|" * len(COLUMNS))
        passed, scores = 0, []
        for latent in chosen:
            found = dose_response(bench.model, bench.intervention(latent, 0), index, doses)
            passed += clear(found)
            scores.append([dose.score for dose in found.tested])
            print(row(bench, found), flush=True)
        medians = ", ".join(f"{statistics.median(column):.2f}" for column in zip(*scores, strict=False))
        print(
            f"\n{passed} of {len(chosen)} stand clear of both controls. Median scores, steered and controls: {medians}."
        )
    if args.speed_only:
        print(json.dumps(speed(bench, chosen[0])))


if __name__ == "__main__":
    sys.exit(main())

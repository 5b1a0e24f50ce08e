"""Time the evaluation of a run's SAEs, and where the time goes.

    python benchmarks/evaluate.py --run runs/demo --tokens 20000 --rows 100000

Prints one JSON line. `arm_tokens_per_s` is held-out tokens times arms (clean, zero, mean and each SAE) over the time of
the whole evaluation, model loading and baselines included. The shares are of that time, by the profiler.
The run is copied, not changed; all its SAEs must read one hook.
"""

import argparse
import cProfile
import json
import pstats
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from saebench.evaluate import EvalConfig, evaluate
from saebench.files import read_json

SHARES = {
    "forward": ("capture", "spliced_logits", "clean_pass", "resumed_logits"),
    "softmax": ("loss_and_kl",),
    "sae": ("reconstruct",),
    "dead_latents": ("silent_latents", "_silent_latents"),
    "untrained": ("untrained_fvu", "untrained_fvus"),
    "load": ("load_model",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--rows", type=int, default=100_000, help="rows in which dead latents are looked for")
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        shutil.copytree(args.run / "saes", run / "saes")
        config = EvalConfig(run=run, tokens=args.tokens, dead_rows=args.rows, batch=args.batch, force=True)
        profile = cProfile.Profile()
        started = time.perf_counter()
        folders = profile.runcall(evaluate, config)
        seconds = time.perf_counter() - started
        tokens = read_json(folders[0] / "evaluation.json")["metrics"]["n_tokens_eval"]
    spent: dict[str, float] = {}
    for (_, _, function), (_, _, _, cumulative, _) in _rows(profile):
        for share, functions in SHARES.items():
            if function in functions:
                spent[share] = spent.get(share, 0.0) + cumulative
    arms = len(folders) + 3
    print(
        json.dumps(
            {
                "arm_tokens_per_s": round(arms * tokens / seconds),
                "seconds": round(seconds, 1),
                "tokens": tokens,
                "arms": arms,
                **{f"{share}_share": round(time_spent / seconds, 3) for share, time_spent in spent.items()},
            }
        )
    )


def _rows(profile: cProfile.Profile) -> Any:
    """((file, line, function), (calls, calls without recursion, own time, cumulative time, callers)) of each function."""
    return vars(pstats.Stats(profile))["stats"].items()


if __name__ == "__main__":
    main()

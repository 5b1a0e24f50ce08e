"""Time a training step of each architecture against the encoder product alone, in one run.

    python benchmarks/train_step.py --arch topk --d 512 --f 8192 --batch 4096 --k 32 --steps 6

Prints a JSON line per architecture. `gemm_ms` is x @ W_enc at the same shape; `step_over_gemm` is what to
compare between commits, since this and most machines are noisy. ReLU and Gated run in their first,
dense phase.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from saebench.train import Member, Spec


def median_ms(run: Callable[[], object], times: int) -> float:
    """Median milliseconds of a call, after one to warm up."""
    run()
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="*", default=["relu", "topk", "gated"])
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--f", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    x = torch.randn(args.batch, args.d, generator=torch.Generator().manual_seed(0))
    for arch in args.arch:
        spec = Spec(name=arch, architecture=arch, d_sae=args.f, lr=1e-4, seed=0)
        spec = replace(spec, k=args.k) if arch == "topk" else replace(spec, l1=1.0)
        member = Member(spec, torch.zeros(args.d), dead_steps=10**6, n_steps=10**6, device="cpu")
        weights = member.sae.W_enc.detach()
        gemm = median_ms(lambda weights=weights: x @ weights, args.steps)
        steps = iter(range(10**6))
        step = median_ms(lambda member=member, steps=steps: member.step(x, next(steps)), args.steps)
        line = member.log_line(0)
        print(
            json.dumps(
                {
                    "arch": arch,
                    "tokens_per_s": round(1000 * args.batch / step),
                    "step_ms": round(step, 1),
                    "gemm_ms": round(gemm, 1),
                    "step_over_gemm": round(step / gemm, 2),
                    "fvu": round(line["fvu"], 4),
                    "density": round(line["l0"] / args.f, 4),
                }
            )
        )


if __name__ == "__main__":
    main()

"""How well λ keeps L0 at its target at the learning rate of a long run.

    python benchmarks/controller.py                     # as `saebench train` has it
    python benchmarks/controller.py --pace 1            # gains that do not follow the learning rate

Rows of 32 numbers, sparse combinations of 256 directions; SAEs of 256 latents, batches of 256. The learning rate is that
of a run of `--rate-of` steps; warm-ups, decay and resampling are shares of `--steps`. L0 is as the controller reads it, a
running mean over 10 steps. Prints a JSON line per architecture: the share of the steps after the first tenth with L0
within 10% of the target (`within`), that of means over 50 steps as in the training log (`within_logged`), the worst deviation
of either, and the smallest and largest λ.
"""

import argparse
import json
import math
import time

import torch

from saebench.bench.synthetic import Synthetic, SyntheticSettings
from saebench.train import Member, Spec
from saebench.train.loop import LOG_EVERY
from saebench.train.schedules import default_learning_rate, pace

D, F, BATCH, ROWS = 32, 256, 256, 2**17
NEAR = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arch", nargs="*", choices=("relu", "gated", "jumprelu"), default=["relu", "gated", "jumprelu"]
    )
    parser.add_argument("--l0", type=float, default=8.0)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--rate-of", type=int, default=250_000, help="steps of the run whose learning rate it is")
    parser.add_argument("--pace", type=float, help="of the controller (default: by the learning rate)")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    x_BD = Synthetic(SyntheticSettings(n_features=256, d_in=D)).sample(ROWS, generator).x
    x_BD *= math.sqrt(D / float(x_BD.pow(2).sum(1).mean()))
    lr = default_learning_rate(D, args.rate_of)
    own = pace(lr, D) if args.pace is None else args.pace
    for arch in args.arch:
        started = time.perf_counter()
        spec = Spec(name=arch, architecture=arch, d_sae=F, target_l0=args.l0, lr=lr, pace=own, seed=0)
        member = Member(spec, x_BD.mean(0), math.ceil(args.steps / 20), args.steps, "cpu")
        generator.manual_seed(1)
        l0s, coefficients = [], []
        for step in range(args.steps):
            member.step(x_BD[torch.randint(ROWS, (BATCH,), generator=generator)], step)
            l0s.append(float(member.sparsity.l0))
            coefficients.append(float(member.sparsity.log_coefficient.exp()))
        late = args.steps // 10
        off = torch.tensor(l0s[late:]).div(args.l0).sub(1)
        logged = off.unfold(0, LOG_EVERY, LOG_EVERY).mean(1)
        found = {
            "target": args.l0,
            "pace": own,
            "lr": lr,
            "within": (off.abs() <= NEAR).double().mean(),
            "worst": off.abs().max(),
            "within_logged": (logged.abs() <= NEAR).double().mean(),
            "worst_logged": logged.abs().max(),
            "least_lambda": min(coefficients[late:]),
            "most_lambda": max(coefficients[late:]),
            "seconds": time.perf_counter() - started,
        }
        print(json.dumps({"arch": arch} | {name: float(f"{value:.3g}") for name, value in found.items()}), flush=True)


if __name__ == "__main__":
    main()

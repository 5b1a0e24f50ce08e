"""Train architectures on data whose features are known, and score what they recover.

    python benchmarks/synthetic.py --arch relu topk gated --samples 5_000_000
    python benchmarks/synthetic.py --size 16k --device cuda

All architectures see the same batches. Prints a JSON line per architecture, and two for scale: `oracle` has the
true directions and coefficients of as many of the most frequent features as there are latents, `untrained` is a
TopK SAE as training begins it, with the one factor that reconstructs best. For `16k`, SynthSAEBench-16k,
lines of the published figures follow (arXiv 2602.14687; width 4096, 200M samples).
"""

import argparse
import json
import math
import statistics
import time
from typing import Any

import torch

from saebench.bench.recovery import recovery_of_oracle, recovery_of_sae
from saebench.bench.synthetic import SIZES, Synthetic
from saebench.sae import SAE, fold, initialise, new_sae
from saebench.train import Member, Spec
from saebench.train.recipes import RECIPES
from saebench.train.schedules import default_learning_rate, pace

DEFAULTS = {
    "mini": {"width": 512, "samples": 5_000_000, "l0": 6, "eval_samples": 100_000},
    "16k": {"width": 4096, "samples": 200_000_000, "l0": 25, "eval_samples": 500_000},
}

PUBLISHED: list[dict[str, Any]] = [
    {"arch": "batchtopk", "l0": 25, "f1": 0.732, "mcc": 0.757, "uniqueness": 0.984, "explained_variance": 0.792},
    {"arch": "matryoshka", "l0": 25, "f1": 0.879, "mcc": 0.793, "uniqueness": 0.999, "explained_variance": 0.779},
    {"arch": "jumprelu", "l0": 25, "f1": 0.732, "mcc": 0.753, "uniqueness": 0.989, "explained_variance": 0.795},
    {"arch": "relu", "l0": 25, "f1": 0.556, "mcc": 0.604, "uniqueness": 0.898, "explained_variance": 0.765},
    {"arch": "batchtopk", "l0": 20, "f1": 0.818, "mcc": 0.753},
    {"arch": "jumprelu", "l0": 20, "f1": 0.824, "mcc": 0.743},
    {"arch": "relu", "l0": 20, "f1": 0.578, "mcc": 0.583},
]

DEAD_SHARE = 1 / 20  # of the run, silent for which a latent counts as dead, as in `saebench train`
SCALE_ROWS, EVAL_SEED = 65_536, 1_000_003


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="mini")
    parser.add_argument("--arch", nargs="*", choices=sorted(RECIPES), default=["relu", "topk", "gated"])
    parser.add_argument("--l0", type=int, help="latents per row to aim at (default: 6 for mini, 25 for 16k)")
    parser.add_argument("--width", type=int, help="latents (default: 512 for mini, 4096 for 16k)")
    parser.add_argument("--samples", type=int, help="training rows (default: 5M for mini, 200M for 16k)")
    parser.add_argument("--eval-samples", type=int, help="fresh rows to score on (default: 100k, 500k)")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--lr", type=float, help="default: that of `saebench train`")
    parser.add_argument("--seed", type=int, default=0, help="of weights and samples; the data's features stay")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    for name, value in DEFAULTS[args.size].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.lr is None:
        args.lr = default_learning_rate(SIZES[args.size].d_in, args.samples // args.batch)
    return args


def spec(arch: str, args: argparse.Namespace) -> Spec:
    sparsity: dict[str, Any] = {"k" if RECIPES[arch].takes_k else "target_l0": args.l0}
    own = pace(args.lr, SIZES[args.size].d_in)
    return Spec(name=arch, architecture=arch, d_sae=args.width, lr=args.lr, pace=own, seed=args.seed, **sparsity)


def milliseconds(data: Synthetic, batch: int, generator: torch.Generator) -> float:
    """Median time of making a batch."""
    times = []
    for _ in range(10):
        started = time.perf_counter()
        float(data.sample(batch, generator).x[0, 0])  # waits for the device
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


@torch.no_grad()
def untrained(d_sae: int, k: int, mean_D: torch.Tensor, x_BD: torch.Tensor, seed: int) -> SAE:
    """A TopK SAE as training begins it, its reconstruction scaled to fit `x_BD` best."""
    sae = new_sae("topk", len(mean_D), d_sae, k=k)
    initialise(sae, mean_D.cpu(), torch.Generator().manual_seed(seed))
    sae.to(x_BD.device)
    decoded_BD, wanted_BD = sae(x_BD).x_hat - sae.b_dec, x_BD - sae.b_dec
    sae.W_dec *= (decoded_BD * wanted_BD).sum() / decoded_BD.pow(2).sum()
    return sae


def show(line: dict[str, Any]) -> None:
    rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in line.items()}
    print(json.dumps(rounded), flush=True)


def main() -> None:
    args = arguments()
    data = Synthetic(SIZES[args.size], args.device)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    x_BD = data.sample(SCALE_ROWS if args.size == "mini" else SCALE_ROWS // 8, generator).x
    scale = math.sqrt(data.settings.d_in / float(x_BD.pow(2).sum(1).mean()))
    mean_D = (x_BD.mean(0) * scale).cpu()
    control = untrained(args.width, args.l0, mean_D, x_BD * scale, args.seed)
    n_steps = args.samples // args.batch
    members = [
        Member(spec(arch, args), mean_D, math.ceil(DEAD_SHARE * n_steps), n_steps, args.device) for arch in args.arch
    ]
    common = {"size": args.size, "target_l0": args.l0, "samples": n_steps * args.batch, "seed": args.seed}
    show({**common, "generate_ms": milliseconds(data, args.batch, generator), "batch": args.batch})
    started = time.perf_counter()
    for step in range(n_steps):
        x_BD = data.sample(args.batch, generator).x * scale
        for member in members:
            member.step(x_BD, step)
    if any(member.diverged is not None for member in members):  # also waits for the device
        raise FloatingPointError("a loss or gradient was not finite; try a lower --lr")
    show({**common, "architectures": len(members), "train_s": time.perf_counter() - started})
    for name, sae in [*((member.spec.name, member.sae) for member in members), ("untrained", control)]:
        fold(sae, scale)
        evaluation = torch.Generator(args.device).manual_seed(EVAL_SEED)
        show({"arch": name, **common, **recovery_of_sae(sae, data, args.eval_samples, evaluation)})
    evaluation = torch.Generator(args.device).manual_seed(EVAL_SEED)
    show({"arch": "oracle", **common, **recovery_of_oracle(data, args.width, args.eval_samples, evaluation)})
    for line in PUBLISHED if args.size == "16k" else []:
        show({"published": True, **line})


if __name__ == "__main__":
    main()

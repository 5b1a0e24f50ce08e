"""Compare saebench's synthetic data and scores with those of SAELens.

    python benchmarks/synthetic_check.py --peers path/to/an/environment/with/sae-lens

Builds the data of the same settings on both sides, draws rows on both and prints Markdown: how far constants
are apart, means, and z-scores of differences per feature and per pair of features, which have a root mean
square near 1 when only chance separates the two. SAELens runs in a process of its own environment, by
this same file, which therefore imports saebench only in the process that has it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    "mini": ("mini", {}, {}, 200_000),
    "mini, siblings independent and unscaled": (
        "mini",
        {"correlation_scale": 0.15},
        {"exclusive": False, "scale_children": False},
        200_000,
    ),
    "16k, directions as drawn": ("16k", {"orthogonal_steps": 0}, {}, 4096),
}
"""Name -> size, changed settings, changed hierarchy, rows. SAELens takes hours to part 16k directions on a CPU."""

BATCH, LATENTS, SCORED = 1024, 200, 2048


def statistics(
    draw: Callable[[], tuple[Tensor, Tensor]], n_rows: int, pairs: bool, tree: dict[str, int]
) -> dict[str, Tensor]:
    """Sums over rows of what is compared. `draw` gives a batch of (x, coefficients)."""
    sums: dict[str, Any] = {}
    seconds = 0.0
    parents = torch.arange(tree["n_parents"])
    children_PC = tree["n_roots"] + parents[:, None] * tree["branching"] + torch.arange(tree["branching"])
    for _ in range(n_rows // BATCH):
        started = time.perf_counter()
        x, coefficients = draw()
        seconds += time.perf_counter() - started
        fires = coefficients > 0
        children = fires[:, children_PC.flatten()].view(len(x), *children_PC.shape)
        l0 = fires.sum(1).double()
        x2 = x.double().pow(2).sum(1)
        batch = {
            "count": fires.sum(0).double(),
            "sum": coefficients.double().sum(0),
            "sum2": coefficients.double().pow(2).sum(0),
            "l0": torch.stack([l0.sum(), (l0**2).sum()]),
            "x2": torch.stack([x2.sum(), (x2**2).sum()]),
            "norm": x2.sqrt().sum(),
            "orphans": (children & ~fires[:, : len(parents), None]).sum(),
            "siblings": (children.sum(2) > 1).sum(),
        }
        if pairs:
            batch["pairs"] = fires.float().T @ fires.float()
        sums = {name: sums.get(name, 0) + value for name, value in batch.items()}
    sums["ms"] = torch.tensor(1000 * seconds / (n_rows // BATCH))
    return {name: value.contiguous() for name, value in sums.items()}


def theirs(folder: Path) -> None:
    """The half that runs with SAELens: reads the settings, writes constants, sums and scores."""
    # By name, since the project's own environment, where types are checked, has no SAELens.
    synthetic, evals = import_module("sae_lens.synthetic"), import_module("sae_lens.synthetic.evals")
    torch.manual_seed(1)
    request = json.loads((folder / "request.json").read_text())
    model = synthetic.SyntheticModel(synthetic.SyntheticModelConfig.from_dict(request["config"]))
    generator = model.activation_generator
    constants = {
        "directions": model.feature_dict.feature_vectors.detach(),
        "bias": model.feature_dict.bias.detach(),
        "probabilities": generator.firing_probabilities,
        "means": generator.mean_firing_magnitudes,
        "deviations": generator.std_firing_magnitudes,
        "loadings": model.correlation_matrix.correlation_factor,
    }

    def draw() -> tuple[Tensor, Tensor]:
        x, coefficients = model.sample_with_features(BATCH)
        return x.detach(), coefficients

    sums = statistics(draw, request["rows"], request["pairs"], request["tree"])
    given = load_file(folder / "scored.safetensors")
    classes = evals.compute_classification_metrics(
        given["acts"], given["coefficients"], given["W_dec"], constants["directions"]
    )
    variance = evals.ExplainedVarianceCalculator()
    variance.add_batch(given["x_hat"], given["x"])
    scores = {
        "f1": classes.f1_score,
        "precision": classes.precision,
        "recall": classes.recall,
        "mcc": evals.mean_correlation_coefficient(given["W_dec"], constants["directions"]),
        "uniqueness": evals.feature_uniqueness(given["W_dec"], constants["directions"]),
        "explained_variance": variance.compute(),
    }
    save_file({name: value.contiguous() for name, value in constants.items()}, folder / "constants.safetensors")
    save_file(sums, folder / "sums.safetensors")
    (folder / "scores.json").write_text(json.dumps(scores))


def config(settings: Any) -> dict[str, Any]:
    """SAELens' name for each setting."""
    tree = settings.hierarchy
    return {
        "num_features": settings.n_features,
        "hidden_dim": settings.d_in,
        "firing_probability": {
            "generator_name": "zipfian",
            "exponent": settings.exponent,
            "max_prob": settings.max_probability,
            "min_prob": settings.min_probability,
        },
        "hierarchy": {
            "total_root_nodes": tree.n_roots,
            "branching_factor": tree.branching,
            "max_depth": tree.depth,
            "mutually_exclusive_portion": float(tree.exclusive),
            "compensate_probabilities": True,
            "scale_children_by_parent": tree.scale_children,
        },
        "orthogonalization": (
            {"num_steps": settings.orthogonal_steps, "lr": settings.orthogonal_lr}
            if settings.orthogonal_steps
            else None
        ),
        "correlation": {"rank": settings.correlation_rank, "correlation_scale": settings.correlation_scale},
        "mean_firing_magnitudes": {
            "generator_name": "linear",
            "start": settings.mean_coefficients[0],
            "end": settings.mean_coefficients[1],
        },
        "std_firing_magnitudes": {
            "generator_name": "folded_normal",
            "mean": settings.std_coefficients[0],
            "std": settings.std_coefficients[1],
        },
        "bias": settings.bias_norm,
        "seed": settings.seed,
    }


def rms_and_max(z: Tensor) -> str:
    return f"rms {float(z.pow(2).mean().sqrt()):.3f}, largest {float(z.abs().max()):.2f} of {z.numel()}"


def compare(name: str, python: Path) -> None:
    """One case, as a Markdown section on stdout."""
    from dataclasses import replace

    from saebench.bench.recovery import Recovery
    from saebench.bench.synthetic import SIZES, Sample, Synthetic

    size, changed, changed_tree, n_rows = CASES[name]
    tree = SIZES[size].hierarchy
    assert tree is not None
    settings = replace(SIZES[size], **changed, hierarchy=replace(tree, **changed_tree))
    data = Synthetic(settings)
    generator = torch.Generator().manual_seed(0)

    def draw() -> tuple[Tensor, Tensor]:
        sample = data.sample(BATCH, generator)
        return sample.x, sample.coefficients

    shape = {"n_roots": tree.n_roots, "n_parents": tree.n_parents(), "branching": tree.branching}
    pairs = size == "mini"
    ours = statistics(draw, n_rows, pairs, shape)
    # Latents that are features with noise, some of them flipped, and one dead.
    x, coefficients = data.sample(SCORED, generator)
    W_dec = data.directions_ND[:LATENTS] + 0.1 * torch.randn(LATENTS, settings.d_in, generator=generator)
    W_dec[::7] *= -1
    acts = torch.relu(x @ W_dec.T - 2)
    acts[:, 0] = 0
    x_hat = 0.3 * acts @ W_dec
    recovery = Recovery(W_dec, data.directions_ND)
    recovery.add(Sample(x, coefficients), acts, x_hat)
    scores = recovery.scores()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        request = {"config": config(settings), "rows": n_rows, "pairs": pairs, "tree": shape}
        (folder / "request.json").write_text(json.dumps(request))
        given = {"x": x, "coefficients": coefficients, "W_dec": W_dec, "acts": acts, "x_hat": x_hat}
        save_file({key: value.contiguous() for key, value in given.items()}, folder / "scored.safetensors")
        subprocess.run([python, __file__, "--theirs", folder], check=True, stderr=subprocess.DEVNULL)
        constants, their = load_file(folder / "constants.safetensors"), load_file(folder / "sums.safetensors")
        their_scores = json.loads((folder / "scores.json").read_text())
    print(f"\n## {name}\n\n{n_rows // BATCH * BATCH:,} rows on each side.\n")
    show_constants(data, constants)
    show_samples(ours, their, n_rows // BATCH * BATCH, pairs)
    print("\n| score of the same latents | saebench | SAELens |\n|---|---|---|")
    for key, value in their_scores.items():
        print(f"| {key} | {scores[key]:.6f} | {value:.6f} |")


def show_constants(data: Any, constants: dict[str, Tensor]) -> None:
    ours = {
        "directions": data.directions_ND,
        "bias": data.bias_D,
        "probabilities": data.drawn_N,
        "means": data.mean_N,
        "deviations": data.std_N,
        "loadings": data.loadings_NR,
    }
    print("| constant | largest difference | largest value |\n|---|---|---|")
    for name, value in ours.items():
        apart = float((value - constants[name]).abs().max())
        print(f"| {name} | {apart:.1e} | {float(value.abs().max()):.3f} |")


def show_samples(ours: dict[str, Tensor], theirs: dict[str, Tensor], n: int, pairs: bool) -> None:
    """Means beside each other, then z-scores of per-feature and per-pair differences."""
    print("\n| of the samples | saebench | SAELens | z |\n|---|---|---|---|")
    for name, title in (("l0", "L0"), ("x2", "mean squared norm")):
        (s1, q1), (s2, q2) = ours[name].tolist(), theirs[name].tolist()
        error = ((q1 / n - (s1 / n) ** 2 + q2 / n - (s2 / n) ** 2) / n) ** 0.5
        print(f"| {title} | {s1 / n:.3f} | {s2 / n:.3f} | {(s1 - s2) / n / error:.2f} |")
    print(f"| mean norm | {float(ours['norm']) / n:.3f} | {float(theirs['norm']) / n:.3f} | |")
    for name, title in (("orphans", "children without their parent"), ("siblings", "two siblings at once")):
        print(f"| {title} | {int(ours[name])} | {int(theirs[name])} | |")
    print(f"| ms per {BATCH} rows | {float(ours['ms']):.0f} | {float(theirs['ms']):.0f} | |")
    c1, c2 = ours["count"], theirs["count"]
    p = (c1 + c2) / (2 * n)
    common = c1 + c2 >= 20
    z = ((c1 - c2) / (2 * n * p * (1 - p)).sqrt())[common]
    print("\n| z-scores of differences | |\n|---|---|")
    print(f"| firing rate per feature | {rms_and_max(z)} |")
    seen = (c1 >= 50) & (c2 >= 50)
    m1, m2 = ours["sum"][seen] / c1[seen], theirs["sum"][seen] / c2[seen]
    v1, v2 = ours["sum2"][seen] / c1[seen] - m1**2, theirs["sum2"][seen] / c2[seen] - m2**2
    print(f"| mean coefficient when firing | {rms_and_max((m1 - m2) / (v1 / c1[seen] + v2 / c2[seen]).sqrt())} |")
    ratio = (v1 / v2).log()
    print(f"| median ratio of coefficient variances | {float(ratio.median().exp()):.3f} |")
    if pairs:
        upper = torch.ones_like(ours["pairs"], dtype=torch.bool).triu(1)
        j1, j2 = ours["pairs"][upper].double(), theirs["pairs"][upper].double()
        often = j1 + j2 >= 20
        print(f"| pairs firing together | {rms_and_max((j1 - j2)[often] / (j1 + j2)[often].sqrt())} |")
        expected = ((c1[:, None] * c1) / n)[upper][often]
        print(f"| the same against independent firing | {rms_and_max((j1[often] - expected) / expected.sqrt())} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="environment whose bin/python imports sae_lens")
    parser.add_argument("--case", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--theirs", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.theirs:
        theirs(args.theirs)
        return
    if args.peers is None:
        sys.exit("--peers is missing: give an environment with sae-lens installed")
    for name in args.case:
        compare(name, args.peers / "bin/python")


if __name__ == "__main__":
    main()

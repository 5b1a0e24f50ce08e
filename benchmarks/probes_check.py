"""Compare the probes of `saebench bench probes` with those of the package sae-probes, on the same inputs.

    python benchmarks/probes_check.py --peers path/to/an/environment/with/sae-probes

Draws activations of known classes, sparse and dense ones, of sizes that fall under each way to validate, ranks their features and fits
probes on both sides, and prints Markdown: whether the same features are chosen, and how far AUCs are apart. sae-probes runs in a process
of its own environment, by this same file, which therefore imports saebench only in the process that has it. What sae-probes imports and
these functions do not call, sae-lens and transformer-lens, need not be installed there.
"""

import argparse
import subprocess
import sys
import tempfile
import types
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

CASES = [
    (rows, features, share, penalty)
    for rows, features, share in ((1024, 2048, 0.02), (1024, 256, 1.0), (100, 512, 0.05), (12, 64, 0.3))
    for penalty in ("l2", "l1")
]
"""Training rows, features, the share of them that are active on a row, penalty."""
KS, TEST, SEED, TELLING = (1, 2, 4, 16), 400, 7, 32


def drawn(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(training rows, classes, test rows, classes) of a case, as many of either class: `TELLING` features are more active in one."""
    rows, features, share, _ = CASES[number]
    generator = np.random.default_rng(number)
    strength = generator.normal(size=features) * (generator.permutation(features) < TELLING)

    def some(n: int) -> tuple[np.ndarray, np.ndarray]:
        holds = generator.permutation(n) < n // 2
        X = generator.normal(size=(n, features)) + 0.5 * holds[:, None] * strength
        if share < 1:
            X = np.abs(X) * (generator.random((n, features)) < share * (1 + 4 * holds[:, None] * (strength > 0)))
        return X.astype(np.float32), holds

    return *some(rows), *some(TEST)


def theirs(out: Path) -> None:
    """What sae-probes makes of each case: features in the order of their ranks, and the AUC of each k."""
    import torch

    for name, what in (("sae_lens", "SAE"), ("transformer_lens", "HookedTransformer")):
        module: Any = types.ModuleType(name)
        setattr(module, what, object)
        sys.modules[name] = module
    evals = import_module("sae_probes.run_sae_evals")
    found: dict[str, Any] = {}
    for number, (*_, penalty) in enumerate(CASES):
        X, holds, X_test, truth = (torch.from_numpy(part) for part in drawn(number))
        holds, truth = holds.long(), truth.long()
        order = evals.get_sorted_indices(X, holds, evals.mean_act_normalization)
        found[f"order{number}"] = order[: max(KS)].numpy()
        aucs = [
            evals.find_best_reg(
                X_train=X[:, order[:k]],
                y_train=holds,
                X_test=X_test[:, order[:k]],
                y_test=truth,
                penalty=penalty,
                seed=SEED,
            ).metrics.test_auc
            for k in KS
        ]
        found[f"auc{number}"] = np.array(aucs)
    np.savez(out, **found)


def ours(number: int, chosen: np.ndarray) -> tuple[int, np.ndarray]:
    """(how many of the first features are the same, whatever the order of equals; the AUC of each k of those that were chosen there)."""
    from scipy import sparse

    from saebench.bench.protocol import auc, order_of

    X, holds, X_test, truth = drawn(number)
    order = order_of(sparse.csr_array(X), holds)[: len(chosen)]
    penalty = CASES[number][3]
    parts = [(np.ascontiguousarray(X[:, chosen[:k]]), np.ascontiguousarray(X_test[:, chosen[:k]])) for k in KS]
    aucs = [auc(train, holds, test, truth, penalty, SEED) for train, test in parts]
    return len(np.intersect1d(order, chosen)), np.array(aucs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peers", type=Path, help="environment with sae-probes")
    parser.add_argument("--theirs", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.theirs:
        return theirs(arguments.theirs)
    if arguments.peers is None:
        parser.error("give --peers, an environment with sae-probes")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "theirs.npz"
        subprocess.run([arguments.peers / "bin/python", __file__, "--theirs", out], check=True)
        found = np.load(out)
        print(
            "| training rows | features | active | penalty | same features | AUC, k "
            + ", ".join(map(str, KS))
            + " | largest difference |"
        )
        print("|---|---|---|---|---|---|---|")
        for number, (rows, features, share, penalty) in enumerate(CASES):
            same, aucs = ours(number, found[f"order{number}"])
            apart = abs(aucs - found[f"auc{number}"]).max()
            shown = ", ".join(f"{value:.4f}" for value in aucs)
            print(f"| {rows} | {features} | {share:g} | {penalty} | {same} of {max(KS)} | {shown} | {apart:.1e} |")
    return None


if __name__ == "__main__":
    main()

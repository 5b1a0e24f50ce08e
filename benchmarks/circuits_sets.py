"""Which set of a run its graphs are best through: scores and correlations of the demonstration's prompts, or of others.

    python benchmarks/circuits_sets.py RUN SET [SET …] [--prompt TEXT …]

The graphs stay in RUN/circuits. Times are of the command's own work, processor and wall, the model's loading included.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

from saebench.circuits import Circuit, CircuitConfig, circuits
from saebench.demo.circuits import CASES
from saebench.printed import format_table

HEADING = [
    "set", "prompt", "latents", "replacement", "completeness", "later latents, held", "that stay active", "logits, held", "latents, free",
    "logits, free", "CPU s", "s",
]  # fmt: skip


def row(name: str, about: str, circuit: Circuit, cpu: float, wall: float) -> list[str]:
    held = circuit.agreement
    figures = (*circuit.scores, held.latents, held.latents_active, held.logits, held.latents_free, held.logits_free)
    return [
        name,
        about,
        str(circuit.graph.n_active),
        *(f"{value:.3f}" for value in figures),
        f"{cpu:.0f}",
        f"{wall:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("sets", nargs="+", metavar="SET")
    parser.add_argument("--prompt", nargs="+", default=[])
    parser.add_argument("--model")
    given = parser.parse_args()
    asked = [(one.name, one.prompt, one.target, one.against) for one in CASES]
    if given.prompt:
        asked = [(prompt[-20:], prompt, None, None) for prompt in given.prompt]
    rows = [HEADING]
    for name in given.sets:
        own: list[list[str]] = []
        for about, prompt, target, against in asked:
            cpu, wall = sum(os.times()[:2]), time.perf_counter()
            made = circuits(
                CircuitConfig(run=given.run, set=name, prompt=prompt, target=target, against=against, model=given.model)
            )
            assert made is not None
            own.append(row(name, about, made, sum(os.times()[:2]) - cpu, time.perf_counter() - wall))
        means = (statistics.mean(map(float, column)) for column in list(zip(*own, strict=True))[2:])
        rows += [*own, [name, "mean", *(f"{value:.3f}" for value in means)]]
    print(format_table(rows, left=(0, 1)))


if __name__ == "__main__":
    main()

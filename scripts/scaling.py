"""The arithmetic of docs/scaling.md: what a model's shape says of harvest, training and what processes send each other.

python scripts/scaling.py    # prints the page's tables; they are held to this by tests/test_docs.py
"""

from dataclasses import dataclass

import torch

from saebench.harvest.settings import bytes_per_row
from saebench.train.member import Spec
from saebench.train.memory import need_of

# Measured (benchmarks/results/gpu_h200_2026-11-26.md): an encoder's product of 4,096 rows, D 768 and F 24,576, and what the host takes of a step.
PRODUCT = 2 * 4096 * 768 * 24_576 / 0.24e-3  # FLOP/s in bfloat16
HOST = 2.9e-3  # s
READ = 1.3e9  # bytes/s that a process reads of a store in page cache
# Assumed, of an H100.
FORWARD = 0.4 * 989e12  # FLOP/s in bfloat16: two fifths of what its maker states
MEMORY = 3.35e12  # bytes/s
DISK = 2e9  # bytes/s: one NVMe drive
LINK, NETWORK = 450e9, 50e9  # bytes/s each way: NVLink 4, and 400 Gb/s of one network card a GPU
BATCH, K, RANKS, CONTEXT, ROWS = 4096, 64, 8, 1024, 1e9
PASSES = 4  # over the pre-activations of a batch: written once, and read by the selection
ADAM = 8  # arrays of the weights' size that a step moves: four read, three written, and the gradient that is made


@dataclass(frozen=True)
class Shape:
    """What a language model's configuration says."""

    name: str
    d: int
    layers: int
    vocabulary: int
    queries: int
    """width of all query heads together"""
    keys: int
    """width of all key heads together"""
    mlp: int
    gated: bool = True
    tied: bool = False

    @property
    def layer(self) -> int:
        """Weights of a layer's matrices."""
        return self.d * (2 * self.queries + 2 * self.keys + (3 if self.gated else 2) * self.mlp)

    @property
    def weights(self) -> int:
        return self.layers * self.layer + (1 if self.tied else 2) * self.vocabulary * self.d

    @property
    def latents(self) -> int:
        return 32 * self.d

    def flops(self, layers: int) -> int:
        """Of a token through so many layers: two for each weight, and its products with half of a context's keys and values."""
        return layers * (2 * self.layer + 2 * CONTEXT * self.queries)


SHAPES = (
    Shape("Pythia-160M", 768, 12, 50_304, 768, 768, 3072, gated=False),
    Shape("Gemma-2-2B", 2304, 26, 256_000, 2048, 1024, 9216, tied=True),
    Shape("Llama-3.1-8B", 4096, 32, 128_256, 4096, 1024, 14_336),
)


def harvest(shape: Shape) -> tuple[str, ...]:
    flops = shape.flops(shape.layers // 2 + 1)
    row = bytes_per_row([shape.d], "float16")
    model, disk = FORWARD / flops, DISK / row
    return (
        f"{shape.weights / 1e9:.2f}", f"{2 * shape.weights / 1e9:.1f}", f"{flops / 1e9:.2f}", thousands(model), f"{row:,}", thousands(disk),
        f"{ROWS * row / 1e12:.1f}", f"{ROWS / min(model, disk) / 3600:.1f}",
    )  # fmt: skip


def training(shape: Shape) -> tuple[str, ...]:
    d, f = shape.d, shape.latents
    need = need_of(Spec(name="", architecture="topk", d_sae=f, k=K, lr=1e-3, seed=0), d, BATCH, torch.device("cuda"))
    product, sparse = 2 * d * f, 8 * K * d
    parts = (BATCH * (product + sparse) / PRODUCT, PASSES * BATCH * f * 4 / MEMORY, ADAM * 2 * f * d * 4 / MEMORY)
    step, reading = max(HOST, sum(parts)), READ / bytes_per_row([d], "float16")
    return (
        f"{f:,}", *(f"{part / 1e9:.2f}" for part in (need.weights, need.moments, need.passing)), f"{product / 1e6:,.0f}", f"{sparse / 1e6:.1f}",
        *(f"{part * 1e3:.2f}" for part in parts), thousands(BATCH / step), thousands(reading),
    )  # fmt: skip


def ranks(shape: Shape) -> tuple[str, ...]:
    d, f, n = shape.d, shape.latents, RANKS
    rows = 8 * (n - 1) / n * (2 * f * d + 3 * f)
    latents = 8 * (n - 1) / n * BATCH * d + 4 * (n - 1) * BATCH * K
    held = 32 * f * d
    return (
        f"{held / 1e9:.1f}", f"{held / n / 1e9:.1f}", f"{rows / 1e6:,.0f}", f"{rows / LINK * 1e3:.1f}, {rows / NETWORK * 1e3:.1f}",
        f"{latents / 1e6:,.0f}", f"{latents / LINK * 1e3:.2f}, {latents / NETWORK * 1e3:.1f}",
    )  # fmt: skip


def evaluation(shape: Shape) -> tuple[str, ...]:
    """Of an SAE behind the middle layer: the model as it is, and three passes from there on."""
    behind = shape.layers - shape.layers // 2 - 1
    head = 2 * shape.d * shape.vocabulary
    flops = shape.flops(shape.layers) + 3 * shape.flops(behind) + 4 * head
    return (
        f"{shape.flops(shape.layers) / 1e9:.1f}",
        f"{3 * shape.flops(behind) / 1e9:.1f}",
        f"{4 * head / 1e9:.1f}",
        f"{1e6 * flops / FORWARD:.0f}",
    )


def thousands(rate: float) -> str:
    return f"{round(rate, -3):,.0f}"


TABLES = {
    harvest: "weights, billions | GB in bfloat16 | GFLOP a token | tokens a second by that | bytes a row | rows a second by disk | TB for 1B rows | hours for 1B rows",
    training: "latents | weights, GB | moments | gradients and scratch | MFLOP a row: encoder | sparse | ms of a step: products | selection | Adam | rows a second by that | by reading",
    ranks: "GB in one process | in each of 8, latents | MB sent in a step, rows | ms by NVLink, by network | MB sent, latents | ms by NVLink, by network",
    evaluation: "GFLOP a token: whole pass | three from the hook on | four times logits | seconds for 1M tokens",
}


def tables() -> list[str]:
    """Each of them as Markdown."""
    made = []
    for of, heads in TABLES.items():
        lines = [
            ("", *heads.split(" | ")),
            ("---",) * (1 + len(heads.split(" | "))),
            *((shape.name, *of(shape)) for shape in SHAPES),
        ]
        made.append("\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines))
    return made


if __name__ == "__main__":
    print("\n\n".join(tables()))

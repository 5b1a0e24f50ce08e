"""The bytes that a training of an SAE ended with before dictionaries could write elsewhere, for machines that round alike."""

import hashlib
from typing import Any

import torch

from saebench.train import Member, Spec
from saebench.train.recipes import RECIPES

RECORDED_ON = "f0ae70106b0da56c"
"""`fingerprint` of the machine on which the digests were recorded, with torch 2.13.0 and one thread"""
RECORDED = {
    "relu": "88f5022d6e4558bf",
    "topk": "d2b2479d58fbc91f",
    "gated": "89d83d01a770edd2",
    "batchtopk": "b601ea671509632b",
    "jumprelu": "86a2927e723d1f09",
    "matryoshka": "6c0d2619d41f3f80",
}
"""`trained`, by the commit before dictionaries that write elsewhere (6c1760c~1); of topk, whose sums have had another order since a
row's largest are found by NumPy, by the commit that did so"""


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(60, 16, generator=generator)
    codes = [
        torch.rand(128, 60, generator=generator) * (torch.rand(128, 60, generator=generator) < 0.05) for _ in range(80)
    ]
    return [code @ directions + 0.01 * torch.randn(128, 16, generator=generator) + 0.3 for code in codes]


def fingerprint() -> str:
    """Of the products, sums and roots of this machine, of the shapes that a step has: where it is another, so are all bits."""
    x, generator = torch.cat(batches()), torch.Generator().manual_seed(1)
    weights = torch.randn(96, 16, generator=generator)
    pre = x @ weights.T
    parts = [pre, pre.relu() @ weights, pre.T @ x, x.norm(dim=1), x.mean(0), pre.exp().sum(1), x.square().sum().sqrt()]
    return digest(parts)


def trained(architecture: str) -> str:
    """Of all that 80 steps change, dead latents revived among them."""
    recipe, rows = RECIPES[architecture], batches()
    level: dict[str, Any] = {"k": 4} if recipe.takes_k else {"target_l0": 4.0}
    spec = Spec(name=architecture, architecture=architecture, d_sae=96, lr=2e-3, seed=0, **level)
    member = Member(spec, rows[0].mean(0), 12, 80, "cpu")
    for step, x in enumerate(rows):
        member.step(x, step)
    return digest([value for _, value in sorted(member.state().items())])


def digest(tensors: list[torch.Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]

"""Devices, and what a model computes in there."""

from typing import Literal

import torch

ModelDtype = Literal["float32", "bfloat16", "float16"]


def choose_device(device: str | None, *, float64: bool = False) -> str:
    """The device asked for, or else CUDA, then MPS, then CPU. Raises ValueError for one that is not at hand.

    With `float64`, in which training and evaluation add up, MPS does not count: it has none.
    """
    mps = torch.backends.mps.is_available() and not float64
    at_hand = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    if device is None:
        return next(name for name, here in at_hand.items() if here)
    if not at_hand.get(device.split(":")[0], False):
        raise ValueError(
            f"device {device!r} is not at hand; expected {' or '.join(n for n, h in at_hand.items() if h)}"
        )
    return device


def default_dtype(device: str) -> ModelDtype:
    """bfloat16 on a GPU that computes in it, else float32."""
    return "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"

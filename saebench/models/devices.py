"""Devices: which one is meant, and models that lie on several, as accelerate lays them out.

Of such a model only its passes know that. Vectors at hooks, states and logits come to one device, `LanguageModel.device`, and go back
from there; weights that accelerate keeps elsewhere between passes are asked for by `weights_in`.
"""

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

ModelDtype = Literal["float32", "bfloat16", "float16"]
ALL = "all"
"""in the place of a device: a model's layers over all GPUs, and what they have no room for in the machine's memory and on disk"""
Memory = Mapping[int | str, int | str]
"""Bytes that a model may take of each GPU, of the `cpu` and of the `disk`, as accelerate's `max_memory`."""
Module = TypeVar("Module", bound=nn.Module)


def choose_device(device: str | None, *, float64: bool = False) -> str:
    """The device asked for, or else CUDA, then MPS, then CPU. Raises ValueError for one that is not at hand, and for `all`, which is for models alone.

    With `float64`, in which training and evaluation add up, MPS does not count: it has none.
    """
    mps = torch.backends.mps.is_available() and not float64
    at_hand = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    if device is None:
        return next(name for name, here in at_hand.items() if here)
    if not at_hand.get(device.split(":")[0], False):
        expected = " or ".join(name for name, here in at_hand.items() if here)
        if device == ALL:
            raise ValueError(
                f"device 'all' is for the model of harvest, eval and explain alone; expected {expected} here"
            )
        raise ValueError(f"device {device!r} is not at hand; expected {expected}")
    return device


def default_dtype(device: str) -> ModelDtype:
    """bfloat16 on a GPU that computes in it, else float32."""
    return "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"


def placed(module: Any, name: str, device: str) -> None:
    """Bring a module to a device, if that is one. Raises ValueError where it has no room."""
    if device == ALL:
        _say_where(module, name)
        return
    try:
        module.to(device)
    except torch.OutOfMemoryError as error:
        size = sum(weight.numel() * weight.element_size() for weight in module.parameters())
        raise ValueError(
            f"model {name!r} takes {size / 1e9:.1f} GB and {device} has less: use --device all, which lays it over all GPUs, "
            "or a narrower --model-dtype"
        ) from error


def _say_where(module: Any, name: str) -> None:
    places: dict[str, list[str]] = {}
    for part, device in getattr(module, "hf_device_map", {}).items():
        places.setdefault(str(device), []).append(part)
    for device, parts in places.items():
        log.info("%s: %s on %s", name, parts[0] if len(parts) == 1 else f"{parts[0]} to {parts[-1]}", device)
    if slow := places.keys() & ({"cpu", "disk"} if torch.cuda.is_available() else {"disk"}):
        log.warning("%s has weights on %s, from where every pass copies them", name, " and ".join(sorted(slow)))


def device_of(module: Any) -> torch.device:
    """Where a model takes tokens: where its embedding is, or where accelerate runs that."""
    embedding = module.get_input_embeddings()
    if not hasattr(embedding, "_hf_hook"):
        return embedding.weight.device  # with its number: cuda and cuda:0 are not equal
    with torch.no_grad():
        return embedding(torch.zeros(1, 1, dtype=torch.long)).device


@contextlib.contextmanager
def weights_in(module: nn.Module) -> Iterator[None]:
    """In it, a module has its own weights, where accelerate keeps them elsewhere between passes."""
    if not hasattr(module, "_hf_hook"):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


def copied(module: Module, device: torch.device, dtype: torch.dtype) -> Module:
    """A copy of a module that has no part in another, to be called by its class's `forward`: accelerate's hook is not copied, which may hold all weights of a model."""
    with weights_in(module):
        shared: dict[int, Any] = {id(hook): hook for hook in [vars(module).get("_hf_hook")] if hook is not None}
        return copy.deepcopy(module, shared).to(device, dtype)


def through(module: nn.Module, x: Tensor) -> Tensor:
    """What a part of a model makes of vectors, wherever it lies; on their device."""
    weight = next(module.parameters(), x)
    return module(x if weight.is_meta else x.to(weight.device)).to(x.device)

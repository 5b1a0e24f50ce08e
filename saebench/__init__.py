"""saebench: a workbench for sparse autoencoders on language models."""

import importlib
from typing import Any

__version__ = "0.2.0"

_ROOMS = {
    "SAE": "sae",
    "attached": "sae",
    "capture": "models",
    "load_model": "models",
    "load_sae": "sae",
    "open_feature_index": "index",
    "open_store": "store",
}
"""What a notebook begins with, by the room that has it."""


def __getattr__(name: str) -> Any:
    """A room is imported as something of it is asked for: the package itself costs nothing."""
    if name not in _ROOMS:
        raise AttributeError(f"saebench has no {name!r}; it has its rooms, and of them {', '.join(_ROOMS)}")
    return getattr(importlib.import_module(f"saebench.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_ROOMS]

"""What a store was made with, and which one an SAE was trained on: found from wherever a command is started."""

import math
from pathlib import Path

from saebench.files import found_from
from saebench.models import LanguageModel, ModelDtype, load_model, model_path
from saebench.sae import read_config
from saebench.store.reader import Store, open_store
from saebench.store.schema import MANIFEST


def recorded_store(sae: Path) -> Path | None:
    """Where the store is that an SAE was trained on, as its cfg.json says; None where it does not say."""
    recorded = read_config(sae).get("metadata", {}).get("saebench", {}).get("store")
    return None if recorded is None else found_from(sae, Path(recorded))


def longest_of(sae: Path, hook: str) -> float:
    """The norm above which vectors are massive for an SAE: by the store it was trained on, or as its cfg.json says; inf where neither does."""
    store = recorded_store(sae)
    if store is not None and (store / MANIFEST).exists():
        return open_store(store).norms(hook).bound
    recorded = read_config(sae).get("metadata", {}).get("saebench", {}).get("longest_row")
    return math.inf if recorded is None else float(recorded)


def model_name(folder: Path, recorded: str) -> str:
    """A model as `load_model` finds it from here: a relative folder that a file in `folder` recorded may be seen from above that."""
    if Path(model_path(recorded)).is_absolute() or Path(recorded).is_dir():
        return recorded
    found = found_from(folder, Path(recorded))
    return str(found) if found.is_dir() else recorded


def model_of(
    store: Store, device: str | None = None, dtype: ModelDtype | None = None, *, trust_remote_code: bool = False
) -> LanguageModel:
    """The model, computing as it did when the store was made unless told otherwise.

    Raises ValueError where it cannot be loaded, or its weights are others now.
    """
    made = store.manifest["identity"]
    model = load_model(
        model_name(store.folder, made["model"]["id"]),
        device=device,
        dtype=dtype or made["model_dtype"],
        revision=made["model"]["revision"],
        trust_remote_code=trust_remote_code,
    )
    if model.hash_like(made["model"]["weights"]) != made["model"]["weights"]:
        raise ValueError(
            f"model {model.id!r} has weights {model.weights_hash}, store {store.folder} was made with {made['model']['weights']}: "
            "use the model it was made with, or harvest again"
        )
    return model

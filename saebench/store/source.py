"""What a store was made with, and which one an SAE was trained on: found from wherever a command is started."""

import math
from pathlib import Path
from typing import Literal, NamedTuple

from saebench.files import found_from
from saebench.models import LanguageModel, ModelDtype, load_model, model_path
from saebench.sae import read_config
from saebench.store.pair import open_pair
from saebench.store.reader import Store, open_store
from saebench.store.schema import MANIFEST


def recorded_store(sae: Path, which: Literal["store", "beside"] = "store") -> Path | None:
    """Where the store is that an SAE was trained on, as its cfg.json says, or the one beside it; None where it does not say."""
    recorded = read_config(sae).get("metadata", {}).get("saebench", {}).get(which)
    return None if recorded is None else found_from(sae, Path(recorded))


def store_for(sae: Path, given: Path | None) -> Path:
    """The store given, or the one that an SAE was trained on. Raises ValueError where it does not say."""
    if (store := given or recorded_store(sae)) is None:
        raise ValueError(f"{sae} does not say what it was trained on; give a store of its hook with --store")
    return store


def store_of(sae: Path, folder: Path) -> Store:
    """A store as an SAE reads it: with the one beside it that it was trained on, where there were two."""
    return open_pair(folder, recorded_store(sae, "beside"))


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


class Origin(NamedTuple):
    """A model as it was recorded when its vectors were made, by the name under which it is found from here."""

    name: str
    revision: str | None
    """on the hub"""
    weights: str | None
    """their hash; None where it is not known"""
    record: str
    """what says so: which store, or SAE"""


def origin_of(sae: Path, store: Store | None = None, weights: str | None = None) -> Origin | None:
    """The model that an SAE is of, as its store (default: the one it was trained on) or else its cfg.json says; None where neither does.

    `weights` is their hash where more is known than these say. A model that lies where cfg.json says is taken from there.
    """
    metadata = read_config(sae).get("metadata", {})
    if store is None and (folder := recorded_store(sae)) is not None and (folder / MANIFEST).exists():
        there, of = open_store(folder), metadata["saebench"].get("identity", {}).get("store")
        store = there if of in (None, there.hash, *there.grown_from) else None  # another may lie there by now
    name = metadata.get("model_name")
    found = None if name is None else model_name(sae, name)
    if store is None or "model" not in store.manifest["identity"]:
        return None if found is None else Origin(found, metadata.get("model_revision"), weights, f"SAE {sae}")
    made = _made_with(store)
    here = found is not None and Path(model_path(found)).is_dir()
    return made._replace(name=found if here else made.name, weights=weights or made.weights)


def check_origin(model: LanguageModel, origin: Origin) -> None:
    """Raises ValueError where a model's weights are others than was recorded."""
    if model.hash_like(origin.weights) != (origin.weights or model.weights_hash):
        raise ValueError(
            f"model {model.id!r} has weights {model.weights_hash}, {origin.record} was made with {origin.weights}: "
            "use the model it was made with, or harvest again"
        )


def _made_with(store: Store) -> Origin:
    made = store.manifest["identity"]["model"]
    return Origin(model_name(store.folder, made["id"]), made["revision"], made["weights"], f"store {store.folder}")


def model_of(
    store: Store, device: str | None = None, dtype: ModelDtype | None = None, *, trust_remote_code: bool = False
) -> LanguageModel:
    """The model, computing as it did when the store was made unless told otherwise.

    Raises ValueError where it cannot be loaded, or its weights are others now.
    """
    origin = _made_with(store)
    model = load_model(
        origin.name,
        device=device,
        dtype=dtype or store.manifest["identity"]["model_dtype"],
        revision=origin.revision,
        trust_remote_code=trust_remote_code,
    )
    check_origin(model, origin)
    return model

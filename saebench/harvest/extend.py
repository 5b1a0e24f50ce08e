"""A finished store grows: more of the same text, through the same model, behind what is there."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saebench.config import Count, differences, flat
from saebench.files import locked, read_json
from saebench.harvest.ranks import World
from saebench.harvest.run import fill, open_model
from saebench.harvest.settings import HarvestConfig, as_made, identity_of
from saebench.models import LanguageModel, widths_of
from saebench.store import Store, StoreWriter, open_store
from saebench.store.manifest import drop_unfinished
from saebench.store.schema import EXTENSION
from saebench.text import TextConfig, fingerprint, pinned


@dataclass(frozen=True, kw_only=True)
class ExtendConfig:
    """By how much a store grows, and where the model runs; all else is as the store was made."""

    tokens: Count
    """training tokens to add"""
    device: str | None = None
    """cuda, mps or cpu (default: the first of these at hand), or all: a model that is too large for one GPU lies on all of them"""
    trust_remote_code: bool = False
    """run code that comes with a hub model"""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}; expected at least 1")


def extend(folder: Path, config: ExtendConfig) -> Store | None:
    """Add shards to the finished store in `folder`; None when Ctrl-C ended it early, and the same call continues.

    Until all of them are whole, the store is what it was. Raises ValueError when its text is all in it, when
    model, tokenizer or text are no longer those it was made with, and for another extension left unfinished.
    """
    with locked(folder):
        store = open_store(folder)
        made = store.manifest["identity"]
        told, text = settings_of(folder, made, config)
        target = made | {"tokens": told.tokens, "extended_from": [*made.get("extended_from", []), made["tokens"]]}
        if _was_finished(folder, made, target, config.tokens):
            return store
        if store.manifest["exhausted"]:
            raise ValueError(
                f"{folder} holds all {store.rows('train'):,} training tokens of {text.dataset!r}: there is no more text to extend it with"
            )
        model = open_as_made(folder, target, told, text)
        widths = widths_of(model, told.hooks)
        writer = StoreWriter(folder, target, widths, told.stored_as, finished=store.manifest)
        return fill(told, pinned(text, made["text"]["fingerprint"]), model, writer, World())


def open_as_made(folder: Path, made: dict[str, Any], told: HarvestConfig, text: TextConfig) -> LanguageModel:
    """The model of a store. Raises ValueError where model, tokenizer or text are no longer those that it was made with."""
    model = open_model(told, told.device)
    found = made | identity_of(told, text, model, fingerprint(text, made["text"]))
    if changed := differences(flat(made), flat(found)):
        raise ValueError(
            f"{folder} was made with others than are here now: {'; '.join(changed)}. Restore them, or harvest a new store"
        )
    return model


def settings_of(folder: Path, made: dict[str, Any], config: ExtendConfig) -> tuple[HarvestConfig, TextConfig]:
    """What the store was made with, and how many tokens it is to have."""
    told, text = as_made(folder, made)
    tokens, trusted = made["tokens"] + config.tokens, config.trust_remote_code
    return dataclasses.replace(told, tokens=tokens, device=config.device, trust_remote_code=trusted), text


def _was_finished(folder: Path, made: dict[str, Any], target: dict[str, Any], tokens: int) -> bool:
    """Whether this very extension was killed once it was whole, and just before it was tidied up.

    Raises ValueError where one by another number of tokens was begun and not finished.
    """
    path = folder / EXTENSION
    if not path.exists():
        return False
    begun = read_json(path)["identity"]
    if begun == made:
        drop_unfinished(path)
        return made["tokens"] - made["extended_from"][-1] == tokens
    if begun != target:
        raise ValueError(
            f"{folder} is being extended by {begun['tokens'] - made['tokens']} tokens, not {tokens}: finish that first, with "
            f"`saebench store extend {folder} --tokens {begun['tokens'] - made['tokens']}`"
        )
    return False

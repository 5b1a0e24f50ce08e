"""What a harvest is told, and the identity that its store is known by."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from saebench.config import Count, to_json
from saebench.files import hash_files
from saebench.models import EMBEDDED_MODEL, HookKind, LanguageModel, ModelDtype, hook_name, widths_of
from saebench.store.coding import row_bytes
from saebench.store.manifest import read_manifest
from saebench.store.schema import MANIFEST, PROVENANCE, StoreDtype
from saebench.text import EMBEDDED, TextConfig

Kind = Literal[HookKind, "mlp"]


@dataclass(frozen=True, kw_only=True)
class HarvestConfig:
    """What to run, on how much text, and how to keep it."""

    model: str = EMBEDDED_MODEL
    """`embedded`, a directory made by save_pretrained, or a hub id"""
    model_revision: str | None = None
    """branch, tag or commit of a hub model"""
    random_weights: int | None = None
    """seed of random weights in place of the model's own, a control: that model is written to OUT-model, beside the store"""
    layers: tuple[int, ...]
    """layers whose vectors to keep, for instance 1,2"""
    kinds: tuple[Kind, ...] = ("resid_post",)
    """positions in each layer: resid_pre, resid_mid, resid_post, attn_z (what goes into attention's output projection), attn_out, mlp_in, ln2_normalized (the same before the norm's gain), mlp_post (the MLP's neurons), mlp_out; mlp is mlp_in and mlp_out, what an MLP reads and what it writes"""
    tokens: Count = 1_000_000
    """training tokens to harvest (special tokens included)"""
    validation_tokens: Count = 1_000_000
    """held-out tokens to keep at most, of those met on the way"""
    context: Count = 256
    """tokens in a context, BOS included"""
    batch: Count | None = None
    """contexts in a forward pass (default: 32, or fewer where their rows would take more than 256 MiB; or as the store was begun)"""
    shard_contexts: Count | None = None
    """contexts in a shard, the unit in which a harvest is resumed (default: 256, or fewer where they would take more than 1 GiB; or as the store was begun)"""
    dtype: StoreDtype | None = None
    """how vectors are kept on disk (default: bfloat16 where the model computes in it, else float16; or as the store was begun)"""
    model_dtype: ModelDtype | None = None
    """how the model computes (default: bfloat16 on GPUs that have it, else float32)"""
    device: str | None = None
    """cuda, mps or cpu (default: the first of these at hand), or all: a model that is too large for one GPU lies on all of them"""
    trust_remote_code: bool = False
    """run code that comes with a hub model"""
    out: Path
    """folder of the store, for instance activations/NAME"""

    def __post_init__(self) -> None:
        if not self.layers or min(self.layers) < 0:
            raise ValueError(f"layers is {self.layers}; expected at least one layer, counted from 0")
        if len(set(self.hooks)) < len(self.hooks):
            raise ValueError(f"layers {self.layers} with kinds {self.kinds} name a hook twice; expected each once")
        for name in ("tokens", "validation_tokens", "context", "batch", "shard_contexts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        if self.context < 2:
            raise ValueError(f"context is {self.context}; expected at least 2: BOS and a token")

    @property
    def stored_as(self) -> StoreDtype:
        """`dtype`, once it is settled."""
        assert self.dtype is not None
        return self.dtype

    @property
    def per_pass(self) -> int:
        """`batch`, once it is settled."""
        assert self.batch is not None
        return self.batch

    @property
    def per_shard(self) -> int:
        """`shard_contexts`, once they are settled."""
        assert self.shard_contexts is not None
        return self.shard_contexts

    @property
    def hooks(self) -> list[str]:
        return [hook_name(layer, kind) for layer in self.layers for kind in self.hook_kinds]

    @property
    def hook_kinds(self) -> list[HookKind]:
        """`kinds`, one by one."""
        both: tuple[HookKind, ...] = ("mlp_in", "mlp_out")
        return [one for kind in self.kinds for one in (both if kind == "mlp" else (kind,))]


def text_of(config: HarvestConfig, text: TextConfig) -> tuple[TextConfig, dict[str, Any] | None]:
    """(the text to read, what a harvest begun in the same folder noted of its own, None where there is none).

    Raises ValueError where none is named for a model that has none of its own.
    """
    made = begun_store(config.out)
    begun = None if made is None else made["identity"]["text"]
    if text.dataset is None:
        if config.model != EMBEDDED_MODEL and (begun or {}).get("dataset") != EMBEDDED:
            raise ValueError(
                f"no text was named for model {config.model!r}: give --dataset with a file or folder (txt, md, jsonl, parquet), "
                "a data set on the hub, for instance NeelNanda/pile-10k, or `embedded`, the source of Python's standard library"
            )
        text = dataclasses.replace(text, dataset=EMBEDDED)
    if begun is not None:
        first = {name: value for name, value in _FIRST.items() if name not in begun}
        if text.split_by is not None:  # what is asked for is compared, and refused
            first.pop("split_by", None)
        text = dataclasses.replace(text, **first)
    return text, begun


_FIRST: dict[str, Any] = {"split_by": "name", "errors": "replace"}
"""What the first stores did, which say nothing of it."""


def settled(config: HarvestConfig, model: LanguageModel) -> HarvestConfig:
    """With what is not given as in the store that was begun, or else a dtype that holds what the model gives (float16 ends at 65,504),
    and as many contexts in a pass and in a shard as fit their bounds in bytes, one at least."""
    made = begun_store(config.out)
    if made is None:
        usual: StoreDtype = "bfloat16" if model.dtype == "bfloat16" else "float16"
        dtype = config.dtype or usual
        size = config.context * bytes_per_row(widths_of(model, config.hooks).values(), dtype)
        fit = {name: min(most, max(bound // size, 1)) for name, (most, bound) in _BOUNDS.items()}
        usually = {"dtype": dtype, **fit}
    else:
        usually = {name: made["identity"][name] for name in ("dtype", *_BOUNDS)}
    missing = {name: value for name, value in usually.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **missing)


_BOUNDS = {"batch": (32, 2**28), "shard_contexts": (256, 2**30)}
"""contexts at most, and bytes of their rows"""


def bytes_per_row(widths: Iterable[int], dtype: StoreDtype) -> int:
    """Of the vectors at all hooks, and of where they come from."""
    return sum(row_bytes(dtype, width) for width in widths) + sum(kind.itemsize for kind in PROVENANCE.values())


def begun_store(folder: Path) -> dict[str, Any] | None:
    """The manifest of a store that has shards; one without was not begun. Raises ValueError where no harvest made it."""
    made = read_manifest(folder) if (folder / MANIFEST).exists() else None
    if not made or not (made["shards"] or any(folder.glob("shard-*.h5"))):
        return None
    if "text" not in made["identity"]:
        raise ValueError(f"{folder} holds a store of vectors that no harvest made: choose another --out")
    return made


def noted(text: TextConfig) -> dict[str, Any]:
    """What an identity says of a text: nothing of what the first stores did, too."""
    values = to_json(text) | {"split_by": "content" if text.by_content else "name"}
    return {name: value for name, value in values.items() if name not in _FIRST or value != _FIRST[name]}


def as_noted(values: dict[str, Any]) -> TextConfig:
    """The inverse of `noted`."""
    return TextConfig(**_FIRST | {name: value for name, value in values.items() if name != "fingerprint"})


def as_made(folder: Path, identity: Mapping[str, Any]) -> tuple[HarvestConfig, TextConfig]:
    """What a store was made with, but for the device."""
    kept = ("context", "batch", "shard_contexts", "dtype", "model_dtype", "validation_tokens", "tokens")
    told = HarvestConfig(
        model=identity["model"]["id"],
        model_revision=identity["model"]["revision"],
        layers=tuple(identity["layers"]),
        kinds=tuple(identity["kinds"]),
        out=folder,
        **{name: identity[name] for name in kept},
    )
    return told, as_noted(identity["text"])


def identity_of(config: HarvestConfig, text: TextConfig, model: LanguageModel, source: str | None) -> dict[str, Any]:
    """Everything that decides the store's contents."""
    kept = to_json(config)
    for name in ("out", "device", "trust_remote_code", "model", "model_revision", "random_weights"):
        del kept[name]
    made = begun_store(config.out)
    weights = model.hash_like(None if made is None else made["identity"]["model"]["weights"])
    return {
        **kept,
        "kinds": config.hook_kinds,
        "model_dtype": model.dtype,
        "model": {"id": model.id, "revision": config.model_revision, "weights": weights},
        "tokenizer": {"files": hash_files(list(model.tokenizer_files))},
        "text": {**noted(text), "fingerprint": source},
    }

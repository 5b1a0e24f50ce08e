"""Where in a model a hook is: the module on whose way in, or out of which, its vectors are.

Hook names are TransformerLens' own. What goes into a block and comes out of it is found in any model; where attention and
MLP write to the stream, and which module an MLP is, is what TransformerLens knows of a family: `transformer_lens_paths`, the
only place that imports more of it than names.
"""

import inspect
import re
import weakref
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn

from saebench.models.load import LanguageModel

HookKind = Literal["resid_pre", "resid_post", "mlp_in", "mlp_out", "attn_out"]
KINDS: tuple[HookKind, ...] = get_args(HookKind)
HOOK = re.compile(r"blocks\.(\d+)\.(?:hook_(resid_pre|resid_post|mlp_out|attn_out)|mlp\.hook_(in))")
"""The hooks that can be harvested and trained on: layer and kind, or layer and the `in` of the MLP."""
_PASSED = ("resid_pre", "attn_out", "mlp_in", "mlp_out", "resid_post")  # in a layer, in this order


_known: weakref.WeakKeyDictionary[nn.Module, dict[str, str]] = weakref.WeakKeyDictionary()


class Place(NamedTuple):
    """Vectors on the way into a module, or out of it."""

    module: nn.Module
    inward: bool = False
    scale: float = 1.0
    """what the module's output is multiplied by as it is added to the stream"""


def hook_name(layer: int, kind: HookKind = "resid_post") -> str:
    """`mlp_in` is what the MLP is called with, behind the norm before it: TransformerLens' `mlp.hook_in`, and not its `hook_mlp_in`."""
    return f"blocks.{layer}.mlp.hook_in" if kind == "mlp_in" else f"blocks.{layer}.hook_{kind}"


def parse_hook(hook: str) -> tuple[int, HookKind]:
    """(layer, kind). Raises ValueError for what is no hook's name."""
    match = HOOK.fullmatch(hook)
    if match is None:
        raise ValueError(
            f"hook {hook!r} is not known; expected blocks.LAYER.hook_KIND with KIND one of resid_pre, resid_post, mlp_out, attn_out, "
            "or blocks.LAYER.mlp.hook_in"
        )
    return int(match[1]), match[2] or "mlp_in"  # type: ignore[return-value]


def depth(hook: str) -> tuple[int, int]:
    """Where on the way through a model a hook is: of two, a pass comes first to that of the lesser depth."""
    layer, kind = parse_hook(hook)
    return layer, _PASSED.index(kind)


def place_of(model: LanguageModel, hook: str) -> Place:
    """Where a hook of a model is. Raises ValueError where it has none of that name."""
    layer, kind = parse_hook(hook)
    if layer >= model.n_layers:
        raise ValueError(f"hook {hook!r} is beyond model {model.id!r}, whose layers are 0 to {model.n_layers - 1}")
    block = model.blocks[layer]
    if kind in ("resid_pre", "resid_post"):
        return Place(block, inward=kind == "resid_pre")
    family = type(model.module).__name__
    if model.module not in _known:
        _known[model.module] = transformer_lens_paths(model.module.config, family, model.id)
    path = _known[model.module].get(kind)
    if path is None:
        raise ValueError(
            f"hook {hook!r} of model {model.id!r} is not known: TransformerLens does not say where {family} has it"
        )
    try:
        module = block.get_submodule(path)
    except AttributeError as error:
        raise ValueError(
            f"hook {hook!r} is not in model {model.id!r}: layer {layer} of this {family} has no {path}"
        ) from error
    if kind == "mlp_in":
        return Place(module, inward=True)
    return Place(module, scale=float(getattr(_text_config(model), "residual_multiplier", 1.0)))


def _text_config(model: LanguageModel) -> Any:
    return model.module.config.get_text_config(decoder=True)


def transformer_lens_paths(config: Any, family: str, name: str) -> dict[str, str]:
    """Where within a block of a model named `name` the modules are whose outputs are `attn_out` and `mlp_out`, and the one whose
    input is `mlp_in`, as far as TransformerLens knows.

    These are its internals, which it does not promise to keep: another version is tried by tests/test_models.py before
    pyproject.toml allows it. What is gone from it is an error here, and not a family that it does not have.
    """
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf

    select, told = ArchitectureAdapterFactory.select_architecture_adapter, (config, family, name, torch.float32)
    inspect.signature(build_bridge_config_from_hf).bind(*told)
    try:
        adapter: Any = select(build_bridge_config_from_hf(*told))
    except (
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
    ):  # a family that it does not have, or a configuration of its own
        return {}
    block = (adapter.component_mapping or {}).get("blocks")
    if block is None:
        return {}
    # A family whose MLP and attention are scaled on their way to the stream has no alias for either.
    usual = {"attn_out": "attn.hook_out", "mlp_out": "mlp.hook_out"}
    found: dict[str, str] = {}
    for kind, default in usual.items():
        alias = block.hook_aliases.get(f"hook_{kind}", default)
        part: Any = block
        names: list[str] = []
        for name in (alias[0] if isinstance(alias, list) else alias).split(".")[:-1]:
            part = part.submodules.get(name) if part is not None else None
            names += [part.name] if part is not None and part.name else []
        if part is not None and names:
            found[kind] = ".".join(names)
    if (mlp := block.submodules.get("mlp")) is not None:
        first = mlp if mlp.name else mlp.submodules.get("in")  # an MLP need not be a module of its own
        if first is not None and first.name:
            found["mlp_in"] = first.name
    return found

"""Where in a model a hook is: the module on whose way in, or out of which, its vectors are.

Hook names are TransformerLens' own. What goes into a block and comes out of it is found in any model; where attention and
MLP write to the stream, which module an MLP is, the norm before it and the last map of attention is what TransformerLens knows of a
family: `transformer_lens_paths`, the only place that imports more of it than names.
"""

import inspect
import re
import weakref
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saebench.models.devices import copied
from saebench.models.load import LanguageModel

HookKind = Literal[
    "resid_pre", "attn_z", "attn_out", "resid_mid", "ln2_normalized", "mlp_in", "mlp_post", "mlp_out", "resid_post"
]
KINDS: tuple[HookKind, ...] = get_args(HookKind)
"""In the order in which a pass comes to them."""
_OF_PARTS = ("attn_z", "ln2_normalized", "mlp_in", "mlp_post")  # PART_NAME is PART.hook_NAME
HOOK = re.compile(
    r"blocks\.(\d+)\.(?:hook_(resid_pre|resid_mid|resid_post|mlp_out|attn_out)|(attn\.hook_z|ln2\.hook_normalized|mlp\.hook_in|mlp\.hook_post))"
)
"""The hooks that can be harvested and trained on: layer and kind, or layer and a hook of a part of it."""


_known: weakref.WeakKeyDictionary[nn.Module, dict[str, str]] = weakref.WeakKeyDictionary()


class Place(NamedTuple):
    """Vectors on the way into a module, or out of it."""

    module: nn.Module
    inward: bool = False
    scale: float | Float[Tensor, " D"] = 1.0
    """what the module's vectors are multiplied by to be those of the hook"""
    block: nn.Module | None = None
    """whose input is added to them, for the stream between attention and MLP"""


def hook_name(layer: int, kind: HookKind = "resid_post") -> str:
    """`mlp_in` is what the MLP is called with, behind the norm before it: TransformerLens' `mlp.hook_in`, and not its `hook_mlp_in`.

    `mlp_post` is what goes into the MLP's last map: its neurons, where it has gates behind them.
    """
    part, _, name = kind.partition("_")
    return f"blocks.{layer}.{part}.hook_{name}" if kind in _OF_PARTS else f"blocks.{layer}.hook_{kind}"


def parse_hook(hook: str) -> tuple[int, HookKind]:
    """(layer, kind). Raises ValueError for what is no hook's name."""
    match = HOOK.fullmatch(hook)
    if match is None:
        raise ValueError(
            f"hook {hook!r} is not known; expected blocks.LAYER.hook_KIND with KIND one of resid_pre, resid_mid, resid_post, mlp_out, attn_out, "
            "or blocks.LAYER.mlp.hook_in, .mlp.hook_post, .attn.hook_z or .ln2.hook_normalized"
        )
    return int(match[1]), match[2] or match[3].replace(".hook_", "_")  # type: ignore[return-value]


def depth(hook: str) -> tuple[int, int]:
    """Where on the way through a model a hook is: of two, a pass comes first to that of the lesser depth."""
    layer, kind = parse_hook(hook)
    return layer, KINDS.index(kind)


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
    path = _known[model.module].get("attn_out" if kind == "resid_mid" else kind)
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
    if kind in ("mlp_in", "mlp_post", "attn_z"):
        return Place(module, inward=True)
    if kind == "ln2_normalized":
        return Place(module, scale=1 / _gain(model, hook, module))
    scale = float(getattr(_text_config(model), "residual_multiplier", 1.0))
    return Place(module, scale=scale, block=block if kind == "resid_mid" else None)


def widths_of(model: LanguageModel, hooks: Iterable[str]) -> dict[str, int]:
    """How many numbers the vectors of each hook have: d_model, but where heads are one behind the other, or neurons. Raises ValueError as `place_of`."""
    found = dict.fromkeys(hooks, model.d_model)
    for hook in found:
        if parse_hook(hook)[1] in ("attn_z", "mlp_post"):
            weight: Any = place_of(model, hook).module.weight
            found[hook] = weight.numel() // model.d_model
    return found


@torch.no_grad()
def _gain(model: LanguageModel, hook: str, norm: nn.Module) -> Float[Tensor, " D"]:
    """What a norm multiplies each number by, by what it makes of rows that are normalised already."""
    signs = torch.ones(model.d_model, device=model.device)
    signs[1::2] = -1
    tried = copied(norm, model.device, torch.float32)
    forward: Any = type(tried).forward
    up, down = (
        forward(tried, 1e4 * sign * signs[None, None])[0, 0] for sign in (1, -1)
    )  # an ε of the norm is nothing to it
    gain, bias = (up - down) / 2 * signs, (up + down) / 2
    if bias.abs().max() > 1e-4 * gain.abs().max():
        raise ValueError(
            f"hook {hook!r} of model {model.id!r}: its norm adds a bias, which no gain takes off: use mlp_in"
        )
    if zeros := int((gain.abs() < 1e-6).sum()):
        raise ValueError(
            f"hook {hook!r} of model {model.id!r}: the gain of its norm is 0 in {zeros} of {len(gain)} dimensions, behind which "
            "nothing is left of what came before it: use mlp_in"
        )
    return gain


def _text_config(model: LanguageModel) -> Any:
    return model.module.config.get_text_config(decoder=True)


def transformer_lens_paths(config: Any, family: str, name: str) -> dict[str, str]:
    """Where within a block of a model named `name` the modules are whose outputs are `attn_out` and `mlp_out`, those whose
    inputs are `mlp_in`, `mlp_post` and `attn_z`, and the norm of `ln2_normalized`, as far as TransformerLens knows.

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
        if (last := mlp.submodules.get("out")) is not None and last.name:
            found["mlp_post"] = ".".join(name for name in (mlp.name, last.name) if name)
    attention, norm = block.submodules.get("attn"), block.submodules.get("ln2")
    if attention is not None and (last := attention.submodules.get("o")) is not None and attention.name and last.name:
        found["attn_z"] = f"{attention.name}.{last.name}"
    if norm is not None and norm.name:
        found["ln2_normalized"] = norm.name
    return found

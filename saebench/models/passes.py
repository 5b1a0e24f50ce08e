"""Forward passes: vectors taken at hooks, others put in their place, logits where they are wanted.

B contexts in the batch, L positions, D d_model, V vocabulary, N chosen positions, H the width of a hook.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saebench.models.attach import Edit, attach, first_of
from saebench.models.load import LanguageModel, wrapped
from saebench.models.places import hook_name, parse_hook, place_of

Replace = Callable[[Float[Tensor, "B L H"]], Float[Tensor, "B L H"]]
MLP = Callable[[Float[Tensor, "N D"]], Float[Tensor, "N D"]]
"""What stands in for an MLP: from what it reads to what it adds to the stream."""


class _AllCaptured(Exception):
    """Ends a forward pass once the last hook wanted has fired."""


def capturer(model: LanguageModel, hooks: Sequence[str]) -> Callable[..., None]:
    """A forward pass, to be run many times, that hands each vector wanted to a function and ends after the deepest.

    The function gets the hook's name and a tensor `[B, L, D]` in the model's dtype, which later layers may write over.
    Keeps no keys and values, unless options of the pass, which may follow the function, say so. Raises ValueError for a hook that the model does not have.
    """
    places = {name: place_of(model, name) for name in hooks}

    @torch.inference_mode()
    def run(tokens: Int[Tensor, "B L"], take: Callable[[str, Tensor], None], **options: Any) -> None:
        missing = set(hooks)

        def see(name: str, value: Tensor) -> None:
            take(name, value)
            missing.discard(name)
            if not missing:
                raise _AllCaptured

        handles = [attach(model, place, lambda value, name=name: see(name, value)) for name, place in places.items()]
        try:
            model.base(tokens, **({"use_cache": False} | options))
        except _AllCaptured:
            return
        finally:
            for handle in handles:
                handle.remove()
        raise ValueError(f"hook {sorted(missing)[0]!r} never fired in model {model.id!r}; it has no such position")

    return run


def capture(
    model: LanguageModel, tokens: Int[Tensor, "B L"], hooks: Sequence[str]
) -> dict[str, Float[Tensor, "B L D"]]:
    """The vectors at `hooks`, from one forward pass that stops after the deepest of them."""
    captured: dict[str, Tensor] = {}
    capturer(model, hooks)(tokens, lambda name, value: captured.update({name: value.clone()}))
    return captured


def edits(model: LanguageModel, functions: Mapping[str, Edit]) -> Callable[[], AbstractContextManager[None]]:
    """A context manager, to be had many times, under which the vectors at each hook go through its function."""
    places = {name: place_of(model, name) for name in functions}

    @contextlib.contextmanager
    def attached() -> Iterator[None]:
        handles: list[Any] = []
        try:
            for name, function in functions.items():
                handles.append(attach(model, places[name], function))
            yield
        finally:
            for handle in handles:
                handle.remove()

    return attached


See = Callable[[str, Tensor], Tensor | None]
"""The new value of the hook named, or None for the old one."""


@contextlib.contextmanager
def watched(
    model: LanguageModel | nn.Module, hooks: Sequence[str]
) -> Iterator[Callable[[See], AbstractContextManager[None]]]:
    """What puts a function in the way of the vectors at hooks of a model of `load_model`, one of TransformerLens, or a Hugging Face module.

    Raises ValueError for a hook that the model does not have, or whose vectors are not what its name says.
    """
    from saebench.models.checks import check_hook

    if isinstance(model, nn.Module) and (points := getattr(model, "hook_dict", None)) is not None:
        if lacking := [hook for hook in hooks if hook not in points]:
            raise ValueError(
                f"the {type(model).__name__} has no hook {lacking[0]!r}; its hook_dict lists those that it has"
            )
        yield lambda see: _points(points, hooks, see)
        return
    with wrapped(model) if isinstance(model, nn.Module) else contextlib.nullcontext(model) as of:
        for hook in hooks:
            check_hook(of, hook)
        yield lambda see: edits(of, {hook: partial(see, hook) for hook in hooks})()


@contextlib.contextmanager
def _points(points: Mapping[str, nn.Module], hooks: Sequence[str], see: See) -> Iterator[None]:
    """A function in the way of what goes through hook points of TransformerLens, heads one behind the other."""

    def put(hook: str, _: nn.Module, __: Any, output: Tensor) -> Tensor | None:
        new = see(hook, output.flatten(2))
        return None if new is None else new.view(output.shape)

    handles = [points[hook].register_forward_hook(partial(put, hook)) for hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def usual_positions(
    model: LanguageModel, tokens: Int[Tensor, "B L"], keep_BL: Bool[Tensor, "B L"], longest: Mapping[str, float]
) -> Bool[Tensor, "B L"]:
    """Those of the positions kept whose vectors, in the model as it is, are at no hook longer than `longest` says."""
    usual_BL = keep_BL.to(tokens.device, copy=True)

    def look(hook: str, value: Tensor) -> None:
        usual_BL.logical_and_(value.float().norm(dim=2) <= longest[hook])

    if longest:
        capturer(model, list(longest))(tokens, look)
    return usual_BL


@contextlib.contextmanager
def mlps_replaced(
    model: LanguageModel, functions: Mapping[int, MLP], where_BL: Bool[Tensor, "B L"], reads: Iterable[str] = ()
) -> Iterator[None]:
    """In it, the MLP of each layer named writes what its function makes of what it reads, at some positions of the same contexts.

    Functions get the vectors of these positions in float32, and those of a later layer what the earlier ones have made of the
    stream: those at `mlp_in`, or at the layer's hook among `reads` (`ln2_normalized`, `resid_mid`). They may call a module that is
    replaced by its `forward` alone. Elsewhere (special tokens, massive rows) each MLP writes what it writes. Raises ValueError where
    the model has no such hook or no `mlp_out` of a layer; `check_hook` tries them.
    """
    read: dict[int, Tensor] = {}

    def take(layer: int, value: Tensor) -> None:
        read[layer] = value[where_BL].float()

    def write(layer: int, value: Tensor) -> Tensor:
        written = value.clone()
        written[where_BL] = functions[layer](read.pop(layer)).to(value.dtype)
        return written

    changes: dict[str, Edit] = {}
    at = {parse_hook(hook)[0]: hook for hook in reads}
    for layer in functions:
        changes[at.get(layer) or hook_name(layer, "mlp_in")] = partial(take, layer)
        changes[hook_name(layer, "mlp_out")] = partial(write, layer)
    with edits(model, changes)():
        yield


# ----------------------------------------------------------------------------------------- logits


def logits(model: LanguageModel, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L V"]:
    """The logits at every position; with gradients where the caller wants them."""
    return model.module(tokens, use_cache=False).logits


@torch.inference_mode()
def spliced_logits(
    model: LanguageModel, tokens: Int[Tensor, "B L"], hook: str, replace: Replace
) -> Float[Tensor, "B L V"]:
    """Logits of the model whose vectors at `hook` went through `replace`.

    `replace` sees them in the model's dtype and returns the same shape and dtype.
    """
    with edits(model, {hook: replace})():
        return logits(model, tokens)


@torch.inference_mode()
def last_states(model: LanguageModel, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
    """What the logits are made of, at every position: the vectors behind the final norm."""
    return first_of(model.base(tokens, use_cache=False)).to(model.device)


@torch.inference_mode()
def head(model: LanguageModel, states_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
    """The logits of `last_states` at chosen positions, by the model's own code: its scale and soft cap are in them."""
    output = model.passing.output(last_hidden_state=states_ND[None])
    with standing_in([model.base], output):
        return model.module(states_ND.new_zeros(1, len(states_ND), dtype=torch.long), use_cache=False).logits[0]


@contextlib.contextmanager
def standing_in(modules: Iterable[nn.Module], output: Any) -> Iterator[None]:
    """Every one of `modules` returns `output` without running."""
    own = [(vars(module), vars(module).get("forward")) for module in modules]  # accelerate puts one there
    try:
        for names, _ in own:
            names["forward"] = lambda *args, **kwargs: output
        yield
    finally:
        for names, forward in own:
            names.pop("forward")
            names |= {} if forward is None else {"forward": forward}


# ------------------------------------------------------------------------------------- generation


@torch.inference_mode()
def next_logits(
    model: LanguageModel,
    tokens: Int[Tensor, "B L"],
    *,
    cache: Any = None,
    seen: int = 0,
    padding: Int[Tensor, " B"] | None = None,
    keep: int = 1,
    use_cache: bool = True,
) -> tuple[Float[Tensor, "B keep V"], Any]:
    """(logits after the last `keep` tokens, cache) of texts of which `cache` holds the first `seen` columns.

    `padding` counts the columns before each text's first token, cached ones included. The cache is None for a family that
    keeps its state in a form of its own: the next call is then given the whole texts again.
    """
    from transformers.cache_utils import Cache

    taken = inspect.signature(model.base.forward).parameters
    name = next((name for name in ("past_key_values", "cache_params") if name in taken), None)
    extra: dict[Any, Any] = {} if cache is None else {name: cache}
    if padding is not None:
        columns = torch.arange(seen + tokens.shape[1], device=tokens.device)
        places = columns - padding[:, None]
        masks = {"attention_mask": (places >= 0).long(), "position_ids": places[:, seen:].clamp(min=0)}
        extra |= {name: value for name, value in masks.items() if name in taken}
    output = model.base(tokens, use_cache=use_cache, **extra)
    states_BkD = first_of(output)[:, -keep:].to(model.device)
    logits_NV = head(model, rearrange(states_BkD, "b k d -> (b k) d"))
    found = getattr(output, name, None) if name and use_cache else None
    return rearrange(logits_NV, "(b k) v -> b k v", b=len(states_BkD)), found if isinstance(found, Cache) else None


def repeated(cache: Any, times: int) -> Any:
    """A cache with every text so many times in a row; None where it holds recurrent states, which cannot be repeated."""
    from transformers.cache_utils import LinearAttentionCacheLayerMixin

    if cache is None or any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers):
        return None
    cache.batch_repeat_interleave(times)
    return cache

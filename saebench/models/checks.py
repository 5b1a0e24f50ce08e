"""What a loaded model must satisfy, tried on it: what a library says of a family is not what a checkpoint does.

B contexts, L positions, D d_model, V vocabulary.
"""

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor

from saebench.models.attach import attach
from saebench.models.load import LanguageModel
from saebench.models.passes import capture, edits, head, last_states, logits, next_logits
from saebench.models.places import Place, hook_name, parse_hook, place_of, widths_of

_CONTEXTS, _POSITIONS = 2, 8
_CLOSE = 1e-2  # of the longest row: the rounding of half-precision types, through all of the layers
_REACH = 0.1  # of an edit, that may not arrive
_BEFORE_MLP = ("attn_out", "resid_mid", "ln2_normalized", "mlp_in", "mlp_post")


def probe_tokens(model: LanguageModel) -> Int[Tensor, "B L"]:
    """Ordinary tokens, spread over the vocabulary."""
    special = set(model.encoder.special)
    if model.tokenizer is not None:
        special |= set(model.tokenizer.added_tokens_decoder)
    size = min(model.n_vocab, model.n_vocab if model.tokenizer is None else model.tokenizer.vocab_size)
    plain = torch.tensor([token for token in range(size) if token not in special] or [0])
    wanted = torch.linspace(0, len(plain) - 1, _CONTEXTS * _POSITIONS + 2)[1:-1].round().long()
    return rearrange(plain[wanted], "(l b) -> b l", b=_CONTEXTS).contiguous().to(model.device)


@torch.inference_mode()
def check_model(model: LanguageModel) -> None:
    """Run a model on a few tokens. Raises ValueError, saying what is not as it must be, unless

    every layer runs once and gives vectors `[B, L, D]`, each reads what the one before it writes, all of it is finite,
    no position reads those after it, and the logits are a function of each position's last vector.
    """
    tokens = probe_tokens(model)
    seen: dict[tuple[int, bool], list[Tensor]] = {}

    def keep(layer: int, inward: bool, value: Tensor) -> None:
        seen.setdefault((layer, inward), []).append(value.clone())

    handles = [
        attach(model, Place(block, inward), lambda value, layer=layer, inward=inward: keep(layer, inward, value))
        for layer, block in enumerate(model.blocks)
        for inward in (True, False)
    ]
    try:
        output = model.base(tokens, use_cache=False)
    except Exception as error:
        raise ValueError(
            f"model {model.id!r} does not run on plain token ids: {type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    model.passing.output = type(output)
    shape = (*tokens.shape, model.d_model)
    for layer in range(model.n_layers):
        for inward in (True, False):
            found = seen.get((layer, inward), [])
            if len(found) != 1:
                raise ValueError(
                    f"layer {layer} of model {model.id!r} runs {len(found)} times in a pass, expected once: "
                    "its residual stream has no place of that name"
                )
            if tuple(found[0].shape) != shape:
                raise ValueError(
                    f"layer {layer} of model {model.id!r} has vectors of shape {tuple(found[0].shape)}, expected {shape} "
                    "(contexts, positions, d_model): it has no residual stream of one vector a position"
                )
        if not all(seen[layer, inward][0].isfinite().all() for inward in (True, False)):
            raise ValueError(_broken(model))
        if layer and not _close(seen[layer - 1, False][0], seen[layer, True][0]):
            raise ValueError(
                f"layer {layer} of model {model.id!r} does not read what layer {layer - 1} writes: it has no single residual stream"
            )
    clean = logits(model, tokens)
    if not clean.isfinite().all():
        raise ValueError(_broken(model))
    if not _close(head(model, last_states(model, tokens).flatten(0, 1)).view_as(clean), clean):
        raise ValueError(f"the logits of model {model.id!r} are not a function of its last vectors alone")
    other = tokens.clone()
    other[:, -1] = tokens.roll(1, 0)[:, 0]
    if not _close(logits(model, other)[:, :-1], clean[:, :-1]):
        raise ValueError(
            f"model {model.id!r} ({type(model.module).__name__}) reads from both sides: an encoder. Loss recovered, logit "
            "effects and generation are defined from left to right alone"
        )


def _broken(model: LanguageModel) -> str:
    return (
        f"model {model.id!r} gives NaN or infinity on a few plain tokens in {model.dtype}: its weights are damaged, "
        "or need a wider --model-dtype (float32)"
    )


def check_hook(model: LanguageModel, hook: str) -> None:
    """Raises ValueError unless `hook` names a position of this model where vectors can be taken and changed.

    Tried once: the vectors are `[B, L, D]`, an edit reaches the logits, and one of what attention or an MLP writes changes the
    stream behind the layer by as much. What an MLP reads must be all that its output is made of, at each position alone: where
    inputs are exchanged between positions, outputs are exchanged as they are. So it must be of what goes into attention's last map.
    The stream between the two must be all that the stream behind the layer is made of, whichever of its parts changes.
    """
    if hook not in model.checked:
        model.checked[hook] = _fault(model, hook)
    if (fault := model.checked[hook]) is not None:
        raise ValueError(fault)


@torch.inference_mode()
def _fault(model: LanguageModel, hook: str) -> str | None:
    """What is wrong with a hook, or None."""
    layer, kind = parse_hook(hook)
    place_of(model, hook)
    tokens, stream, mlp, attention = (
        probe_tokens(model), hook_name(layer), hook_name(layer, "mlp_out"), hook_name(layer, "attn_out"),
    )  # fmt: skip
    made = {"mlp_in": mlp, "ln2_normalized": mlp, "mlp_post": mlp, "attn_z": attention}.get(
        kind
    )  # of the vectors of this hook
    if needed := attention if kind == "resid_mid" else made:
        check_hook(model, needed)
    watched = {hook, stream, needed or stream, *([mlp] if kind in _BEFORE_MLP and has_place(model, mlp) else [])}
    clean = capture(model, tokens, list(watched))
    shape = (*tokens.shape, widths_of(model, [hook])[hook])
    if tuple(clean[hook].shape) != shape:
        return (
            f"hook {hook!r} of model {model.id!r} gives vectors of shape {tuple(clean[hook].shape)}, expected {shape}"
        )
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(clean[hook])
    noise *= clean[stream].norm(dim=2, keepdim=True) / noise.norm(dim=2, keepdim=True)
    before = logits(model, tokens)
    with edits(model, {hook: lambda old: old + noise})():
        after = logits(model, tokens)
        edited = capture(model, tokens, list(watched))
    family = type(model.module).__name__
    if _close(before, after):
        return f"an edit at {hook!r} of model {model.id!r} ({family}) does not reach the logits: nothing can be measured there"
    if made is not None:
        with edits(model, {hook: lambda old: old.roll(1, 1)})():
            exchanged = capture(model, tokens, [made])[made]
        if not _close(exchanged, clean[made].roll(1, 1)):
            return (
                f"{made!r} of model {model.id!r} ({family}) is not a function of {hook!r} at each position alone: use resid_pre, "
                f"or {parse_hook(made)[1]} alone"
            )
    if kind == "ln2_normalized":
        length = float(clean[hook].float().square().mean(2).median())
        if abs(length - 1) > _REACH:
            return f"{hook!r} of model {model.id!r} ({family}) has a mean square of {length:.3g}, expected 1 behind a norm: use mlp_in"
    if kind == "resid_mid":
        moved = {hook_name(layer, "resid_pre"): lambda old: old + noise, attention: lambda _: clean[attention] - noise}
        with edits(model, moved)():
            found = capture(model, tokens, list(watched))
        rounding = min(_REACH, 1e4 * torch.finfo(noise.dtype).eps)
        if any(_apart(found[name], clean[name]) > rounding for name in watched - {attention}):
            return (
                f"hook {hook!r} is not in model {model.id!r}: layer {layer} of this {family} reads more than the sum of resid_pre and "
                "attn_out, as where attention and MLP run beside each other: use resid_pre or resid_post"
            )
    if kind in ("mlp_out", "attn_out") and (kind == "mlp_out" or mlp in watched):
        arrived = edited[stream] - clean[stream]
        if kind == "attn_out":  # the layer's MLP may have read it
            arrived -= edited[mlp] - clean[mlp]
        if float((arrived - noise).norm() / noise.norm()) > _REACH:
            return f"{hook!r} of model {model.id!r} ({family}) is not what the layer adds to the stream: use resid_post or resid_pre"
    return None


@torch.inference_mode()
def check_padding(model: LanguageModel) -> None:
    """Raises ValueError unless texts of different lengths can be in one batch, padded at the left. Tried once."""
    name = "texts of different lengths"
    if name not in model.checked:
        tokens = probe_tokens(model)
        padded = torch.cat([tokens[:, :1].expand(-1, 3), tokens], 1)
        padding = torch.full((len(tokens),), 3, device=model.device)
        want, got = next_logits(model, tokens)[0], next_logits(model, padded, padding=padding)[0]
        model.checked[name] = None
        if not _close(got, want):
            model.checked[name] = (
                f"model {model.id!r} ({type(model.module).__name__}) cannot be given {name} at once: give prompts of one length"
            )
    if (fault := model.checked[name]) is not None:
        raise ValueError(fault)


def has_place(model: LanguageModel, hook: str) -> bool:
    """Whether a model has a hook of that name."""
    try:
        place_of(model, hook)
    except ValueError:
        return False
    return True


def _apart(left: Tensor, right: Tensor) -> float:
    """How far vectors are from others, in lengths of these: the median over positions."""
    return float(((left - right).float().norm(dim=2) / right.float().norm(dim=2)).median())


def _close(left: Tensor, right: Tensor) -> bool:
    """Equal but for the rounding of a pass."""
    return bool((left - right).float().abs().max() <= _CLOSE * right.float().abs().max())

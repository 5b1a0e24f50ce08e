"""Many replacements for the same contexts: forward passes that begin in the middle of one that is known.

B contexts in the batch, L positions, D d_model, V vocabulary.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saebench.models import HOOK, LanguageModel, spliced_logits


class CleanPass(NamedTuple):
    """An undisturbed forward pass, and what `resumed_logits` needs to begin in its middle."""

    tokens: Int[Tensor, "B L"]
    hook: str
    value: Float[Tensor, "B L D"]
    """the vectors at the hook"""
    logits: Float[Tensor, "B L V"]
    block_output: Any
    """of the last block that a resumed pass skips: a tensor or a tuple that begins with it; None where none is skipped"""


def _skipped(hook: str) -> int:
    """How many blocks are over before a replacement at `hook` changes anything but their output."""
    match = HOOK.fullmatch(hook)
    assert match, hook
    return int(match[1]) + (match[2] == "resid_post")


@torch.inference_mode()
def clean_pass(model: LanguageModel, tokens: Int[Tensor, "B L"], hook: str) -> CleanPass:
    """Logits of the model as it is, with the vectors at `hook`."""
    seen: dict[str, Any] = {"output": None}

    def save_value(value: Tensor, hook: Any) -> None:
        seen["value"] = value.clone()  # later layers may add to it in place

    def save_output(block: Any, args: Any, output: Any) -> None:
        first, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        seen["output"] = first.clone() if rest is None else (first.clone(), *rest)

    with contextlib.ExitStack() as stack:
        stack.enter_context(model.bridge.hooks(fwd_hooks=[(hook, save_value)]))
        if skipped := _skipped(hook):
            stack.enter_context(model.bridge.blocks[skipped - 1].register_forward_hook(save_output))
        logits = model.bridge(tokens, return_type="logits")
    return CleanPass(tokens, hook, seen["value"], logits, seen["output"])


@torch.inference_mode()
def resumed_logits(model: LanguageModel, clean: CleanPass, value: Float[Tensor, "B L D"]) -> Float[Tensor, "B L V"]:
    """`spliced_logits` with `value` at the hook of the clean pass, running only the blocks it changes.

    The blocks before them are stood in for by the clean pass, so that the model's own code still makes
    masks and positions: equal to the last bit. `value` is in the model's dtype.
    """
    output = clean.block_output
    if clean.hook.endswith("resid_post"):
        output = (value, *output[1:]) if isinstance(output, tuple) else value
    with (
        model.bridge.hooks(fwd_hooks=[(clean.hook, lambda old, hook: value)]),
        _stand_in(model.bridge.blocks[: _skipped(clean.hook)], output),
    ):
        return model.bridge(clean.tokens, return_type="logits")


@contextlib.contextmanager
def _stand_in(blocks: Iterable[Any], output: Any) -> Iterator[None]:
    """Every one of `blocks` returns `output` without running.

    Past `setattr`, with which a bridge's block writes through to the module that it wraps.
    """
    try:
        for block in blocks:
            vars(block)["forward"] = lambda *args, **kwargs: output
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def resumes(model: LanguageModel, clean: CleanPass) -> bool:
    """Whether `resumed_logits` gives what `spliced_logits` gives, on the contexts of a clean pass.

    It does not where later blocks read more of earlier ones than the residual stream, for instance their keys and values.
    """
    zeros = torch.zeros_like(clean.value)
    want = spliced_logits(model, clean.tokens, clean.hook, lambda value: zeros).float()
    difference = (resumed_logits(model, clean, zeros).float() - want).abs().max()
    return bool(difference <= 0.01 * want.abs().max())

"""Many replacements for the same contexts: forward passes that begin in the middle of one that is known.

B contexts in the batch, L positions, D d_model, H the width of a hook.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saebench.models.attach import attach, first_of, with_first
from saebench.models.checks import probe_tokens
from saebench.models.load import LanguageModel
from saebench.models.passes import edits, last_states, standing_in
from saebench.models.places import parse_hook, place_of


class CleanPass(NamedTuple):
    """An undisturbed forward pass, and what `resumed_states` needs to begin in its middle."""

    tokens: Int[Tensor, "B L"]
    hook: str
    value: Float[Tensor, "B L H"]
    """the vectors at the hook"""
    states: Float[Tensor, "B L D"]
    """those behind the final norm, of which `head` makes logits"""
    block_output: Any
    """of the last block that a resumed pass skips: a tensor or a tuple that begins with it; None where none is skipped"""


def _skipped(hook: str) -> int:
    """How many blocks are over before a replacement at `hook` changes anything but their output."""
    layer, kind = parse_hook(hook)
    return layer + (kind == "resid_post")


@torch.inference_mode()
def clean_pass(model: LanguageModel, tokens: Int[Tensor, "B L"], hook: str) -> CleanPass:
    """The model as it is, with the vectors at `hook`."""
    seen: dict[str, Any] = {"output": None}

    def save_value(value: Tensor) -> None:
        seen["value"] = value.clone()  # later layers may add to it in place

    def save_output(block: Any, args: Any, output: Any) -> None:
        seen["output"] = with_first(output, first_of(output).clone())

    handles = [attach(model, place_of(model, hook), save_value)]
    if skipped := _skipped(hook):
        handles.append(model.blocks[skipped - 1].register_forward_hook(save_output))
    try:
        states = last_states(model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    return CleanPass(tokens, hook, seen["value"], states, seen["output"])


@torch.inference_mode()
def resumed_states(model: LanguageModel, clean: CleanPass, value: Float[Tensor, "B L H"]) -> Float[Tensor, "B L D"]:
    """`last_states` with `value` at the hook of the clean pass, running only the blocks it changes.

    The blocks before them are stood in for by the clean pass, so that the model's own code still makes
    masks and positions: equal to the last bit. `value` is in the model's dtype.
    """
    output = clean.block_output
    if clean.hook.endswith("resid_post"):
        output = with_first(output, value)
    with (
        edits(model, {clean.hook: lambda old: value})(),
        standing_in(model.blocks[: _skipped(clean.hook)], output),
    ):
        return last_states(model, clean.tokens)


@torch.inference_mode()
def spliced_states(model: LanguageModel, clean: CleanPass, value: Float[Tensor, "B L H"]) -> Float[Tensor, "B L D"]:
    """`resumed_states` by a whole pass."""
    with edits(model, {clean.hook: lambda old: value})():
        return last_states(model, clean.tokens)


def resumes(model: LanguageModel, hook: str) -> bool:
    """Whether `resumed_states` gives what a whole pass gives. Tried once, on a few tokens.

    It does not where later blocks read more of earlier ones than the residual stream, for instance their keys and values.
    """
    name = f"passes that begin at {hook}"
    if name not in model.checked:
        clean = clean_pass(model, probe_tokens(model), hook)
        zeros = torch.zeros_like(clean.value)
        want = spliced_states(model, clean, zeros).float()
        difference = (resumed_states(model, clean, zeros).float() - want).abs().max()
        same = bool(difference <= 0.01 * want.abs().max())
        model.checked[name] = None if same else f"layers after {hook} of model {model.id!r} read more than its output"
    return model.checked[name] is None

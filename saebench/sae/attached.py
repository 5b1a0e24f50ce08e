"""An SAE inside a model, as a part of it: in passes that are the user's own PyTorch.

B contexts in the batch, L positions, D what is read, E what is written, F latents.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saebench.models import LanguageModel, watched
from saebench.sae.architectures import SAE, normalized
from saebench.sae.io import Ends

Acts = Callable[[Tensor], Tensor]
"""From activations `[B, L, F]` to others."""
_trying: ContextVar[bool] = ContextVar("trying", default=False)
"""whether a pass is one that tries a hook, in which no SAE has a part"""


class Attached:
    """An SAE in a model: what its latents did in the last pass, and what is done to them."""

    def __init__(self, sae: SAE, ends: Ends, error: bool, edit: Acts | None, where: Any) -> None:
        self.sae, self.ends, self.error = sae, ends, error
        self.edit = edit
        """what activations go through, if anything; may be another between passes"""
        self.where = where
        self.acts: Tensor | None = None
        """`[B, L, F]`, of the last pass and as edited: what was decoded. Where gradients are on, a loss has one with respect to it
        (`torch.autograd.grad(loss, on.acts)`, or `on.acts.grad` after `loss.backward()`)"""
        self._read: dict[str, Tensor] = {}
        self._written: tuple[Tensor, ...] = ()
        self._clean: tuple[Tensor, ...] = ()
        self._mask: Tensor | None = None

    def see(self, hook: str, value: Float[Tensor, "B L E"]) -> Tensor | None:
        """The vectors at a hook, as a pass comes to it; returns those that go on in their stead."""
        if _trying.get():
            return None
        if hook in self.ends.reads:
            self._read[hook] = value
        if hook not in self.ends.writes:
            return None
        if lacking := [read for read in self.ends.reads if read not in self._read]:
            raise ValueError(
                f"the SAE writes {hook} before it has read {lacking[0]}, so that its activations are not known there; "
                "expected one that reads before it writes, which a crosscoder does not"
            )
        if hook == self.ends.writes[0]:
            self._run(torch.cat([self._read[read] for read in self.ends.reads], -1))
        place = self.ends.writes.index(hook)
        made_BLE = self._written[place]
        if made_BLE.shape != value.shape:
            raise ValueError(
                f"the SAE writes {made_BLE.shape[-1]} numbers at {hook}, where the model has {value.shape[-1]}; it is of another model"
            )
        if self.error:
            # By how much an edit, or a gradient, changes what the SAE makes of x: with neither the vectors are the model's own to the bit.
            made_BLE = value.detach().to(made_BLE.dtype) + (made_BLE - self._clean[place])
        made_BLE = made_BLE.to(value.dtype)
        if self._mask is not None:
            made_BLE = torch.where(self._mask[..., None], made_BLE, value)
        if place == len(self.ends.writes) - 1:
            self._read, self._written, self._clean = {}, (), ()
        return made_BLE

    def _run(self, x_BLD: Float[Tensor, "B L D"]) -> None:
        sae, weight = self.sae, self.sae.W_enc
        if x_BLD.shape[-1] != sae.d_in:
            raise ValueError(
                f"the SAE reads {sae.d_in} numbers, and the model has {x_BLD.shape[-1]} at {' + '.join(self.ends.reads)}; it is of another model"
            )
        if x_BLD.device != weight.device:
            raise ValueError(
                f"the SAE is on {weight.device}, the model on {x_BLD.device}; move it there with sae.to(…)"
            )
        self._mask = self._positions(x_BLD)
        rows_BLD, scale, shift = normalized(x_BLD.to(weight.dtype), sae.normalize)
        shape = rows_BLD.shape[:2]
        acts_BLF = sae.activations(rows_BLD.flatten(0, 1))[0].unflatten(0, shape)
        if torch.is_grad_enabled() and not acts_BLF.requires_grad:
            acts_BLF.requires_grad_()
        edited_BLF = acts_BLF
        if self.edit is not None:
            edited_BLF = self.edit(acts_BLF.clone())  # which may be changed in place
            if not isinstance(edited_BLF, Tensor) or edited_BLF.shape != acts_BLF.shape:
                got = tuple(edited_BLF.shape) if isinstance(edited_BLF, Tensor) else type(edited_BLF).__name__
                raise ValueError(f"edit returned {got}; expected activations of shape {tuple(acts_BLF.shape)}")
        if edited_BLF.requires_grad:
            edited_BLF.retain_grad()
        self.acts = edited_BLF

        def decoded(acts: Tensor) -> tuple[Tensor, ...]:
            made = acts.flatten(0, 1) @ sae.W_dec + sae.base(rows_BLD.flatten(0, 1))
            return (made.unflatten(0, shape) * scale + shift).split(sae.parts, -1)

        self._written = decoded(edited_BLF)
        with torch.no_grad():
            clean = self._written if self.edit is None else decoded(acts_BLF)
            self._clean = tuple(part.detach() for part in clean) if self.error else ()

    def _positions(self, x_BLD: Float[Tensor, "B L D"]) -> Bool[Tensor, "B L"] | None:
        mask: Any = self.where(x_BLD) if callable(self.where) else self.where
        if mask is None:
            return None
        if mask.dtype != torch.bool or mask.shape != x_BLD.shape[:2]:
            raise ValueError(
                f"where is {mask.dtype} of shape {tuple(mask.shape)}; expected truth values of shape {tuple(x_BLD.shape[:2])}, one for each position"
            )
        return mask


@contextlib.contextmanager
def attached(
    model: LanguageModel | nn.Module,
    sae: SAE,
    *,
    error: bool = True,
    edit: Acts | None = None,
    where: Bool[Tensor, "B L"] | Callable[[Tensor], Tensor] | None = None,
    ends: Ends | None = None,
) -> Iterator[Attached]:
    """The model with an SAE in it, or a transcoder, in every pass within the block; off it after, whatever happens.

    `model` is one of `load_model`, TransformerLens' TransformerBridge or HookedTransformer, or a Hugging Face module. What the SAE makes of
    its latents' activations goes on in place of what the model has where it writes: with `error` what it does not
    reconstruct is added, a constant in gradients as in SAELens, so that without an edit the model is itself. `edit` goes from
    activations `[B, L, F]` to others. `where` are the positions at which the SAE has a part (default: all), as truth values or as a function of
    the vectors read: elsewhere, as at special tokens or massive rows, the model is left alone, though `acts` has values there. `ends` are the
    hooks read and written, of an SAE that was not loaded. For several SAEs, open several blocks; at one hook the later reads what the earlier writes.

    Raises ValueError for a hook that the model does not have, and in a pass for what does not fit it.
    """
    ends = ends or sae.ends
    if ends is None:
        raise ValueError(
            "the SAE does not say which hooks it reads and writes; give them as ends=Ends((hook,), (hook,))"
        )
    on = Attached(sae, ends, error, edit, where)
    with contextlib.ExitStack() as stack:
        token = _trying.set(True)
        try:
            watch = stack.enter_context(watched(model, ends.hooks))
        finally:
            _trying.reset(token)
        stack.enter_context(watch(on.see))
        yield on

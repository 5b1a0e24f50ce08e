"""A model on one prompt with a set of transcoders for MLPs: what each of its latents does there, and passes in which they do otherwise.

From the first layer of the set on, what each MLP writes is Σ f d + b + x W_skip + ε: activations f of latents, here and of earlier layers
that write here, times decoder rows d, and the error ε that makes it what the model has. At BOS and massive rows, and in layers above the
set, all of it is error. The stream that enters the set's first layer is a constant of the prompt.
B copies of the prompt, L positions, D d_model, N active latents, G latents chosen, V vocabulary.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saebench.circuits.frozen import Frozen
from saebench.evaluate.attribution import left_alone
from saebench.evaluate.measure import Dictionary
from saebench.models import LanguageModel, edits, hook_name, parse_hook
from saebench.models.attach import first_of
from saebench.sae import SAE, GatedSAE, encode_sparse

Reads = dict[int, Float[Tensor, "B L D"]]
"""What the set reads, by layer."""
Write = Callable[[int, Reads], Float[Tensor, "B L D"]]
"""What an MLP writes, but for what the set's skip paths add: from its layer and what has been read so far."""


class Latents(NamedTuple):
    """The active latents of a prompt, by layer, position and number."""

    member: Int[Tensor, " N"]
    """which dictionary of the set"""
    position: Int[Tensor, " N"]
    latent: Int[Tensor, " N"]
    activation: Float[Tensor, " N"]

    def of(self, picked: Tensor) -> "Latents":
        """Some of them."""
        return Latents(*(column[picked] for column in self))


class Replacement:
    """The model, the set, and what both make of the prompt."""

    def __init__(
        self, model: LanguageModel, members: Sequence[Dictionary], ids: Int[Tensor, " L"], bounds: Mapping[str, float]
    ) -> None:
        """`members` are those of a set (`evaluate.sets`), in the model's dtype; vectors longer than the `bounds` of their hook are massive.

        Raises ValueError for a set with a gap, and as `Frozen` and the model's hooks do.
        """
        self.model, self.members, self.ids = model, sorted(members, key=lambda one: parse_hook(one.ends.reads[0])), ids
        self.member_layers = [parse_hook(one.ends.reads[0])[0] for one in self.members]
        """the layer that each member reads"""
        self.replaced = sorted({parse_hook(hook)[0] for one in members for hook in one.ends.writes})
        if gap := sorted({*range(self.replaced[0], self.replaced[-1] + 1)} - set(self.replaced)):
            raise ValueError(
                f"the set replaces the MLPs of layers {', '.join(map(str, self.replaced))} and not of {', '.join(map(str, gap))}; "
                "expected layers without a gap: train transcoders for those, too, or leave out the ones on one side"
            )
        self.layers = range(self.replaced[0], model.n_layers)
        """from the set's first to the model's last"""
        self.frozen = Frozen(model)
        self._reading = {layer: one.ends.reads[0] for layer, one in zip(self.member_layers, self.members, strict=True)}
        self._take_down(bounds)
        self.latents = self._active()
        self.bias = {layer: self._biases(layer) for layer in self.layers}
        """what the set writes at each layer whatever is active, `[L, D]`"""
        self.errors = {layer: self._error(layer) for layer in self.layers}
        """`[L, D]` of each layer"""

    def run(
        self, stream: Float[Tensor, "B L D"], write: Write, *, frozen: bool = True
    ) -> tuple[Reads, Float[Tensor, "B L D"]]:
        """(what is read at each layer, what the logits are made of) of a pass in which `stream` enters the first layer of the set.

        With `frozen`, patterns and denominators are those of the prompt. Without, all is as it comes but for what the set writes: MLPs
        above it, and at positions without latents, are the model's own.
        """
        reads: Reads = {}

        def written(layer: int, value: Tensor) -> Tensor | None:
            if not frozen and layer not in self.replaced:
                return None
            made = write(layer, reads) + self.skipped(layer, reads)
            return made if frozen else torch.where(self.alone[:, None], value, made)

        changes = {hook_name(self.layers[0], "resid_pre"): lambda value: stream}
        changes |= {hook: lambda value, at=layer: reads.update({at: value}) for layer, hook in self._reading.items()}
        changes |= {hook_name(at, "mlp_out"): lambda value, at=at: written(at, value) for at in self.layers}
        ids = self.ids.expand(len(stream), -1)
        changed = edits(self.model, changes)  # which asks norms for their gain, before they are stood in for
        with self.frozen.held() if frozen else contextlib.nullcontext(), changed():
            return reads, first_of(self.model.base(ids, use_cache=False))

    @torch.no_grad()
    def _take_down(self, bounds: Mapping[str, float]) -> None:
        """The model as it is on the prompt."""
        seen: dict[str, Tensor] = {}
        entering = hook_name(self.layers[0], "resid_pre")
        hooks = [entering, *self._reading.values(), *(hook_name(layer, "mlp_out") for layer in self.layers)]

        def take(hook: str, value: Tensor) -> None:
            seen[hook] = value[0].clone()

        watched = edits(self.model, {hook: lambda value, hook=hook: take(hook, value) for hook in hooks})
        with self.frozen.recorded(), watched():
            self.states = first_of(self.model.base(self.ids[None], use_cache=False))[0]
            """`[L, D]` of which the logits are made"""
        self.stream = seen[entering]
        """`[L, D]` that enters the first layer"""
        self.reads = {layer: seen[hook] for layer, hook in self._reading.items()}
        self.written = {layer: seen[hook_name(layer, "mlp_out")] for layer in self.layers}
        rows = {hook: value for hook, value in seen.items() if hook != entering}
        alone = [left_alone(self.model, self.ids, rows[hook], bounds.get(hook, math.inf)) for hook in rows]
        self.alone: Bool[Tensor, " L"] = torch.stack(alone).any(0)
        """positions that have no latents"""

    def _active(self) -> Latents:
        found = []
        (places,) = (~self.alone).nonzero(as_tuple=True)
        for number, (layer, one) in enumerate(zip(self.member_layers, self.members, strict=True)):
            code, values = encode_sparse(one.sae, self.reads[layer][places])
            position, latent = places[code.rows.long()], code.latents.long()
            order = torch.argsort(position * one.sae.d_sae + latent)
            found.append(Latents(torch.full_like(latent, number), position, latent, values).of(order))
        return Latents(*map(torch.cat, zip(*found, strict=True)))

    def decoded(self, layer: int, which: Latents) -> Float[Tensor, "G D"]:
        """The decoder rows of latents at the MLP of a layer, zero where they do not write there."""
        rows = self.stream.new_zeros(len(which.latent), self.stream.shape[1])
        for number, one in enumerate(self.members):
            if (hook := hook_name(layer, "mlp_out")) in one.ends.writes:
                own = which.member == number
                rows[own] = self._part(one, one.sae.W_dec, hook)[which.latent[own]]
        return rows

    def reading(self, which: Latents) -> tuple[Float[Tensor, "G D"], Float[Tensor, " G"]]:
        """(u, c) of latents whose activation, where they are active, is u · x + c of what they read."""
        directions = self.stream.new_zeros(len(which.latent), self.members[0].sae.d_in)
        offsets = self.stream.new_zeros(len(which.latent))
        for number, one in enumerate(self.members):
            own = which.member == number
            directions[own], offsets[own] = _reading(one.sae, which.latent[own])
        return directions, offsets

    def layer_of(self, which: Latents) -> Int[Tensor, " G"]:
        """The layer at which each of some latents reads."""
        return torch.tensor(self.member_layers, device=which.member.device)[which.member]

    @staticmethod
    def _part(one: Dictionary, weights: Float[Tensor, "*N E"], hook: str) -> Float[Tensor, "*N D"]:
        return weights.split(one.sae.parts, -1)[one.ends.writes.index(hook)]

    def skipped(self, layer: int, reads: Mapping[int, Tensor]) -> Tensor | float:
        """What skip paths add to what is written at a layer."""
        total: Tensor | float = 0.0
        for at, one in zip(self.member_layers, self.members, strict=True):
            if one.sae.W_skip is not None and (hook := hook_name(layer, "mlp_out")) in one.ends.writes:
                total = total + reads[at] @ self._part(one, one.sae.W_skip, hook) * ~self.alone[:, None]
        return total

    @torch.no_grad()
    def _biases(self, layer: int) -> Float[Tensor, "L D"]:
        total, hook = torch.zeros_like(self.stream), hook_name(layer, "mlp_out")
        for one in self.members:
            if hook in one.ends.writes:
                total += self._part(one, one.sae.base(torch.zeros_like(one.sae.b_pre)[None]), hook)
        return total * ~self.alone[:, None]

    @torch.no_grad()
    def _error(self, layer: int) -> Float[Tensor, "L D"]:
        made = self.bias[layer] + self.skipped(layer, self.reads)
        made.index_add_(0, self.latents.position, self.decoded(layer, self.latents) * self.latents.activation[:, None])
        return self.written[layer] - made


@torch.no_grad()
def _reading(sae: SAE, latents: Int[Tensor, " G"]) -> tuple[Float[Tensor, "G D"], Float[Tensor, " G"]]:
    columns, biases = sae.W_enc[:, latents].T, sae.get_parameter("b_mag" if isinstance(sae, GatedSAE) else "b_enc")
    if isinstance(sae, GatedSAE):
        columns = columns * sae.r_mag.exp()[latents, None]
    return columns, biases[latents] - columns @ sae.b_pre

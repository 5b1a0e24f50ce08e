"""A graph held to the model: latents clamped or ablated, and what changes then beside what the graph says.

B interventions at once, L positions, D d_model, N latents of a graph, k logits, F latents of a dictionary.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saebench.circuits.graph import Graph, directions
from saebench.circuits.influence import influence_of
from saebench.circuits.replacement import Reads, Replacement
from saebench.models import parse_hook

Clamp = Mapping[int, float]
"""Activations that latents of a graph, by their nodes, are set to; 0 ablates."""
_ROWS = 2048  # positions of a pass
_SILENT = 1e-5  # of its activation, that a difference of a silent latent's may be by rounding


class Response(NamedTuple):
    """By how much an intervention changes activations and logits of a graph."""

    latents: Float[Tensor, "B N"]
    logits: Float[Tensor, "B k"]


@torch.no_grad()
def measured(replacement: Replacement, graph: Graph, clamps: Sequence[Clamp], *, frozen: bool = True) -> Response:
    """What happens in the model whose MLPs are the set with its errors, where all other latents do as they do.

    Latents that the prompt leaves silent may become active, and act. With `frozen`, patterns and denominators stay those of the
    prompt, and so do MLPs above the set; else attention, norms and these do as they do. Errors of the set stay. Raises ValueError for a node that is no latent.
    """
    for clamp in clamps:
        if wrong := [node for node in clamp if not 0 <= node < graph.n_latents]:
            raise ValueError(f"node is {wrong[0]}; latents of the graph are 0 to {graph.n_latents - 1}")
    step = max(1, _ROWS // len(graph.ids))
    into, offsets = directions(replacement.model, graph.logits)
    found = [_acted(replacement, graph, [{}], frozen)]
    found += [_acted(replacement, graph, clamps[at : at + step], frozen) for at in range(0, len(clamps), step)]
    activations = torch.cat([acts for acts, _ in found])
    logits = torch.cat([states[:, -1] for _, states in found]) @ into.T + offsets
    return Response(activations[1:] - activations[0], logits[1:] - logits[0])


def _acted(of: Replacement, graph: Graph, clamps: Sequence[Clamp], frozen: bool) -> tuple[Tensor, Tensor]:
    """(activations `[B, N]` of the graph's latents, final states `[B, L, D]`)."""
    size, which = len(clamps), graph.latents
    found = of.stream.new_zeros(size, graph.n_latents)
    made: dict[tuple[int, int], Tensor] = {}  # by member and layer written

    def act(number: int, reads: Reads) -> None:
        one, x_BLD = of.members[number], reads[of.member_layers[number]]
        acts_BLF = one.sae.encode(x_BLD.flatten(0, 1)).unflatten(0, x_BLD.shape[:2])
        acts_BLF[:, of.alone] = 0
        (own,) = (which.member == number).nonzero(as_tuple=True)
        for row, clamp in enumerate(clamps):
            for node, value in clamp.items():
                if which.member[node] == number:
                    acts_BLF[row, which.position[node], which.latent[node]] = value
        found[:, own] = acts_BLF[:, which.position[own], which.latent[own]]
        for hook, part in zip(one.ends.writes, one.sae.W_dec.split(one.sae.parts, 1), strict=True):
            made[number, parse_hook(hook)[0]] = acts_BLF @ part

    def write(layer: int, reads: Reads) -> Tensor:
        for number, at in enumerate(of.member_layers):
            if at == layer:
                act(number, reads)
        total = (of.errors[layer] + of.bias[layer]).expand(size, -1, -1)
        return sum((made.pop(key) for key in [key for key in made if key[1] == layer]), total)

    _, states = of.run(of.stream.expand(size, -1, -1), write, frozen=frozen)
    return found, states


@torch.no_grad()
def predicted(graph: Graph, clamps: Sequence[Clamp]) -> Response:
    """What the graph says: the change of each clamped latent, along all paths through its nodes, none of which falls silent or awakes."""
    acts_N, n = graph.latents.activation, graph.n_latents
    change_BN = acts_N.new_zeros(len(clamps), n)
    held_BN = torch.zeros_like(change_BN, dtype=torch.bool)
    for row, clamp in enumerate(clamps):
        nodes = list(clamp)
        change_BN[row, nodes] = acts_N.new_tensor(list(clamp.values())) - acts_N[nodes]
        held_BN[row, nodes] = True
    each_TN = graph.edges[:, :n] / acts_N  # what a target gains by a unit of each latent
    total_BN = current_BN = change_BN
    for _ in graph.latent_layers.unique():  # no path has more steps
        current_BN = (current_BN @ each_TN[:n].T).masked_fill(held_BN, 0.0)
        total_BN = total_BN + current_BN
    return Response(total_BN, total_BN @ each_TN[n:].T)


class Agreement(NamedTuple):
    """Correlations of what the graph says with what happens when its most influential latents are ablated, one at a time."""

    ablated: tuple[int, ...]
    """nodes"""
    latents: float
    """of the changes of all later latents in the graph, patterns and denominators held; NaN where there are none"""
    latents_active: float
    """of those of them that stay active"""
    logits: float
    """of those of the logits"""
    latents_free: float
    """of latents, with attention, norms and the MLPs above the set as they do"""
    logits_free: float


def agreement(replacement: Replacement, graph: Graph, n: int = 16) -> Agreement:
    """Ablate the `n` latents of most influence, each alone, and compare."""
    nodes = influence_of(graph)[: graph.n_latents].topk(min(n, graph.n_latents)).indices.tolist()
    clamps = [{node: 0.0} for node in nodes]
    says = predicted(graph, clamps)
    at, layers = graph.latents.position, graph.latent_layers
    later_BN = (layers > layers[nodes][:, None]) & (at >= at[nodes][:, None])
    held, free = (measured(replacement, graph, clamps, frozen=frozen) for frozen in (True, False))
    active_BN = later_BN & (held.latents + graph.latents.activation > _SILENT * graph.latents.activation)
    return Agreement(
        tuple(nodes),
        _correlation(says.latents[later_BN], held.latents[later_BN]),
        _correlation(says.latents[active_BN], held.latents[active_BN]),
        _correlation(says.logits.flatten(), held.logits.flatten()),
        _correlation(says.latents[later_BN], free.latents[later_BN]),
        _correlation(says.logits.flatten(), free.logits.flatten()),
    )


def _correlation(left: Float[Tensor, " n"], right: Float[Tensor, " n"]) -> float:
    """NaN of fewer than three pairs, and where one side does not vary."""
    if len(left) < 3:
        return float("nan")
    return float(torch.corrcoef(torch.stack([left, right]).double())[0, 1])

"""A graph held to the model: latents clamped, scaled or ablated, and what changes then beside what the graph says.

B interventions at once, L positions, D d_model, N latents of a graph, k logits, F latents of a dictionary.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saebench.circuits.graph import Graph, directions
from saebench.circuits.groups import Groups
from saebench.circuits.influence import influence_of
from saebench.circuits.replacement import Reads, Replacement
from saebench.models import parse_hook

Clamp = Mapping[int, float]
"""Activations that latents of a graph, by their nodes, are set to; 0 ablates."""
_ROWS = 2048  # positions of a pass
_ACT = re.compile(r"(.+?)\s*([*=])\s*(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)")
_OTHERS = 8  # latents that an intervention changes most, beside groups
_SILENT = 1e-5  # of its activation, that a difference of a silent latent's may be by rounding


class Response(NamedTuple):
    """By how much an intervention changes activations and logits of a graph."""

    latents: Float[Tensor, "B N"]
    logits: Float[Tensor, "B k"]


@torch.no_grad()
def measured(
    replacement: Replacement,
    graph: Graph,
    clamps: Sequence[Clamp],
    *,
    frozen: bool = True,
    constrained: bool = False,
) -> Response:
    """What happens in the model whose MLPs are the set with its errors, where all other latents do as they do.

    Latents that the prompt leaves silent may become active, and act. With `frozen`, patterns and denominators stay those of the
    prompt, and so do MLPs above the set; else attention, norms and these do as they do. Errors of the set stay. With `constrained`,
    latents that read no later layer than the last one clamped stay as they are on the prompt ("constrained patching").
    Raises ValueError for a node that is no latent.
    """
    for clamp in clamps:
        if wrong := [node for node in clamp if not 0 <= node < graph.n_latents]:
            raise ValueError(f"node is {wrong[0]}; latents of the graph are 0 to {graph.n_latents - 1}")
    step = max(1, _ROWS // len(graph.ids))
    into, offsets = directions(replacement.model, graph.logits)
    found = [_acted(replacement, graph, [{}], frozen, False)]
    found += [
        _acted(replacement, graph, clamps[at : at + step], frozen, constrained) for at in range(0, len(clamps), step)
    ]
    activations = torch.cat([acts for acts, _ in found])
    logits = torch.cat([states[:, -1] for _, states in found]) @ into.T + offsets
    return Response(activations[1:] - activations[0], logits[1:] - logits[0])


def _acted(
    of: Replacement, graph: Graph, clamps: Sequence[Clamp], frozen: bool, constrained: bool
) -> tuple[Tensor, Tensor]:
    """(activations `[B, N]` of the graph's latents, final states `[B, L, D]`)."""
    size, which = len(clamps), graph.latents
    stay_B = torch.tensor(_last_layers(graph, clamps, constrained), device=of.stream.device)
    found = of.stream.new_zeros(size, graph.n_latents)
    made: dict[tuple[int, int], Tensor] = {}  # by member and layer written

    def act(number: int, reads: Reads) -> None:
        one, x_BLD = of.members[number], reads[of.member_layers[number]]
        acts_BLF = one.sae.encode(x_BLD.flatten(0, 1)).unflatten(0, x_BLD.shape[:2])
        acts_BLF[:, of.alone] = 0
        if constrained:
            acts_BLF[stay_B >= of.member_layers[number]] = _as_is(of, number, acts_BLF[0])
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


def _last_layers(graph: Graph, clamps: Sequence[Clamp], constrained: bool) -> list[int]:
    """The last layer at which each intervention holds all latents that read there; -1 where it holds none but its own."""
    layers = graph.latent_layers
    return [max((int(layers[node]) for node in clamp), default=-1) if constrained else -1 for clamp in clamps]


def _as_is(of: Replacement, number: int, like: Float[Tensor, "L F"]) -> Float[Tensor, "L F"]:
    """Activations of a dictionary on the prompt."""
    own, acts_LF = of.latents.of(of.latents.member == number), torch.zeros_like(like)
    acts_LF[own.position, own.latent] = own.activation
    return acts_LF


@torch.no_grad()
def predicted(graph: Graph, clamps: Sequence[Clamp], *, constrained: bool = False) -> Response:
    """What the graph says: the change of each clamped latent, along all paths through its nodes, none of which falls silent or awakes.

    With `constrained`, along those through none that reads no later layer than the last one clamped.
    """
    acts_N, n = graph.latents.activation, graph.n_latents
    change_BN = acts_N.new_zeros(len(clamps), n)
    held_BN = graph.latent_layers <= graph.latent_layers.new_tensor(_last_layers(graph, clamps, constrained))[:, None]
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


class Act(NamedTuple):
    """What is done to a group's latents, or to one: all are scaled, or all are set to a value."""

    on: str
    """name of a group, or id of a latent's node"""
    value: float
    """the factor, or the activation"""
    scales: bool = True

    def __str__(self) -> str:
        return f"{self.on}{'*' if self.scales else '='}{self.value:.10g}"


def parse_acts(text: str) -> tuple[Act, ...]:
    """Interventions written `opens*0; 1_40_3=2.5`: a group or a latent scaled, by 0 to ablate, or set. Raises ValueError for anything else."""
    parts = [piece.strip() for piece in text.split(";")]
    matches = [_ACT.fullmatch(part) for part in parts]
    if None in matches:
        raise ValueError(
            f"{parts[matches.index(None)]!r} is no intervention; expected NAME*FACTOR, 0 to ablate, or NAME=ACTIVATION, with ; between "
            "several, NAME a group or a latent's node"
        )
    return tuple(Act(match[1], float(match[3]), match[2] == "*") for match in matches if match)


def clamp_of(acts: Sequence[Act], graph: Graph, nodes: Mapping[str, int], groups: Groups) -> dict[int, float]:
    """What latents of a graph are set to; `nodes` are its nodes by their ids.

    Raises ValueError for what is neither a group nor a node, has no latents, or is done something to twice.
    """
    clamp: dict[int, float] = {}
    for act in acts:
        if act.on not in groups and act.on not in nodes:
            raise ValueError(
                f"{act.on!r} is neither a group nor a node of the graph; its groups are {', '.join(map(repr, groups)) or 'none'}: "
                "make one with --groups NAME=ID,ID"
            )
        own = [nodes[id] for id in groups.get(act.on, (act.on,)) if nodes[id] < graph.n_latents]
        if not own:
            raise ValueError(f"{act.on!r} has no latents, and nothing else can be set; expected LAYER_LATENT_POSITION")
        for node in own:
            if node in clamp:
                raise ValueError(f"{act}: a latent of it is set by another of these interventions; expected once")
            clamp[node] = act.value * float(graph.latents.activation[node]) if act.scales else act.value
    return clamp


class Effect(NamedTuple):
    """An intervention's on what a row is of: activations, summed over a group's latents, or a logit."""

    name: str
    before: float
    predicted: float
    """by the graph"""
    held: float
    """in the model, with patterns and denominators held"""
    free: float
    """with attention, norms and MLPs above the set as they do"""


def effects(
    replacement: Replacement, graph: Graph, clamp: Clamp, rows: Mapping[str, Sequence[int]], title: Callable[[int], str],
    *, constrained: bool = False,
) -> list[Effect]:  # fmt: skip
    """What an intervention makes of groups of latents (`rows`: nodes by name), of the other latents that it changes most, and of logits.

    The latter two are called by their nodes.
    """
    n, size = graph.n_latents, graph.edges.shape[1]
    says = predicted(graph, [clamp], constrained=constrained)
    held, free = (
        measured(replacement, graph, [clamp], frozen=frozen, constrained=constrained) for frozen in (True, False)
    )
    nodes = [*range(n), *range(size, size + len(graph.logits))]
    before = graph.values.tolist()
    changes = [torch.cat([one.latents, one.logits], 1)[0].tolist() for one in (says, held, free)]
    known = {node for own in rows.values() for node in own}
    moved = (says.latents.abs() + held.latents.abs())[0].argsort(descending=True).tolist()
    others = [node for node in moved if node not in known and any(change[node] for change in changes)][:_OTHERS]
    found = []
    for name, places in [*rows.items(), *((title(nodes[at]), (at,)) for at in (*others, *range(n, len(nodes))))]:
        was = sum(before[at] for at in places)
        found.append(Effect(name, was, *(was + sum(change[at] for at in places) for change in changes)))
    return found


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

"""The attribution graph of a prompt: how much of each latent, and of what comes next, is due to what directly (Ameisen et al. 2025, "Circuit Tracing").

An edge is the direct effect of its source in the model with patterns and denominators held (`frozen.py`): all that leads from the
one to the other without another latent between. So those into a node, with its bias, sum to its activation or logit.
N latents, S sources, T targets (latents, then logits), B of them at once, L positions, D d_model, V vocabulary, k logits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saebench.circuits.influence import by_influence
from saebench.circuits.replacement import Latents, Reads, Replacement
from saebench.models import LanguageModel, head, unembedding
from saebench.runlog import progress

_ROWS = 2048  # positions of a pass: what it holds for its gradients grows with them
_EDGES = 2**28  # of a graph: 1 GiB in float32
_EXACT = 1e-3  # of the sum of its edges' sizes, that a target's sum may miss


class Logit(NamedTuple):
    """A token's logit after the prompt, less the vocabulary's mean or less another's."""

    token: int
    against: int | None
    weight: float
    """what it counts among the logits: its probability, or 1 where it was asked for"""
    probability: float


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes in circuit-tracer's order: latents, errors by layer and position, embeddings (or the stream in their place), logits."""

    ids: Int[Tensor, " L"]
    layers: tuple[int, ...]
    """those that have errors: from the set's first on"""
    latents: Latents
    latent_layers: Int[Tensor, " N"]
    logits: tuple[Logit, ...]
    edges: Float[Tensor, "T S"]
    """from every node that is no logit to every latent, and to every logit"""
    bias: Float[Tensor, " T"]
    """what of each target is the same whatever is active"""
    left_out: Float[Tensor, " T"]
    """what active latents give that are no nodes"""
    values: Float[Tensor, " T"]
    """pre-activations, which of active latents are activations, and logits"""
    n_active: int
    """active latents of the prompt, nodes or not"""

    @property
    def n_latents(self) -> int:
        return len(self.latents.latent)

    @property
    def error_nodes(self) -> slice:
        return slice(self.n_latents, self.n_latents + len(self.layers) * len(self.ids))

    @property
    def token_nodes(self) -> slice:
        return slice(self.error_nodes.stop, self.error_nodes.stop + len(self.ids))

    @property
    def adjacency(self) -> Float[Tensor, "M M"]:
        """All nodes to all: rows are targets."""
        n, (_, s) = self.n_latents, self.edges.shape
        size = s + len(self.logits)
        square = self.edges.new_zeros(size, size)
        square[:n, :s], square[s:, :s] = self.edges[:n], self.edges[n:]
        return square

    @property
    def weights(self) -> Float[Tensor, " k"]:
        """What each logit counts."""
        return torch.tensor([logit.weight for logit in self.logits], dtype=self.edges.dtype, device=self.edges.device)


@torch.no_grad()
def chosen_logits(
    replacement: Replacement,
    token: int | None = None,
    against: int | None = None,
    *,
    most: int = 10,
    share: float = 0.95,
) -> tuple[Logit, ...]:
    """The token asked for, alone, or the likeliest ones: until they have `share` of the probability, `most` of them at most.

    Raises ValueError for a token that the model does not have, for the same one twice, and for `against` without `token`.
    """
    model = replacement.model
    chances_V = head(model, replacement.states[-1:])[0].clone().softmax(-1)
    for one in (token, against):
        if one is not None and not 0 <= one < model.n_vocab:
            raise ValueError(f"target token is {one}; model {model.id!r} has 0 to {model.n_vocab - 1}")
    if token is None:
        if against is not None:
            raise ValueError(f"against is token {against}, and no target is given; expected both")
        best = chances_V.topk(min(most, len(chances_V)))
        n = min(len(best.values), int((best.values.cumsum(0) < share).sum()) + 1)
        return tuple(
            Logit(int(i), None, float(p), float(p)) for p, i in zip(best.values[:n], best.indices[:n], strict=True)
        )
    if token == against:
        raise ValueError(f"target and against are both token {token}; expected two tokens")
    return (Logit(token, against, 1.0, float(chances_V[token])),)


@torch.no_grad()
def directions(model: LanguageModel, logits: Sequence[Logit]) -> tuple[Float[Tensor, "k D"], Float[Tensor, " k"]]:
    """(directions behind the final norm, offsets) of logits, before a soft cap. Raises ValueError as `unembedding` does."""
    known, matrix = unembedding(model), model.module.get_output_embeddings()
    bias_V = getattr(matrix, "bias", None)
    bias_V = known.W_U.new_zeros(known.W_U.shape[1]) if bias_V is None else bias_V
    mean_D, tokens = known.W_U.mean(1), [logit.token for logit in logits]
    columns, offsets = known.W_U.T[tokens].clone(), bias_V[tokens].clone()
    for place, logit in enumerate(logits):
        columns[place] -= mean_D if logit.against is None else known.W_U[:, logit.against]
        offsets[place] -= bias_V.mean() if logit.against is None else bias_V[logit.against]
    return columns * known.scale, offsets * known.scale


class _Pass:
    """One pass of as many copies of the prompt as there are targets at once, kept for its gradients."""

    def __init__(self, of: Replacement, size: int) -> None:
        self.of, self.size = of, size
        with torch.enable_grad():
            self.stream = of.stream.expand(size, -1, -1).clone().requires_grad_()
            self.written = {
                layer: (of.written[layer] - of.skipped(layer, of.reads)).expand(size, -1, -1).clone().requires_grad_()
                for layer in of.layers
            }
            self.reads, self.states = of.run(self.stream, lambda layer, _: self.written[layer])
        latents = of.latents
        self.rows = {
            layer: of.decoded(layer, latents) * latents.activation[:, None] for layer in of.layers
        }  # what each latent writes
        self.at = [(latents.position == position).nonzero()[:, 0] for position in range(len(of.ids))]

    def edges(self, layers: Tensor, positions: Tensor, targets: Float[Tensor, "B D"]) -> Float[Tensor, "B S"]:
        """Edges into targets: products of a direction with what is read at a layer and a position (the layer past the last: with the final states)."""
        of, copies = self.of, torch.arange(len(targets), device=targets.device)
        outputs, wanted = [], []
        for layer in layers.unique().tolist():
            outputs.append(self.states if layer > of.layers[-1] else self.reads[layer])
            wanted.append(torch.zeros_like(outputs[-1]))
            own = layers == layer
            wanted[-1][copies[own], positions[own]] = targets[own]
        leaves = [*self.written.values(), self.stream]
        found = torch.autograd.grad(outputs, leaves, wanted, retain_graph=True, allow_unused=True)
        *behind, entering = [None if one is None else one[: len(targets)] for one in found]
        latents = targets.new_zeros(len(targets), len(of.latents.latent))
        errors = targets.new_zeros(len(targets), len(of.layers), len(of.ids))
        for place, (layer, gradient) in enumerate(zip(of.layers, behind, strict=True)):
            if gradient is None:
                continue
            errors[:, place] = (gradient * of.errors[layer]).sum(-1)
            for position, own in enumerate(self.at):
                latents[:, own] += gradient[:, position] @ self.rows[layer][own].T
        assert entering is not None  # all that is read comes of it
        return torch.cat([latents, errors.flatten(1), (entering * of.stream).sum(-1)], 1)


def trace(
    replacement: Replacement,
    logits: Sequence[Logit],
    *,
    most: int = 4096,
    stopped: Callable[[], bool] = lambda: False,
) -> Graph | None:
    """The graph of a prompt, with `most` latents at most: where more are active, those of most influence; None where it was stopped.

    Raises ValueError for a graph that is too large, naming how many latents would fit, and for a model that is not linear
    in its sources once patterns and denominators are held.
    """
    of, latents = replacement, replacement.latents
    n, L, k = len(latents.latent), len(replacement.ids), len(logits)
    kept, sources = min(most, n), n + (len(of.layers) + 1) * L
    if (kept + k) * sources > _EDGES:
        raise ValueError(
            f"the prompt has {n:,} active latents: a graph with {kept:,} of them as nodes has {(kept + k) * sources:,} edges, "
            f"{_EDGES:,} fit; give a shorter prompt, or at most {max(1, _EDGES // sources - k):,} latents (--latents), those of most influence"
        )
    size = max(1, min(64, _ROWS // L, n + k))
    of_pass, (into, offsets) = _Pass(of, size), directions(of.model, logits)
    last = torch.full((k,), L - 1, device=into.device)
    edges_TS, done = into.new_zeros(kept + k, sources), torch.zeros(0, dtype=torch.long, device=into.device)
    for own in torch.arange(k).split(size):
        edges_TS[kept + own] = of_pass.edges(torch.full_like(last[own], of.model.n_layers), last[own], into[own])
    weights, layers = torch.tensor([one.weight for one in logits]).to(into), of.layer_of(latents)
    with progress(kept, "trace", "latent") as bar:
        while len(done) < kept:
            left = kept - len(done)
            if kept == n:
                chosen = torch.arange(n, device=into.device)
            else:  # those that matter most by what is known so far
                known = torch.cat([edges_TS[: len(done)], edges_TS[kept:]])
                influence = by_influence(known, done, weights)[:n]
                influence[done] = -1.0
                chosen = influence.topk(min(left, 4 * size)).indices.sort().values
            for own in chosen.split(size):
                if stopped():
                    return None
                which = latents.of(own)
                edges_TS[len(done) : len(done) + len(own)] = of_pass.edges(
                    layers[own], which.position, of.reading(which)[0]
                )
                done = torch.cat([done, own])
                bar.update(len(own))
    values = torch.cat([latents.activation[done], of.states[-1] @ into.T + offsets])
    return _made(of, tuple(logits), edges_TS, done, values, _bias(of, done, into, offsets))


@torch.no_grad()
def _bias(of: Replacement, done: Tensor, into: Tensor, offsets: Tensor) -> Float[Tensor, " T"]:
    """What targets are where every source is 0: by a pass, and not by what the edges leave."""
    which = of.latents.of(done)
    reads, states = of.run(torch.zeros_like(of.stream)[None], lambda layer, _: of.bias[layer][None])
    return torch.cat([preactivations(of, reads, which)[0], states[0, -1] @ into.T + offsets])


def preactivations(of: Replacement, reads: Reads, which: Latents) -> Float[Tensor, "B G"]:
    """Of some latents, from what is read."""
    directions_GD, offsets_G = of.reading(which)
    layers, found = of.layer_of(which), []
    for layer, reading in reads.items():
        own = (layers == layer).nonzero()[:, 0]
        found.append((own, (reading[:, which.position[own]] * directions_GD[own]).sum(-1) + offsets_G[own]))
    order = torch.cat([own for own, _ in found]).argsort()
    return torch.cat([some for _, some in found], 1)[:, order]


def _made(
    of: Replacement, logits: tuple[Logit, ...], edges_TS: Tensor, done: Tensor, values: Tensor, bias: Tensor
) -> Graph:
    n, kept = len(of.latents.latent), len(done)
    missed = (edges_TS.sum(1) + bias - values).abs()
    allowed = _EXACT * (edges_TS.abs().sum(1) + bias.abs())
    if (worst := (missed / allowed.clamp(min=1e-30)).max()) > 1:
        raise ValueError(
            f"model {of.model.id!r} ({type(of.model.module).__name__}) is not linear once patterns and denominators are held: a target "
            f"differs from the sum of its edges by {float(worst) * _EXACT:.2g} of their size. It has a gate or another product on the way "
            "of the stream; use another family"
        )
    order = done.argsort()
    rows = torch.cat([order, torch.arange(kept, len(values), device=order.device)])
    nodes = torch.cat([done[order], torch.arange(n, edges_TS.shape[1], device=order.device)])
    inside = torch.zeros(edges_TS.shape[1], dtype=torch.bool, device=order.device)
    inside[nodes] = True
    left_out = edges_TS[:, ~inside].sum(1)
    which = of.latents.of(done[order])
    return Graph(
        of.ids, tuple(of.layers), which, of.layer_of(which), logits, edges_TS[rows][:, nodes], bias[rows], left_out[rows], values[rows], n
    )  # fmt: skip

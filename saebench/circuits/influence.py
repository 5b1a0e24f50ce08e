"""What of a graph matters: influence, pruning, scores and paths, as circuit-tracer defines them.

The influence of a node on the logits is that of a walk: from a logit by its weight, from each node to one of those that have edges to it by
the edge's size, relative to all. T targets with rows of edges, S sources, M nodes (S and then logits), k logits.
"""

import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from saebench.circuits.graph import Graph

_BRANCHES = 20  # edges into a node that paths are looked for along


def normalised(edges: Float[Tensor, "T S"]) -> Float[Tensor, "T S"]:
    """Sizes of edges, relative to all into their target."""
    sizes = edges.abs()
    return sizes / sizes.sum(1, keepdim=True).clamp(min=1e-10)


def by_influence(
    edges: Float[Tensor, "T S"], rows: Int[Tensor, " t"], weights: Float[Tensor, " k"]
) -> Float[Tensor, " S"]:
    """Influence of every source, from the edges into some of them, `rows`, and behind these into the logits.

    It ends, since no walk comes back to a node.
    """
    shares = normalised(edges)
    current = weights @ shares[len(rows) :]
    total = current.clone()
    while current[rows].any():
        current = current[rows] @ shares[: len(rows)]
        total += current
    return total


class Pruned(NamedTuple):
    """What is left of a graph."""

    nodes: Bool[Tensor, " M"]
    edges: Bool[Tensor, "M M"]
    reached: Float[Tensor, " M"]
    """share of all influence that is that of the node and all of more"""


def influence_of(graph: "Graph") -> Float[Tensor, " S"]:
    """Of every source of a graph."""
    return by_influence(graph.edges, torch.arange(graph.n_latents, device=graph.edges.device), graph.weights)


def prune(graph: "Graph", nodes: float = 0.8, edges: float = 0.98, always: Sequence[int] = ()) -> Pruned:
    """Keep the nodes that have so much of all influence, the most influential first, then edges in the same way.

    Tokens and logits stay, and nodes that are `always` kept; other nodes that have lost all edges that leave, or latents all that enter, go. Raises ValueError for shares that are none.
    """
    for name, value in (("nodes", nodes), ("edges", edges)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; expected a share of influence, 0 to 1")
    n, (_, s) = graph.n_latents, graph.edges.shape
    adjacency, tokens = graph.adjacency, graph.token_nodes.start
    influence = torch.cat([influence_of(graph), graph.weights.new_zeros(len(graph.logits))])
    kept = influence >= _bound(influence, nodes)
    stays = torch.zeros_like(kept)
    stays[tokens:] = True
    stays[list(always)] = True
    kept |= stays
    adjacency[~kept] = 0
    adjacency[:, ~kept] = 0
    pruned = torch.cat([adjacency[:n, :s], adjacency[s:, :s]])
    through = by_influence(pruned, torch.arange(n, device=kept.device), graph.weights)
    scores = normalised(adjacency) * torch.cat([through, graph.weights])[:, None]
    left = scores >= _bound(scores.flatten(), edges)
    before = None
    while before is None or not torch.equal(before, kept):
        before = kept.clone()
        kept[:tokens] &= left[:, :tokens].any(0)
        kept[:n] &= left[:n].any(1)
        kept |= stays
        left &= kept[:, None] & kept
    order = influence.argsort(descending=True)
    reached = torch.empty_like(influence)
    reached[order] = influence[order].cumsum(0) / influence.sum()
    return Pruned(kept, left & (adjacency != 0), reached)


def _bound(scores: Float[Tensor, " n"], share: float) -> Float[Tensor, ""]:
    """The score down to which the largest ones have a share of their sum."""
    ordered = scores.sort(descending=True).values
    reached = ordered.cumsum(0) / ordered.sum()
    return ordered[min(int(torch.searchsorted(reached, share)), len(ordered) - 1)]


class Scores(NamedTuple):
    """How much of what the model does goes through latents."""

    replacement: float
    """of the influence of tokens and errors, that of tokens: 1 where nothing is error"""
    completeness: float
    """of what enters nodes, each counted by its influence, what does not come from errors"""


def scores(graph: "Graph") -> Scores:
    """Both of a whole graph."""
    n, influence, shares = graph.n_latents, influence_of(graph), normalised(graph.edges)
    tokens, errors = influence[graph.token_nodes].sum(), influence[graph.error_nodes].sum()
    explained = 1 - shares[:, graph.error_nodes].sum(1)
    counted = torch.cat([influence[:n], graph.weights])
    rest = influence[n:].sum()  # nothing enters tokens and errors
    return Scores(
        float(tokens / (tokens + errors)), float(((explained * counted).sum() + rest) / (counted.sum() + rest))
    )


class Path(NamedTuple):
    """From a token to a logit."""

    nodes: tuple[int, ...]
    """the first is a token's"""
    share: float
    """of the walks that begin at the logit, those that take this path"""


def paths(graph: "Graph", n: int = 5, longest: int = 100_000) -> list[Path]:
    """The paths from tokens to the first logit that have most of its influence, the first first; `longest` steps of looking for them."""
    shares = normalised(graph.edges)
    target = graph.edges.shape[1]
    heap: list[tuple[float, tuple[int, ...]]] = [(-1.0, (target,))]
    found: list[Path] = []
    for _ in range(longest):
        if not heap or len(found) == n:
            break
        share, (node, *rest) = heapq.heappop(heap)
        if graph.token_nodes.start <= node < target:
            found.append(Path((node, *rest), -share))
            continue
        if graph.error_nodes.start <= node < graph.error_nodes.stop:
            continue
        row = shares[node if node < graph.n_latents else node - target + graph.n_latents]
        best = row.topk(min(_BRANCHES, len(row)))
        for value, source in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if value > 0:
                heapq.heappush(heap, (share * value, (source, node, *rest)))
    return found

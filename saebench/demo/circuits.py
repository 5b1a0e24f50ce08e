"""The demonstration of circuits: transcoders for all layers of the embedded model, graphs of a few prompts, and ablations that try what they say.

V vocabulary, B interventions at once.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saebench.circuits import Circuit, CircuitConfig, Graph, Logit, Replacement, circuits, measured, predicted
from saebench.circuits.influence import influence_of
from saebench.circuits.interventions import Clamp
from saebench.circuits.run import read_circuit
from saebench.evaluate import EvalConfig
from saebench.files import hash_files, write_json, write_text, writing
from saebench.harvest import HarvestConfig
from saebench.models import head
from saebench.plan import Stages
from saebench.sae import weights_of
from saebench.text import TextConfig
from saebench.train import TrainConfig
from saebench.view.picture import picture

log = logging.getLogger(__name__)

STORE = Path("activations/demo-circuits")
SET = "batchtopk-k32-transcoder"
_TOGETHER = 8  # latents that are ablated at once
_DRAWS = 20  # of as many latents at random, to compare with


class Case(NamedTuple):
    """A prompt whose next token the model has a reason for."""

    name: str
    about: str
    prompt: str
    target: str
    against: str
    """what the target is told from"""
    at: tuple[str, ...]
    """tokens whose latents are ablated, each where it comes last"""


_INIT = "class Point:\n    def __init__(self, name, value):\n        self.name = name\n        self.value ="
CASES = (
    Case("round-bracket", "a round bracket closes", "total = sum(first, second", ")", "]", ("(",)),
    Case("square-bracket", "a square bracket closes", "names = [first, second", "]", ")", (" [",)),
    Case("name", "a name is repeated", _INIT, " value", " name", ("value", " value")),
    Case(
        "indentation", "a colon indents",
        "class Point:\n    def name(self):\n        if value is None:", "\n           ", "\n       ", (":", "\n       "),
    ),
)  # fmt: skip


class Ablation(NamedTuple):
    """What becomes of the next token without the most influential latents at one token."""

    at: str
    latents: list[str]
    """their nodes in the graph's file"""
    predicted: float
    """change of the target's logit over the other's that the graph says, in nats"""
    held: float
    """the same, measured with attention and norms held"""
    free: float
    """and measured with both free"""
    chances: list[float]
    """probability of the target before and after, then of the other token"""
    random: list[float]
    """of the target without as many latents of the same layers at other tokens, for every draw"""


class Shown(NamedTuple):
    """A case's graph, and what it was tried by."""

    case: Case
    path: Path
    scores: dict[str, float]
    sentences: list[str]
    ablations: list[Ablation]

    @property
    def picture(self) -> Path:
        return self.path.with_suffix(".svg")


def stages(out: Path) -> Stages:
    """What comes before graphs, with the run directory `out`."""
    return Stages(
        HarvestConfig(layers=(0, 1, 2, 3), kinds=("mlp",), tokens=400_000, validation_tokens=50_000, out=STORE),
        TextConfig(),
        TrainConfig(
            store=STORE, kind="transcoder", out=out, arch=("batchtopk",), k=(32,), d_sae=(1024,), tokens=800_000, batch=2048
        ),
        EvalConfig(run=out, tokens=10_000, dead_rows=200_000),
        None,
    )  # fmt: skip


def graphs(out: Path, cases: Sequence[Case] = CASES, name: str = SET) -> list[Shown] | None:
    """Trace each case through a set of the run `out`, try it, and draw it; what is there already stays. None where Ctrl-C ended it early.

    Raises ValueError as `circuits` does.
    """
    members = [path.parent for path in sorted((out / "saes").glob(f"{name}-*/cfg.json"))]
    made_of = hash_files([file for folder in members for file in weights_of(folder)])
    found = []
    for number, case in enumerate(cases, 1):
        config = CircuitConfig(
            run=out, set=name, prompt=case.prompt, target=case.target, against=case.against, name=case.name
        )
        if _made(config.path, case, made_of) is None:
            log.info("graph %d of %d: %s", number, len(cases), case.about)
            if config.path.exists() and _noted(config.path):  # of other weights, whose groups are nothing here
                config.path.unlink()
            circuit = circuits(config)
            if circuit is None:
                return None
            _write(circuit, case, made_of)
        shown = _made(config.path, case, made_of)
        assert shown is not None
        found.append(shown)
    return found


def _noted(path: Path) -> dict[str, Any]:
    """What a demonstration notes of itself in a graph's file; nothing in that of another graph."""
    return read_circuit(path)["metadata"]["saebench"].get("demonstration", {})


def _made(path: Path, case: Case, made_of: str) -> Shown | None:
    """What is there of a case; None where it is of another one, or of other weights."""
    tried = _noted(path) if path.exists() else {}
    if (tried.get("case"), tried.get("weights")) != ([*case[:-1], [*case.at]], made_of):
        return None
    own = read_circuit(path)["metadata"]["saebench"]
    return Shown(case, path, own["scores"], own["sentences"], [Ablation(*one) for one in tried["ablations"]])


def _write(circuit: Circuit, case: Case, made_of: str) -> None:
    """Ablate, note what comes of it in the graph's file, its latents as groups, and draw it."""
    ablations = [_tried(circuit.replacement, circuit.graph, at) for at in case.at]
    with writing(circuit.path):
        content: dict[str, Any] = read_circuit(circuit.path)
        there, marks = {node["node_id"] for node in content["nodes"]}, content["qParams"]
        for one in ablations:
            group = [f"latents at {one.at!r}", *(id for id in one.latents if id in there)]
            marks["supernodes"] = [old for old in marks["supernodes"] if old[0] != group[0]] + [group]
            marks["pinnedIds"] = [*dict.fromkeys([*marks["pinnedIds"], *group[1:]])]
        content["metadata"]["saebench"]["demonstration"] = {
            "case": [*case[:-1], [*case.at]], "weights": made_of, "ablations": [list(one) for one in ablations]
        }  # fmt: skip
        write_text(circuit.path.with_suffix(".svg"), picture(content, [told(case, one) for one in ablations]))
        write_json(circuit.path, content)


def told(case: Case, one: Ablation) -> str:
    """An ablation as a sentence."""
    before, after, other, other_after = one.chances
    mean = sum(one.random) / len(one.random)
    return (
        f"Without {len(one.latents)} latents at {one.at!r}: {case.target!r} {before:.3f} → {after:.3f}, {case.against!r} {other:.3f} → "
        f"{other_after:.3f}; without {len(one.latents)} at random {case.target!r} {mean:.3f} ({min(one.random):.3f} to {max(one.random):.3f})."
    )


def _tried(of: Replacement, graph: Graph, token: str) -> Ablation:
    """Ablate the most influential latents at a token, and as many at random."""
    at = max(place for place, id in enumerate(of.ids.tolist()) if of.model.tokenizer.decode([id]) == token)
    influence = influence_of(graph)[: graph.n_latents].masked_fill(graph.latents.position != at, -1.0)
    n = min(_TOGETHER, int((graph.latents.position == at).sum()))
    nodes = influence.topk(n).indices
    generator = torch.Generator().manual_seed(0)
    clamps = [dict.fromkeys(nodes.tolist(), 0.0), *(_at_random(graph, nodes, at, generator) for _ in range(_DRAWS))]
    says, held = predicted(graph, clamps[:1]), measured(of, graph, clamps[:1])
    free = measured(of, graph, clamps[:1], frozen=False)
    says, held, free = (float(each.logits[0, 0]) for each in (says, held, free))
    before_V, after_BV = _chances(of, graph, clamps)
    (logit,) = graph.logits
    assert logit.against is not None
    chances = [float(row[one]) for one in (logit.token, logit.against) for row in (before_V, after_BV[0])]
    ids = [f"{graph.latent_layers[node]}_{graph.latents.latent[node]}_{at}" for node in nodes.tolist()]
    return Ablation(token, ids, says, held, free, chances, after_BV[1:, logit.token].tolist())


def _at_random(graph: Graph, nodes: Int[Tensor, " n"], at: int, generator: torch.Generator) -> Clamp:
    """As many latents of each layer, at any tokens but one."""
    found: list[int] = []
    for layer, n in zip(
        *(each.tolist() for each in graph.latent_layers[nodes].unique(return_counts=True)), strict=True
    ):
        (pool,) = ((graph.latent_layers == layer) & (graph.latents.position != at)).nonzero(as_tuple=True)
        found += pool[torch.randperm(len(pool), generator=generator)[:n]].tolist()
    return dict.fromkeys(found, 0.0)


@torch.no_grad()
def _chances(
    of: Replacement, graph: Graph, clamps: Sequence[Clamp]
) -> tuple[Float[Tensor, " V"], Float[Tensor, "B V"]]:
    """(probabilities of the next token, those under each intervention) with attention and norms free."""
    logits_V = head(of.model, of.states[-1:])[0].clone()
    every = tuple(Logit(token, None, 1.0, 0.0) for token in range(len(logits_V)))
    changes_BV = measured(of, replace(graph, logits=every), clamps, frozen=False).logits
    return logits_V.softmax(-1), (logits_V + changes_BV).softmax(-1)

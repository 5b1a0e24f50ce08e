"""`saebench circuits`: a prompt's graph through a set of transcoders, held to interventions, in words and in a file."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch

from saebench.circuits.export import as_json, node_ids, title_of, told
from saebench.circuits.graph import Graph, chosen_logits, trace
from saebench.circuits.groups import Marks, marks_of, parse_groups, read_circuit
from saebench.circuits.influence import Scores, paths, prune, scores
from saebench.circuits.interventions import Act, Agreement, Effect, agreement, clamp_of, effects, parse_acts
from saebench.circuits.opened import model_of, names_of, open_set, token_of
from saebench.circuits.replacement import Replacement
from saebench.config import Count
from saebench.files import read_json, write_json, writing
from saebench.runlog import interruptible
from saebench.sae.convert import ConvertConfig, convert
from saebench.store.source import longest_of

CIRCUITS = "circuits"
"""the directory of a run that has a file for each graph"""
LISTING = "graph-metadata.json"
"""the file there by which circuit-tracer's server finds them"""


_USUAL: dict[str, Any] = {"latents": 4096, "nodes": 0.8, "edges": 0.98, "ablations": 16}
_SUBJECT = ("set", "prompt", "target", "against")  # what a graph is of
_KEPT = (*_SUBJECT, *_USUAL, "model")  # what its file says of how it was made


@dataclass(frozen=True, kw_only=True)
class CircuitConfig:
    """Which prompt to trace, through what, to which token; and what to try on the graph."""

    run: Path
    """run directory with the set's transcoders in RUN/saes; the graph is written to RUN/circuits"""
    set: str | None = None
    """name of the set: transcoders of layers without a gap, or cross-layer ones (metadata.set of their cfg.json); or the folder of a set of circuit-tracer's"""
    prompt: str | None = None
    """text, of which the next token is explained (default: the graph --name is traced again as it was, but for what is given)"""
    target: str | None = None
    """the token that is explained, with the space before it (default: the likeliest, up to 10 or 95% of the probability)"""
    against: str | None = None
    """another token: what is explained is by how much the target's logit is above its"""
    latents: Count | None = None
    """nodes that are latents at most (default: 4096): of more active ones, those of most influence"""
    nodes: float | None = None
    """share of the influence on the logits that the nodes written have together (default: 0.8)"""
    edges: float | None = None
    """share of it, of the edges among these (default: 0.98)"""
    ablations: Count | None = None
    """latents that are ablated, one at a time, to hold the graph to what happens; the most influential ones (default: 16)"""
    name: str | None = None
    """of the file (default: set, prompt and target)"""
    pin: tuple[str, ...] = ()
    """ids of nodes to pin, such as 2_417_12 (layer, latent, position): those are in the file whatever their influence"""
    groups: Annotated[dict[str, tuple[str, ...]], parse_groups] | None = None
    """nodes to group under a name: "opens=0_12_3,1_40_3; closes=2_7_9"; a name without ids takes its group away"""
    intervene: Annotated[tuple[Act, ...], parse_acts] | None = None
    """what to do to groups or latents, all at once: "opens*0" ablates, "opens*2; 2_7_9=1.5" doubles and sets; what changes is told beside what the graph says"""
    constrained: bool = False
    """with --intervene, hold all other latents up to the last layer of those that are set (constrained patching)"""
    export: Path | None = None
    """folder that gets the set's transcoders in circuit-tracer's format, too"""
    overwrite: bool = False
    """let the graph of another prompt, set or target that has this name go, with its pins and groups"""
    model: str | None = None
    """where the model is that the set is of, if not where its files say"""
    device: str | None = None
    """cuda or cpu (default: cuda where it is at hand)"""
    trust_remote_code: bool = False
    """run code that comes with a hub model"""

    @property
    def path(self) -> Path:
        """The file of the graph."""
        of = [Path(self.set or "").name, (self.prompt or "")[-40:], self.target or "", self.against or ""]
        name = self.name or re.sub(r"[^A-Za-z0-9_]+", "-", "-".join(filter(None, of))).strip("-")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name == Path(LISTING).stem:
            raise ValueError(f"name is {name!r}; expected letters, digits, - and _, which viewers have in an address")
        return self.run / CIRCUITS / f"{name}.json"

    def whole(self) -> "CircuitConfig":
        """With all that was not given: from the graph's file where there is no prompt, else as usual.

        Raises ValueError without a prompt for a graph that is not there, or does not say what it was made with.
        """
        if self.prompt is not None:
            if self.set is None:
                raise ValueError("--prompt is given, and no --set; expected both, or --name of a graph that is there")
            return self._with(_USUAL)
        if self.name is None or not self.path.exists():
            raise ValueError(
                f"{self.run} has no graph {self.name or ''!r}; expected --set and --prompt, or --name of a graph that is there"
            )
        said = read_circuit(self.path)["metadata"]["saebench"].get("settings")
        if said is None:
            raise ValueError(
                f"{self.path} is of a version that did not note how it was made; give --set and --prompt, and the rest"
            )
        return self._with(said)

    def _with(self, others: Mapping[str, Any]) -> "CircuitConfig":
        return replace(self, **{name: value for name, value in others.items() if getattr(self, name) is None})


@dataclass(frozen=True)
class Tried:
    """An intervention, and what came of it."""

    acts: tuple[Act, ...]
    constrained: bool
    effects: list[Effect]

    @property
    def title(self) -> str:
        held = ", other latents up to its layers held" if self.constrained else ""
        return "; ".join(map(str, self.acts)) + held


@dataclass(frozen=True)
class Circuit:
    """What was found of a prompt."""

    path: Path
    graph: Graph
    scores: Scores
    agreement: Agreement
    sentences: tuple[str, ...]
    replacement: Replacement
    """what it is a graph of, for interventions"""
    tried: tuple[Tried, ...] = ()
    """interventions: the one asked for first, then those that the file had"""

    def lines(self) -> list[str]:
        """As text."""
        graph, held = self.graph, self.agreement
        n = len(held.ablated)
        kept = "" if graph.n_latents == graph.n_active else f", of {graph.n_active:,} active"
        return [
            *self.sentences,
            f"{graph.n_latents:,} latents{kept}; replacement score {self.scores.replacement:.3f}, completeness {self.scores.completeness:.3f}",
            f"graph and model, {n} latents ablated one at a time (correlation of changes): later latents {held.latents:.3f} "
            f"({held.latents_active:.3f} of those that stay active), logits {held.logits:.3f} with attention and norms held; "
            f"{held.latents_free:.3f} and {held.logits_free:.3f} with both free",
        ]


def circuits(config: CircuitConfig) -> Circuit | None:
    """Trace a prompt and write RUN/circuits/NAME.json; None where Ctrl-C ended it early, and nothing is written.

    What is pinned and grouped in the file stays, and interventions that it has are tried anew. Raises ValueError for a set that is not
    there, has a gap or lacks a member, for transcoders of other models or hooks than belong together, a prompt that does not fit the model,
    a target that is not one token of it, a graph that is too large, a name that another graph has, and nodes that the graph has not.
    """
    config = config.whole()
    assert config.set is not None
    assert config.prompt is not None
    path = config.path
    before_of(path, config)  # which another one's name ends at once
    members = open_set(config.run, config.set, config.device)
    model = model_of(members, config.model, config.device, trust_remote_code=config.trust_remote_code)
    ids = torch.tensor(model.tokens_of(config.prompt), device=model.device)
    target, against = (None if text is None else token_of(model, text) for text in (config.target, config.against))
    bounds = {hook: longest_of(one.folder, hook) for one in members for hook in one.ends.hooks}
    if config.export is not None:
        for one in members:
            convert(ConvertConfig(sae=one.folder, to="circuit-tracer", out=config.export))
    with interruptible() as interrupt:
        replacement = Replacement(model, members, ids, bounds)
        logits = chosen_logits(replacement, target, against)
        graph = trace(replacement, logits, most=config.latents or 0, stopped=lambda: interrupt.requested)
        if graph is None:
            return None
        held = agreement(replacement, graph, config.ablations or 0)
    with writing(path):
        return _written(config, replacement, graph, held)


def before_of(path: Path, config: CircuitConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(what viewers keep, interventions) of the file that a graph takes the place of. Raises ValueError where it is another's."""
    if not path.exists() or config.overwrite:
        return {}, []
    there = read_circuit(path)
    metadata, own = there["metadata"], there["metadata"]["saebench"]
    said = own.get("settings") or {"set": metadata.get("scan"), "prompt": metadata.get("prompt")}
    if differ := [
        f"{name} {said[name]!r}" for name in _SUBJECT if name in said and said[name] != getattr(config, name)
    ]:
        raise ValueError(
            f"{path} is a graph of {', '.join(differ)}, and this one is not; give it another --name, or --overwrite to let the other go"
        )
    return there["qParams"], own.get("interventions", [])


def _written(config: CircuitConfig, of: Replacement, graph: Graph, held: Agreement) -> Circuit:
    """Prune, try interventions, and write the file, which is held meanwhile: its pins and groups may have changed since."""
    path, nodes = config.path, {id: node for node, id in enumerate(node_ids(graph))}
    view, before = before_of(path, config)
    marks = marks_of(view, path).pinned(config.pin).grouped(config.groups or {})
    marks.check(nodes, path)
    pruned = prune(graph, config.nodes or 0.0, config.edges or 0.0, [nodes[id] for id in marks.pins])
    found, settings = scores(graph), {name: getattr(config, name) for name in _KEPT}

    def token(id: int) -> str:
        return of.model.tokenizer.decode([id])

    with names_of(of, graph) as named:
        tried = _tried(config, of, graph, nodes, marks, before, lambda node: title_of(node, graph, named, token))
        sentences = tuple(f"{path.share:.1%}: {told(path.nodes, graph, named, token)}" for path in paths(graph))
        content = as_json(
            graph, pruned, path.stem, Path(settings["set"]).name, settings["prompt"], token, named, settings["nodes"], marks
        )  # fmt: skip
    content["qParams"] = content["qParams"] | view | marks.params()
    content["metadata"]["saebench"] = {
        "members": [one.folder.name for one in of.members], "model": of.model.id, "first_layer": graph.layers[0],
        "scores": found._asdict(), "agreement": {k: v if v == v else None for k, v in held._asdict().items()},
        "active": graph.n_active, "sentences": list(sentences), "settings": settings,
        "interventions": [
            {"acts": "; ".join(map(str, one.acts)), "constrained": one.constrained, "effects": [list(row) for row in one.effects],
             "groups": marks.params()["supernodes"]} for one in tried
        ],
    }  # fmt: skip
    write_json(path, content)
    _listed(path.parent, {name: value for name, value in content["metadata"].items() if name != "saebench"})
    return Circuit(path, graph, found, held, sentences, of, tried)


def _listed(folder: Path, metadata: dict[str, Any]) -> None:
    """Have a graph among those that circuit-tracer's server shows."""
    with writing(folder / LISTING):
        others = read_json(folder / LISTING)["graphs"] if (folder / LISTING).exists() else []
        graphs = [*(one for one in others if one["slug"] != metadata["slug"]), metadata]
        write_json(folder / LISTING, {"graphs": graphs})


def graphs_of(run: Path) -> dict[str, Path]:
    """The graphs of a run, by name."""
    return {path.stem: path for path in sorted((run / CIRCUITS).glob("*.json")) if path.name != LISTING}


def _tried(
    config: CircuitConfig, of: Replacement, graph: Graph, nodes: Mapping[str, int], marks: Marks,
    before: list[dict[str, Any]], title: Callable[[int], str],
) -> tuple[Tried, ...]:  # fmt: skip
    """The intervention asked for, and those of the file whose groups and latents are still there."""
    asked = [] if config.intervene is None else [(config.intervene, config.constrained)]
    for one in before:
        acts = parse_acts(one["acts"])
        if all(act.on in marks.groups or act.on in nodes for act in acts) and (acts, one["constrained"]) not in asked:
            asked.append((acts, one["constrained"]))
    grouped = {id for own in marks.groups.values() for id in own}
    rows = {name: [nodes[id] for id in own] for name, own in marks.groups.items()}
    rows |= {title(nodes[id]): [nodes[id]] for id in marks.pins if id not in grouped and nodes[id] < graph.n_latents}
    rows = {name: [node for node in own if node < graph.n_latents] for name, own in rows.items()}
    rows = {name: own for name, own in rows.items() if own}
    return tuple(
        Tried(acts, held, effects(of, graph, clamp_of(acts, graph, nodes, marks.groups), rows, title, constrained=held))
        for acts, held in asked
    )

"""`saebench circuits`: a prompt's graph through a set of transcoders, held to interventions, in words and in a file."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saebench.circuits.export import Named, as_json, told
from saebench.circuits.graph import Graph, chosen_logits, trace
from saebench.circuits.influence import Scores, paths, prune, scores
from saebench.circuits.interventions import Agreement, agreement
from saebench.circuits.replacement import Replacement
from saebench.config import Count
from saebench.evaluate.measure import Dictionary
from saebench.evaluate.sets import ends_of_set, set_of
from saebench.files import read_json, write_json, writing
from saebench.index import IndexConfig, open_feature_index
from saebench.index.explanations import read_explanations
from saebench.index.names import Names
from saebench.index.notes import Notes
from saebench.models import LanguageModel, check_hook, choose_device, load_model, widths_of
from saebench.runlog import interruptible
from saebench.sae import Ends, ends_of, load_sae, read_config
from saebench.store.source import check_origin, longest_of, origin_of

CIRCUITS = "circuits"
"""the directory of a run that has a file for each graph"""


@dataclass(frozen=True, kw_only=True)
class CircuitConfig:
    """Which prompt to trace, through what, to which token."""

    run: Path
    """run directory with the set's transcoders in RUN/saes; the graph is written to RUN/circuits"""
    set: str
    """name of the set: transcoders of layers without a gap, or cross-layer ones (metadata.set of their cfg.json)"""
    prompt: str
    """text, of which the next token is explained"""
    target: str | None = None
    """the token that is explained, with the space before it (default: the likeliest, up to 10 or 95% of the probability)"""
    against: str | None = None
    """another token: what is explained is by how much the target's logit is above its"""
    latents: Count = 4096
    """nodes that are latents at most: of more active ones, those of most influence"""
    nodes: float = 0.8
    """share of the influence on the logits that the nodes written have together"""
    edges: float = 0.98
    """share of it, of the edges among these"""
    ablations: Count = 16
    """latents that are ablated, one at a time, to hold the graph to what happens; the most influential ones"""
    name: str | None = None
    """of the file (default: set and prompt)"""
    model: str | None = None
    """where the model is that the set is of, if not where its files say"""
    device: str | None = None
    """cuda or cpu (default: cuda where it is at hand)"""
    trust_remote_code: bool = False
    """run code that comes with a hub model"""

    @property
    def path(self) -> Path:
        """The file of the graph."""
        name = self.name or re.sub(r"[^A-Za-z0-9_-]+", "-", f"{self.set}-{self.prompt[-40:]}").strip("-")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ValueError(f"name is {name!r}; expected letters, digits, - and _, which viewers have in an address")
        return self.run / CIRCUITS / f"{name}.json"


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

    Raises ValueError for a set that is not there, has a gap or lacks a member, for transcoders of other models or hooks than belong
    together, a prompt that does not fit the model, a target that is not one token of it, and a graph that is too large.
    """
    path = config.path
    members = open_set(config.run, config.set, config.device)
    model = _model_of(members, config)
    ids = torch.tensor(model.tokens_of(config.prompt), device=model.device)
    target, against = (None if text is None else token_of(model, text) for text in (config.target, config.against))
    bounds = {hook: longest_of(one.folder, hook) for one in members for hook in one.ends.hooks}
    with interruptible() as interrupt:
        replacement = Replacement(model, members, ids, bounds)
        logits = chosen_logits(replacement, target, against)
        graph = trace(replacement, logits, most=config.latents, stopped=lambda: interrupt.requested)
        if graph is None:
            return None
        held = agreement(replacement, graph, config.ablations)
    pruned, found = prune(graph, config.nodes, config.edges), scores(graph)

    def token(id: int) -> str:
        return model.tokenizer.decode([id])

    with names_of(replacement, graph) as named:
        sentences = tuple(f"{path.share:.1%}: {told(path.nodes, graph, named, token)}" for path in paths(graph))
        content = as_json(graph, pruned, path.stem, config.set, config.prompt, token, named, config.nodes)
    content["metadata"]["saebench"] = {
        "members": [one.folder.name for one in replacement.members], "model": model.id, "first_layer": graph.layers[0],
        "scores": found._asdict(), "agreement": {k: v if v == v else None for k, v in held._asdict().items()},
        "active": graph.n_active, "sentences": list(sentences),
    }  # fmt: skip
    with writing(path):
        write_json(path, content)
    return Circuit(path, graph, found, held, sentences, replacement)


def read_circuit(path: Path) -> dict[str, Any]:
    """A graph that `circuits` wrote, as JSON. Raises ValueError where the file is another's."""
    found = read_json(path)
    if (
        not isinstance(found, dict)
        or "saebench" not in found.get("metadata", {})
        or not {"nodes", "links"} <= found.keys()
    ):
        raise ValueError(f"{path} is no graph that `saebench circuits` wrote: make it again, or move it away")
    return found


def open_set(run: Path, name: str, device: str | None = None) -> list[Dictionary]:
    """The dictionaries of a run's set. Raises ValueError where there are none, and as `ends_of_set`."""
    members: dict[Path, Ends] = {}
    sets: set[str] = set()
    for path in sorted((run / "saes").glob("*/cfg.json")):
        settings = read_config(path.parent)
        of, _ = set_of(path.parent, settings)
        sets |= {of} - {""}
        if of == name:
            members[path.parent] = ends_of(path.parent, settings)
    if not members:
        known = f"it has {', '.join(sorted(sets))}" if sets else "none of its SAEs says metadata.set in its cfg.json"
        raise ValueError(
            f"{run} has no set {name!r}; {known}. Train one with `train --kind transcoder` or `--kind clt`"
        )
    ends_of_set(name, members)
    device = choose_device(device)
    return [Dictionary(folder, load_sae(folder, device=device), ends) for folder, ends in members.items()]


def token_of(model: LanguageModel, text: str) -> int:
    """The one token that a text is. Raises ValueError where it is none, or several, or one beyond the model's embedding."""
    ids = model.encoder.encode([text])[0]
    if len(ids) != 1:
        pieces = ", ".join(repr(model.tokenizer.decode([id])) for id in ids)
        raise ValueError(
            f"target {text!r} is {len(ids)} tokens of model {model.id!r}{': ' * bool(ids)}{pieces}; expected one, with the space before it"
        )
    model.check_tokens(list(ids))
    return int(ids[0])


def _model_of(members: list[Dictionary], config: CircuitConfig) -> LanguageModel:
    """The model that all members are of, in float32. Raises ValueError where they are of several, or do not fit it."""
    origins = {one.folder: origin_of(one.folder) for one in members}
    for folder, origin in origins.items():
        if origin is None:
            raise ValueError(f"{folder} does not say which model it is of: add metadata.model_name to its cfg.json")
        first_folder, first = next(iter(origins.items()))
        assert first is not None
        if (origin.name, origin.weights) != (first.name, first.weights):
            raise ValueError(
                f"{first_folder} is of model {first.name!r}, {folder} of {origin.name!r}; expected a set of one model"
            )
    _, origin = next(iter(origins.items()))
    assert origin is not None
    device = choose_device(config.device)
    model = load_model(
        config.model or origin.name,
        device=device,
        dtype="float32",
        revision=origin.revision,
        trust_remote_code=config.trust_remote_code,
    )
    check_origin(model, origin)
    for one in members:
        for hook in one.ends.hooks:
            check_hook(model, hook)
        read, *written = widths_of(model, one.ends.hooks).values()
        if one.sae.d_in != read or one.sae.parts != tuple(written):
            raise ValueError(
                f"{one.folder} reads {one.sae.d_in} and writes {one.sae.parts}, model {model.id!r} has {read} and {tuple(written)} there; "
                "it is of another model"
            )
    return model


@contextlib.contextmanager
def names_of(replacement: Replacement, graph: Graph) -> Iterator[Named]:
    """What latents are called in the indexes of their dictionaries; nothing where there is none, or none that fits."""
    with contextlib.ExitStack() as stack:
        known: dict[int, Names] = {}
        for number, one in enumerate(replacement.members):
            path = IndexConfig(sae=one.folder).path
            if not path.exists():
                continue
            with contextlib.suppress(ValueError):
                index = stack.enter_context(open_feature_index(path, sae=one.folder, need_store=False))
                notes = Notes(path.with_suffix(".notes.json"), index.identity["sae"], index.d_sae)
                known[number] = Names(index, notes, read_explanations(index))

        def named(node: int) -> str:
            names = known.get(int(graph.latents.member[node]))
            return "" if names is None else f"‘{names[int(graph.latents.latent[node])].text}’"

        yield named

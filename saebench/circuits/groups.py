"""Pins and groups of a graph's nodes, where circuit-tracer's viewer and Neuronpedia's keep them: `qParams` of its JSON.

A group, a supernode there, is `[name, node, …]`. Its nodes are pinned, too: those viewers draw no others of it.
"""

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from saebench.files import read_json, write_json, writing

Groups = Mapping[str, tuple[str, ...]]
"""Nodes by the name of their group."""


@dataclass(frozen=True)
class Marks:
    """What people have marked of a graph's nodes."""

    pins: tuple[str, ...] = ()
    groups: Groups = field(default_factory=dict)
    """a node is in one at most"""

    def pinned(self, nodes: Iterable[str]) -> "Marks":
        """With these pinned, too."""
        return replace(self, pins=tuple(dict.fromkeys((*self.pins, *nodes))))

    def unpinned(self, node: str) -> "Marks":
        """Without a node's pin, and out of its group."""
        groups = {name: tuple(one for one in own if one != node) for name, own in self.groups.items()}
        pins = tuple(one for one in self.pins if one != node)
        return Marks(pins, {name: own for name, own in groups.items() if own})

    def grouped(self, groups: Groups) -> "Marks":
        """With groups of these nodes alone, which leave others that they were in; without those that are given no nodes."""
        made = dict(self.groups)
        for name, nodes in groups.items():
            made = {other: tuple(one for one in own if one not in nodes) for other, own in made.items()}
            made[name] = tuple(dict.fromkeys(nodes))
        made = {name: own for name, own in made.items() if own}
        return Marks(self.pins, made).pinned(node for own in made.values() for node in own)

    def check(self, known: Collection[str], where: Path) -> None:
        """Raises ValueError for a node that the graph has not."""
        for node in self.pins:
            if node not in known:
                name = next((name for name, own in self.groups.items() if node in own), "")
                raise ValueError(
                    f"{where}: node {node!r}{f' of group {name!r}' if name else ''} is not in the graph; expected latents as "
                    "LAYER_LATENT_POSITION that are active there, or other nodes' ids as the file has them. "
                    "Take it out, or have more latents (--latents)"
                )

    def params(self) -> dict[str, Any]:
        """As the viewers have them."""
        return {"pinnedIds": list(self.pins), "supernodes": [[name, *own] for name, own in self.groups.items()]}


def marks_of(params: Mapping[str, Any], where: Path) -> Marks:
    """Those of a file's `qParams`, which circuit-tracer's viewer saves as it has them in an address. Raises ValueError for what is none."""
    pins, groups = params.get("pinnedIds") or [], params.get("supernodes") or []
    if isinstance(pins, str):
        pins = pins.split(",")
    if isinstance(groups, str):
        try:
            groups = json.loads(groups)
        except json.JSONDecodeError:
            groups = [groups]
    if not all(_is_strings(one) for one in (pins, *groups)) or not all(groups):
        raise ValueError(
            f"{where}: pinnedIds is {pins!r} and supernodes {groups!r}; expected ids of nodes, and lists of a name and ids"
        )
    found: dict[str, tuple[str, ...]] = {}
    for name, *own in groups:
        number, free = 1, str(name)
        while free in found:  # viewers call them all "supernode"
            number, free = number + 1, f"{name} {number + 1}"
        found[free] = tuple(own)
    return Marks(tuple(pins)).grouped(found)


def change_marks(path: Path, change: Callable[[Marks], Marks]) -> None:
    """Change what is marked in the file of a graph; all else of it stays. Raises ValueError for nodes that it has not."""
    with writing(path):
        graph = read_circuit(path)
        marks = change(marks_of(graph["qParams"], path))
        marks.check({node["node_id"] for node in graph["nodes"]}, path)
        write_json(path, graph | {"qParams": graph["qParams"] | marks.params()})


def forget(path: Path, acts: str, constrained: bool) -> None:
    """Take an intervention out of a graph's file."""
    with writing(path):
        graph = read_circuit(path)
        own = graph["metadata"]["saebench"]
        own["interventions"] = [
            one for one in own.get("interventions", []) if (one["acts"], one["constrained"]) != (acts, constrained)
        ]
        write_json(path, graph)


def read_circuit(path: Path) -> dict[str, Any]:
    """A graph that `circuits` wrote, as JSON. Raises ValueError where the file is another's."""
    found = read_json(path)
    if (
        not isinstance(found, dict)
        or "saebench" not in found.get("metadata", {})
        or not {"nodes", "links", "qParams"} <= found.keys()
    ):
        raise ValueError(f"{path} is no graph that `saebench circuits` wrote: make it again, or move it away")
    return found


def parse_groups(text: str) -> dict[str, tuple[str, ...]]:
    """Groups written `opens=0_12_3,1_40_3; closes=2_7_9`; of a group that is to go, no ids. Raises ValueError for anything else."""
    found = {}
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        name, equals, nodes = part.rpartition("=")
        if not equals or not name.strip():
            raise ValueError(f"{part!r} is no group; expected NAME=ID,ID… with ; between groups")
        found[name.strip()] = tuple(filter(None, (node.strip() for node in nodes.split(","))))
    return found


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)

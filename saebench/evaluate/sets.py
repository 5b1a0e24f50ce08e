"""Dictionaries that belong together: transcoders that stand in for the MLPs of several layers at once.

Each reads the stream that the earlier ones have changed. What is written at a layer is what its own transcoder writes or, in a
joint set (cross-layer transcoders), the sum of what all of those up to the layer write there.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saebench.evaluate.measure import ByHook, Dictionary, Measurement, Places, Subject, added, seen
from saebench.metrics import total
from saebench.models import MLP, hook_name, last_states, mlps_replaced, parse_hook
from saebench.sae import Ends, read_config

SETS = "sets"
"""the directory of a run that has one for each set, with its figures"""
_READ = ("mlp_in", "ln2_normalized", "resid_mid")
"""What says all of what an MLP makes of a position: what it is called with, the same before its norm's gain, and before that norm."""


def set_of(folder: Path, config: dict[str, Any]) -> tuple[str, bool]:
    """(name of the set that a dictionary belongs to, or empty; whether what the set writes is a sum), as its `cfg.json` says.

    Raises ValueError for a name that cannot be a directory's, and for a member of a sum that names no set.
    """
    metadata = config.get("metadata", {})
    name, joint = str(metadata.get("set") or ""), bool(metadata.get("joint"))
    if name != Path(name).name or name == "..":
        raise ValueError(f"{folder} belongs to set {name!r}; expected a name without slashes in metadata.set")
    if joint and not name:
        raise ValueError(
            f"{folder} writes a part of a sum and does not say of which set: add metadata.set to its cfg.json"
        )
    return name, joint


def ends_of_set(name: str, members: Mapping[Path, Ends]) -> Ends:
    """All that the members of a set, by their directories, read and write, in the order of layers.

    Raises ValueError for members that cannot stand in for MLPs together, and for a joint set that lacks one: of those that read the
    hooks that their cfg.json knows of, or something of the MLPs that are written.
    """
    configs = {folder: read_config(folder) for folder in members}
    kinds = {set_of(folder, config)[1] for folder, config in configs.items()}
    if len(kinds) > 1:
        raise ValueError(f"set {name!r} has members with and without metadata.joint; expected all of them or none")
    joint = kinds == {True}
    known = {hook for config in configs.values() for hook in config.get("metadata", {}).get("set_reads", ())}
    for folder, ends in members.items():
        read, written = [parse_hook(hook) for hook in ends.reads], [parse_hook(hook) for hook in ends.writes]
        if len(read) > 1 or read[0][1] not in _READ or {kind for _, kind in written} != {"mlp_out"}:
            raise ValueError(
                f"{folder} of set {name!r} reads {', '.join(ends.reads)} and writes {', '.join(ends.writes)}; expected what a set "
                "replaces: the input of one MLP read (blocks.L.mlp.hook_in, .ln2.hook_normalized or .hook_resid_mid), outputs of MLPs "
                "written (blocks.L.hook_mlp_out)"
            )
        if early := [hook for hook in ends.writes if parse_hook(hook)[0] < read[0][0]]:
            raise ValueError(
                f"{folder} of set {name!r} writes {early[0]}, which comes before {ends.reads[0]} that it reads"
            )
    writes = sorted({hook for ends in members.values() for hook in ends.writes}, key=parse_hook)
    reads = sorted({hook for ends in members.values() for hook in ends.reads}, key=parse_hook)
    for hook in () if joint else writes:
        if len(both := [folder for folder, ends in members.items() if hook in ends.writes]) > 1:
            raise ValueError(
                f"set {name!r}: {both[0]} and {both[1]} both write {hook}; expected one, or metadata.joint of members whose sum is meant"
            )
    at, kind = _read_by_layer(name, reads, writes), parse_hook(reads[0])[1]
    layers = [parse_hook(hook)[0] for hook in writes]
    needed = {*known, *(at.get(layer) or hook_name(layer, kind) for layer in layers)} if joint else set()
    if missing := sorted(needed - set(reads), key=parse_hook):
        raise ValueError(
            f"set {name!r} is joint, and its member that reads {missing[0]} is missing: what the others write is part of a sum. "
            f"Restore its directory beside {next(iter(members))}"
        )
    return Ends(tuple(reads), tuple(writes))


def _read_by_layer(name: str, reads: Iterable[str], writes: Iterable[str]) -> dict[int, str]:
    """Which hook of each layer is read. Raises ValueError where it is more than one, or where the layer's MLP would stay."""
    at: dict[int, str] = {}
    for hook in reads:
        layer = parse_hook(hook)[0]
        if at.setdefault(layer, hook) != hook:
            raise ValueError(f"set {name!r} reads {at[layer]} and {hook}; expected one hook of each layer")
        if (out := hook_name(layer, "mlp_out")) not in writes:
            raise ValueError(f"set {name!r} reads {hook} and does not write {out}; expected both of each layer read")
    return at


class SetMeasurement(Measurement):
    """The same of sets: in each arm, all MLPs whose outputs are written are replaced."""

    def clean(self, tokens: Int[Tensor, "B L"]) -> tuple[ByHook, Float[Tensor, "B L D"]]:
        with seen(self.model, self.ends.hooks) as values:
            states = last_states(self.model, tokens)
        return values, states

    def arms(
        self, tokens: Int[Tensor, "B L"], places: Places, written: Sequence[ByHook]
    ) -> dict[tuple[str, ...], list[Float[Tensor, "P D"]]]:
        """`written`, of vectors of the clean pass, is not what they write here."""

        def constant(mean_D: Tensor, x_ND: Tensor) -> Tensor:
            return mean_D.expand(len(x_ND), -1)

        means = {parse_hook(hook)[0]: self.means[hook] for hook in self.ends.writes}
        arms: list[Mapping[int, MLP]] = [
            {layer: partial(constant, torch.zeros_like(mean_D)) for layer, mean_D in means.items()},
            {layer: partial(constant, mean_D) for layer, mean_D in means.items()},
            *(stand_ins(subject) for subject in self.subjects),
        ]
        found = []
        for functions in arms:
            with mlps_replaced(self.model, functions, places.usual_BL, self.ends.reads):
                found.append(last_states(self.model, tokens)[places.scored_BL])
        return {self.ends.writes: found}


def stand_ins(subject: Subject) -> dict[int, MLP]:
    """What takes the place of each layer's MLP, for passes that run through all of them in turn."""
    readers: dict[int, list[Dictionary]] = {}
    for member in subject.members:
        readers.setdefault(parse_hook(member.ends.reads[0])[0], []).append(member)
    so_far: ByHook = {}

    def stand_in(layer: int, x_ND: Tensor) -> Tensor:
        nonlocal so_far
        for member in readers.get(layer, []):
            so_far = added(so_far, member.write({member.ends.reads[0]: x_ND}, count=False).rows)
        return so_far.pop(hook_name(layer, "mlp_out"))

    return {layer: partial(stand_in, layer) for layer, _ in map(parse_hook, subject.ends.writes)}


def error_shares(subject: Subject) -> tuple[float, dict[str, float]]:
    """Σ‖y − ŷ‖² ÷ Σ‖y‖², on vectors of the model as it is: in all, and of what is written at each hook."""
    sums = {hook: total(of.table()) for hook, of in subject.sums.items()}
    errors = {hook: float(of["squared_error"]) for hook, of in sums.items()}
    norms = {hook: float(of["squared_norm"]) for hook, of in sums.items()}
    return sum(errors.values()) / sum(norms.values()), {hook: errors[hook] / norms[hook] for hook in sums}

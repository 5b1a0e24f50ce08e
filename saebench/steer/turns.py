"""Latents, turned: interventions in writing, for an address, a recipe, the command line and Python."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, get_args

from saebench.steer.bench import Bench
from saebench.steer.interventions import Intervention, Mode, Positions
from saebench.steer.units import Units

MODES: tuple[Mode, ...] = get_args(Mode)
_TURN = re.compile(r"(?P<latent>[0-9]{1,9})(@(?P<sae>[^@:,]+))?(:(?P<mode>[a-z]+)(:(?P<strength>[^:]+))?)?")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One latent, turned."""

    latent: int
    mode: Mode = "add"
    strength: str = "0.5n"
    """12 (raw), 6x (times its maximum) or 0.5n (of the median norm); a factor for `scale`, nothing for `ablate`"""
    sae: str = ""
    """the name of another SAE in the same folder; none: the one that is open"""

    def __str__(self) -> str:
        return f"{self.latent}{'@' * bool(self.sae)}{self.sae}:{self.mode}" + (
            "" if self.mode == "ablate" else f":{self.strength}"
        )


def parse_turns(text: str) -> tuple[Turn, ...]:
    """Turns written `12:add:0.5n,40:ablate`, those of another SAE `7@NAME:add:2x`. Raises ValueError for anything else."""
    turns = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        match = _TURN.fullmatch(part)
        if match is None or (match["mode"] or "add") not in MODES:
            raise ValueError(
                f"{part!r} is no intervention; expected LATENT:MODE:STRENGTH such as 12:add:0.5n, or LATENT@SAE:MODE:STRENGTH"
            )
        mode: Any = match["mode"] or "add"
        strength = match["strength"] or ("2" if mode == "scale" else "0.5n")
        if mode != "ablate":
            Units(1.0, 1.0, 1.0).raw(strength, mode)  # says what is wrong with it
        turns.append(Turn(latent=int(match["latent"]), mode=mode, strength=strength, sae=match["sae"] or ""))
    return tuple(turns)


def format_turns(turns: tuple[Turn, ...]) -> str:
    return ",".join(map(str, turns))


def interventions(bench: Bench, turns: tuple[Turn, ...], positions: Positions = "all") -> list[Intervention]:
    """What to do to the model of a bench. Raises ValueError for a latent, strength or SAE that is not known, and for an SAE of another model."""
    return [
        dataclasses.replace(
            bench.beside(turn.sae).intervention(turn.latent, turn.strength, turn.mode), positions=positions
        )
        for turn in turns
    ]


def belonging_of(bench: Bench, turns: tuple[Turn, ...]) -> dict[str, str]:
    """`Bench.belonging`, with that of each other SAE that is turned. Raises ValueError as `Bench.beside` does."""
    others = {bench.beside(turn.sae).folder.name for turn in turns} - {bench.folder.name}
    theirs = {
        f"{what} of {name}": value for name in sorted(others) for what, value in bench.beside(name).belonging.items()
    }
    return {**bench.belonging, **theirs}

"""Several processes on one training, started by torchrun: who trains what, and what they agree on between steps.

`World` is who is there. A circle of processes shares each of its SAEs, in ways that are in `shares.py`, and the grid is dealt out to circles.
Of circles of one all meet every `MEET_EVERY` steps, of others in every step.
"""

import datetime
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from saebench.config import differences, flat, to_json
from saebench.harvest.ranks import World
from saebench.train.shares import share_of
from saebench.train.spec import Spec

Over = Literal["grid", "rows", "latents"]
PATIENCE = datetime.timedelta(minutes=10)  # for a process that does not come to where all meet
MEET_EVERY = 10  # steps of a grid that is dealt out
_OWN = ("store", "beside", "out", "device")  # where things lie, which may differ: what lies there is compared


def check_alike(world: World, known: dict[str, Any]) -> None:
    """Raises ValueError naming what differs from one process to another."""
    words = world.gather(flat(known))
    for rank, word in enumerate(words):
        if changed := differences(words[0], word):
            raise ValueError(
                f"process 0 and process {rank} of this {world.work} were told otherwise: {'; '.join(changed)}. "
                "Start all of them with the same options, on the same store"
            )


def told(config: Any) -> dict[str, Any]:
    """The options of a config that are the same on every machine."""
    return {name: value for name, value in to_json(config).items() if name not in _OWN}


class Wish(NamedTuple):
    """What is to be done at the end of a step."""

    save: bool = False
    stop: bool = False
    idle: bool = False
    """no process has an SAE left to train"""


class Ranks:
    """Which SAEs, or what share of them, are this process's, and when all processes save, stop or fail."""

    def __init__(self, world: World, config: Any, specs: Sequence[Spec], partitions: int = 1) -> None:
        """Of rows that are dealt out to so many partitions. Raises ValueError for what so many processes cannot share."""
        self.world = world
        teams = list(dict.fromkeys(spec.team for spec in specs))
        replicas = config.replicas or 1
        dealt = world.size <= len(teams) and not config.share and replicas == 1
        over: Over = config.ranks or ("grid" if dealt else "latents")
        fewest = 2 if replicas > 1 else 1
        size = 1 if over == "grid" else (config.share or max(world.size // replicas, fewest)) * replicas
        """of a circle"""
        if world.size % size:
            product = f" times replicas, {replicas}," if replicas > 1 else ""
            raise ValueError(
                f"share is {size // replicas}{product} in {world.size} processes; expected a number that divides {world.size}: as many share "
                "each SAE, and the grid is dealt out to them"
            )
        circles = world.size // size
        if circles > len(teams):
            fewer = f"{len(teams)} or fewer" if size == 1 else f"{len(teams) * size}, or another --share"
            raise ValueError(
                f"there are {circles} {f'circles of {size} processes' if size > 1 else 'processes'} and {len(teams)} SAEs to deal out; "
                f"expected no more{' processes' * (size == 1)} than SAEs (a cross-layer set is one): start torchrun with "
                f"--nproc-per-node {fewer}{', or use --ranks latents' * (size == 1)}"
            )
        by_rows = size if over == "rows" else replicas
        _check_divides(by_rows, config.batch, partitions)
        by_latents = size // by_rows
        if wrong := [spec.d_sae for spec in specs if spec.d_sae % by_latents]:
            less = wrong[0] // by_latents * by_latents
            raise ValueError(
                f"d_sae is {wrong[0]} in {by_latents} processes; expected a multiple of {by_latents}: each holds as many "
                f"latents. {less} would do, or {less + by_latents}"
            )
        self.share = share_of(world, config.batch, by_rows, by_latents)
        """what each member is a part of"""
        self.meet_every = MEET_EVERY if size == 1 else 1
        self.own = teams[world.rank // size :: circles]
        """the teams whose SAEs are trained here"""

    def agree(self, step: int, wish: Wish, failure: Exception | None = None) -> Wish:
        """What all do at the end of this step. Raises the failure, or a ValueError that says which process's it was."""
        if self.world.size == 1:
            return wish
        if failure is None and step % self.meet_every:
            return Wish()
        words = self.world.gather((wish, None if failure is None else str(failure)))
        if failure is not None:
            raise failure
        for rank, (_, message) in enumerate(words):
            if message is not None:
                raise ValueError(f"process {rank} of this training failed: {message}")
        wishes = [said for said, _ in words]
        return Wish(any(w.save for w in wishes), any(w.stop for w in wishes), all(w.idle for w in wishes))


def _check_divides(by_rows: int, batch: int, partitions: int) -> None:
    """Raises ValueError where processes that share rows would not take as many of a batch, or read as many partitions."""
    if batch % by_rows:
        raise ValueError(
            f"batch is {batch} in {by_rows} processes; expected a multiple of {by_rows}: each takes as many rows"
        )
    if batch % partitions:
        raise ValueError(
            f"partitions is {partitions} and batch {batch}; expected a number that divides the batch: each gives as many rows of it"
        )
    if partitions % by_rows and partitions > 1:
        raise ValueError(
            f"partitions is {partitions} of rows that {by_rows} processes share; expected a multiple of {by_rows}, so that each reads as many, "
            "or 1, which all of them read; a run that was begun has as many as then"
        )

"""What an evaluation is of: dictionaries, and sets of them that stand in together."""

import logging
from pathlib import Path
from typing import NamedTuple

from saebench.evaluate.sets import SETS, ends_of_set, set_of
from saebench.sae import Ends, ends_of, read_config
from saebench.store.source import recorded_store

_log = logging.getLogger(__name__)


class Planned(NamedTuple):
    """What is to have figures: a dictionary, or a set of them that stand in together."""

    folder: Path
    """where they go"""
    members: dict[Path, Ends]
    """the directories of the dictionaries"""
    store: Path
    ends: Ends
    """of all"""
    is_set: bool = False

    @property
    def refits(self) -> bool:
        """Whether it can be refitted: what writes other vectors would have to be told what it is there to predict."""
        return self.ends.tied and not self.is_set


def plan(run: Path, folders: list[Path], store: Path | None) -> list[Planned]:
    """Each dictionary that has figures of its own, and each set; on a store, or on the one that each was trained on."""
    found: list[Planned] = []
    sets: dict[str, list[Planned]] = {}
    for folder in folders:
        settings = read_config(folder)
        ends, own = ends_of(folder, settings), store or recorded_store(folder)
        if own is None:
            raise ValueError(
                f"{folder} does not say what it was trained on; give the store to evaluate it on with --store"
            )
        planned = Planned(folder, {folder: ends}, Path(own), ends)
        name, joint = set_of(folder, settings)
        if name:
            sets.setdefault(name, []).append(planned)
        if not joint:
            found.append(planned)
    for name, members in sets.items():
        if len(stores := sorted({str(member.store) for member in members})) > 1:
            raise ValueError(f"set {name!r} has members of stores {', '.join(stores)}; expected one: give --store")
        ends = {member.folder: member.ends for member in members}
        whole = ends_of_set(name, ends)
        found.append(Planned(run / SETS / name, ends, members[0].store, whole, is_set=True))
    return found


def say_what_is_not_refitted(everything: list[Planned]) -> None:
    """Raises ValueError where nothing can be."""
    names = [str(planned.folder) for planned in everything if not planned.refits]
    if not names:
        return
    why = f"{', '.join(names)}: not an autoencoder, and refitting would tell it what it is there to predict"
    if len(names) == len(everything):
        raise ValueError(f"{why}; expected an SAE or a crosscoder: leave out --refit")
    _log.warning("%s; only its figures as it is", why)

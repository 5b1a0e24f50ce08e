"""Checkpoints of a grid: one safetensors file per SAE, and one small file that makes them count.

`checkpoint.json` is replaced last and names the step; until then the previous set of files is the
one that a resumed run reads. Tensors and JSON only, no pickle.
"""

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saebench.config import differences
from saebench.files import read_json, replacing, write_json
from saebench.harvest.ranks import World
from saebench.sae import read_config
from saebench.store import Cursor
from saebench.train.member import Member
from saebench.train.shares import Share

POINTER = "checkpoint.json"


class Checkpoint:
    """The resumable state of a grid under `folder`; `identity` maps each SAE, also those done, to what decides its training."""

    def __init__(
        self, folder: Path, identity: dict[str, dict[str, Any]], world: World = World(), share: Share = Share()
    ) -> None:
        """Of several processes each writes what it alone holds, and the leading one the pointer, once all have."""
        self.folder, self.identity, self.world, self.share = folder, identity, world, share
        self.ranks: dict[str, Any] = {"processes": world.size}
        if world.size > 1:
            self.ranks["over"] = share.over
        replicas = share.n_rows(1) if share.latents else 1
        if replicas > 1:
            self.ranks["replicas"] = replicas
        if 1 < share.world.size < world.size:
            self.ranks["share"] = share.world.size // replicas

    @property
    def exists(self) -> bool:
        return (self.folder / POINTER).exists()

    def save(self, members: list[Member], step: int, cursors: dict[str, Cursor], seconds: float) -> None:
        """Write all SAEs, then point to them. A full disk is a ValueError; the last checkpoint stays."""
        states = {member.spec.name: member.state() for member in members}
        if self.share.rows and not self.share.rows.leads:
            states = {}  # all hold the same
        self.world.agreed(lambda: self._write(states, step))
        # Of a grid dealt out, each process draws from the streams that its own SAEs need.
        everyones = {hook: cursor for mine in self.world.gather(cursors) for hook, cursor in mine.items()}
        pointer = {"step": step, "cursors": everyones, "seconds": seconds, "identity": self.identity}
        if self.world.size > 1:
            pointer["ranks"] = self.ranks
        self.world.agreed(lambda: self._point(pointer) if self.world.leads else None)
        for name in states:
            for old in self._file(name, step).parent.glob(f"step-?????????{self._part}.safetensors"):
                if old != self._file(name, step):
                    old.unlink()

    def _write(self, states: dict[str, dict[str, Tensor]], step: int) -> None:
        with self._whole_before(step):
            for name, state in states.items():
                with replacing(self._file(name, step)) as temporary:
                    save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, temporary)

    def _point(self, pointer: dict[str, Any]) -> None:
        with self._whole_before(pointer["step"]):
            write_json(self.folder / POINTER, pointer)

    def _whole_before(self, step: int) -> AbstractContextManager[None]:
        return full_disk_is_a_value_error(f"the checkpoint of step {step} in {self.folder}")

    def restore(self, members: list[Member]) -> tuple[int, dict[str, Cursor], float]:
        """(steps done, position in each hook's stream, seconds spent); zeros when there is no checkpoint.

        Raises ValueError, naming what differs, when the checkpoint is of another grid.
        """
        path = self.folder / POINTER
        if not self.exists:
            return 0, {}, 0.0
        pointer = read_json(path)
        for name in sorted({*pointer["identity"], *self.identity}):
            if changed := differences(pointer["identity"].get(name, {}), self.identity.get(name, {})):
                raise ValueError(
                    f"{self.folder} holds a checkpoint of other settings: {name}: {'; '.join(changed)}. "
                    f"Use the same settings to continue it, delete {path} to start again, or choose another --out"
                )
        if changed := differences(pointer.get("ranks", {"processes": 1}), self.ranks):
            raise ValueError(
                f"{self.folder} holds a checkpoint of another number of processes or another --ranks: {'; '.join(changed)}. "
                f"Start as many, with the same --ranks, to continue it, or delete {path} to start again"
            )
        for member in members:
            file = self._file(member.spec.name, pointer["step"])
            try:
                member.restore(load_file(file))
            except (OSError, SafetensorError, KeyError) as error:
                raise ValueError(f"checkpoint {file} cannot be read ({error}); delete {path} to start again") from error
        cursors = {hook: Cursor(*place) for hook, place in pointer["cursors"].items()}
        return pointer["step"], cursors, pointer["seconds"]

    def latest(self, member: Member) -> Path:
        """The file of an SAE that the pointer counts."""
        return self._file(member.spec.name, read_json(self.folder / POINTER)["step"])

    def remove(self) -> None:
        """Once all the SAEs are saved, their checkpoints have served."""
        path = self.folder / POINTER
        if path.exists() and read_json(path)["identity"] == self.identity:
            for name in self.identity:
                shutil.rmtree(self._file(name, 0).parent, ignore_errors=True)
            path.unlink()

    def _file(self, name: str, step: int) -> Path:
        return self.folder / name / "checkpoint" / f"step-{step:09d}{self._part}.safetensors"

    @property
    def _part(self) -> str:
        """In the name of a file that has a part of an SAE, which part."""
        parts = self.share.latents
        return f"-{parts.rank + 1}-of-{parts.size}" if parts else ""


def begun_as(folder: Path) -> dict[str, dict[str, Any]]:
    """What decides the training of each SAE under `folder` that is done, or in its checkpoint."""
    done = {path.parent.name: read_config(path.parent).get("metadata", {}) for path in folder.glob("*/cfg.json")}
    begun = {
        name: known["saebench"]["identity"] for name, known in done.items() if "saebench" in known
    }  # not from elsewhere
    path = folder / POINTER
    return begun | (read_json(path)["identity"] if path.exists() else {})


@contextmanager
def full_disk_is_a_value_error(what: str) -> Iterator[None]:
    """Turn an error of writing into one that says what is safe."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"writing {what} failed: {error}. The one before it is whole; "
            "free some space and run the same command again to continue from there"
        ) from error

"""Training on more text than the disk holds: a harvester makes windows of shards while those before are trained on.

Epoch 0 of the stream is the head, an ordinary store that stays; epoch k is window k, which is deleted once a
checkpoint lies beyond it. The head and two windows are on disk at most: one that is trained on, one being made.
"""

import contextlib
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

from saebench.files import locked
from saebench.harvest.window import ROLLING, delete, delete_windows, folder_of, window_manifest
from saebench.models import choose_device
from saebench.store import Cursor, Damaged, Shard, Store, open_store
from saebench.train.harvester import Harvester

log = logging.getLogger(__name__)
T = TypeVar("T")
MARGIN = 1.2  # batches that a window must have, since how many rows of it are kept is an estimate
FEW = 10_000  # held-out rows, fewer than which leave the figures of an evaluation wide apart
_PATIENCE = 30.0  # seconds for a harvester to be gone whose trainer has died
_GLANCE = 0.2  # seconds between looks at whether the user asked to stop


class Stopped(Exception):
    """Ends a wait for a window: the user asked to stop, or the run is over."""


def window_shards(head: Store, rolling: int, batch: int) -> int | None:
    """Shards of a window behind a head, at most `rolling` with it; None behind one that holds all of its text.

    Raises ValueError where the head leaves no room for two windows, or a window has too few rows for a batch.
    """
    if head.manifest["exhausted"]:
        log.warning("%s holds all of its text: there are no windows to follow, it is trained on as it is", head.folder)
        return None
    there = len(head.of_split("train"))
    if rolling < there + 2:
        raise ValueError(
            f"rolling is {rolling} and {head.folder} has {there} training shards, which stay; expected at least "
            f"{there + 2}, so that two windows of a shard fit behind it"
        )
    shards = (rolling - there) // 2
    if (kept := _kept_rows(head, shards)) < MARGIN * batch:  # a batch may then need three windows at once
        raise ValueError(
            f"batch is {batch} and a window of {shards} shards has about {kept:.0f} rows to train on; expected at least "
            f"{MARGIN} batches in a window: use a larger --rolling, or a smaller --batch"
        )
    if (held_out := head.rows("validation")) < FEW:
        log.warning(
            "%s has %s held-out rows, those of its own stretch of text: figures on so few are not to be trusted; a larger "
            "--rolling, or -- --validation-fraction, gives more", head.folder, f"{held_out:,}",
        )  # fmt: skip
    return shards


def rows_offered(store: Store, window: int | None, cursors: Iterable[Cursor]) -> int:
    """Kept rows of a store, and of the windows behind it up to these cursors: those of the text's first pass alone."""
    kept, newest = store.rows("train", kept=True), max((cursor.epoch for cursor in cursors), default=0)
    if window is None or newest == 0:
        return kept
    manifest = window_manifest(store, newest, window)
    if manifest and manifest["complete"]:
        return manifest["after"]["fresh"]
    return int(kept + newest * _kept_rows(store, window))  # as if the text had not ended


class Whole:
    """The same interface for an ordinary store, whose epochs all have the same shards."""

    def __init__(self, store: Store) -> None:
        self._shards = store.of_split("train")

    def __enter__(self) -> "Whole":
        return self

    def __exit__(self, *_: object) -> None: ...

    def shards(self, epoch: int) -> list[Shard]:
        return self._shards

    def served(self, batches: Iterator[T]) -> Iterator[T]:
        return batches

    def left(self, cursors: Iterable[Cursor]) -> bool:
        return False

    def release(self, cursors: Iterable[Cursor]) -> None: ...

    def delete(self) -> None: ...


class Rolling:
    """The shards of every epoch of a training on `rows` rows; use it as a context, which holds the head and ends the harvester.

    Windows have `shards` shards. `stopped` tells whether the user asked to stop, `device` where the harvester's model
    runs. Raises ValueError where another process has the head, or the disk no room for windows.
    """

    def __init__(
        self, head: Store, shards: int, rows: int, cursors: Iterable[Cursor], stopped: Callable[[], bool],
        *, device: str | None = None, trust_remote_code: bool = False,
    ) -> None:  # fmt: skip
        self.head = head
        self.stall = 0.0
        """seconds for which training waited for windows"""
        self._size = shards
        self._stopped = stopped
        self._options = [f"--device={device}"] * (device is not None) + ["--trust-remote-code"] * trust_remote_code
        self._first = _oldest(cursors)
        """the oldest window that is needed; the one after it may be there, too"""
        self._asked = self._first - 1
        # An estimate, so that the last windows are not made in vain; one that is waited for is made in any case.
        self._wanted = math.ceil((rows - head.rows("train", kept=True)) / _kept_rows(head, shards))
        self._waiting = 0
        self._drawing = 0.0
        """when the draw began that is under way"""
        self._held = contextlib.ExitStack()
        # On one CPU, two processes with a thread for each core are slower than with half of them each (measured: 1.5 times).
        self._threads = torch.get_num_threads()
        shared = self._wanted > 0 and choose_device(device) == "cpu"
        self._share = max(self._threads // 2, 1) if shared else self._threads

    def __enter__(self) -> "Rolling":
        folder = self.head.folder
        with contextlib.ExitStack() as held:
            held.enter_context(locked(folder, other="--store"))
            # The harvester inherits this one; that of a run that was killed may be about to end.
            lock = held.enter_context(locked(folder / ROLLING, other="--store", patience=_PATIENCE))
            self._harvester = Harvester(
                folder, self._size, self._clear(), lock=lock, threads=self._share, options=self._options
            )
            self._check_disk()
            held.callback(torch.set_num_threads, self._threads)
            torch.set_num_threads(self._share)
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._held.close()

    def shards(self, epoch: int) -> list[Shard]:
        """Those of the head, or of a window once it is whole.

        Raises Stopped when the user asked to stop while it was waited for, and ValueError when the harvester failed.
        """
        harvester = self._harvester
        with harvester.changed:
            self._ask()
            self._waiting += 1
            try:
                while epoch and epoch not in harvester.whole:
                    # Beyond the estimate only what training itself waits for, not what is read ahead.
                    if self._drawing and time.perf_counter() - self._drawing > _GLANCE:
                        self._wanted = max(self._wanted, epoch)
                        self._ask()
                    if harvester.failure:
                        raise ValueError(harvester.failure)
                    if self._stopped():
                        raise Stopped
                    harvester.changed.wait(_GLANCE)
            finally:
                self._waiting -= 1
        return (open_store(folder_of(self.head.folder, epoch)) if epoch else self.head).of_split("train")

    def served(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches, drawn for training itself: the time counts as waiting where a window is waited for.

        A window that is found damaged is deleted, to be made again by the next run.
        """
        while True:
            yield self._drawn(batches)

    def _drawn(self, batches: Iterator[T]) -> T:
        began, waiting = time.perf_counter(), self._waiting
        self._drawing = began
        try:
            batch = next(batches)
        except Damaged as error:
            if (window := error.path.parent).parent != self.head.folder / ROLLING:
                raise
            delete(window)
            remedy = "The window is deleted: run the same command again, to have it made anew"
            raise Damaged(error.path, f"{error}. {remedy}") from error
        finally:
            self._drawing = 0.0
        self.stall += time.perf_counter() - began if waiting else 0.0
        return batch

    def left(self, cursors: Iterable[Cursor]) -> bool:
        """Whether a window would no longer be needed, were there a checkpoint of these cursors."""
        return _oldest(cursors) > self._first

    def release(self, cursors: Iterable[Cursor]) -> None:
        """Delete the windows before a checkpoint's cursors, and have the next ones made."""
        oldest = _oldest(cursors)
        for number in range(self._first, oldest):
            delete(folder_of(self.head.folder, number))
        with self._harvester.changed:
            self._first = oldest
            self._ask()

    def delete(self) -> None:
        """Leave the head as the ordinary store that it was."""
        self._end()
        delete_windows(self.head.folder)

    def _end(self) -> None:
        """End the harvester, and every wait for it."""
        with self._harvester.changed:
            self._stopped = lambda: True
            self._harvester.changed.notify_all()
        if self._harvester.end():
            log.info("training waited %.1f s for the harvester", self.stall)

    def _ask(self) -> None:
        """Ask for the windows that are wanted and may be there."""
        while not self._stopped() and self._asked < min(self._first + 1, self._wanted):
            self._asked += 1
            self._harvester.ask(self._asked)

    # ------------------------------------------------------------------------------------- the disk

    def _clear(self) -> set[int]:
        """Delete all but the windows that this run needs next; they can be made again. Returns those that are whole."""
        whole = set()
        needed = {folder_of(self.head.folder, number): number for number in (self._first, self._first + 1)}
        for folder in (self.head.folder / ROLLING).glob("[0-9]*"):
            manifest = window_manifest(self.head, needed[folder], self._size) if folder in needed else None
            try:
                if manifest:
                    for entry in manifest["shards"]:
                        Shard(folder, entry, manifest).check()
            except Damaged as error:
                log.warning("%s; the window is made again", error)
                manifest = None
            if manifest is None:
                delete(folder)
            elif manifest["complete"]:
                whole.add(needed[folder])
        return whole

    def _check_disk(self) -> None:
        entries = [entry for entry in self.head.manifest["shards"] if entry["split"] == "train"]
        row_bytes = sum(entry["bytes"] for entry in entries) / sum(entry["rows"] for entry in entries)
        there = sum(path.stat().st_size for path in (self.head.folder / ROLLING).rglob("*.h5"))
        windows = max(min(self._wanted - self._first + 1, 2), 0)
        need = (windows * _rows(self.head, self._size) * row_bytes - there) / 1e6
        free = shutil.disk_usage(self.head.folder).free / 1e6
        if need > free:
            raise ValueError(
                f"windows of {self._size} shards behind {self.head.folder} need about {need:,.1f} MB and the disk has "
                f"{free:,.1f} MB free: use a smaller --rolling, or another --store"
            )


def _rows(head: Store, shards: int) -> int:
    """Of a window."""
    made = head.manifest["identity"]
    return shards * made["shard_contexts"] * made["context"]


def _kept_rows(head: Store, shards: int) -> float:
    """Of a window about, if as many are kept as in its head."""
    return _rows(head, shards) * head.rows("train", kept=True) / head.rows("train")


def _oldest(cursors: Iterable[Cursor]) -> int:
    """The oldest window that these cursors need."""
    return max(min((cursor.epoch for cursor in cursors), default=0), 1)


def source_of(
    store: Store, window: int | None, rows: int, cursors: Iterable[Cursor], stopped: Callable[[], bool], **made: Any
) -> Whole | Rolling:
    """Where a training's shards come from: the store, or windows of so many shards behind it (`made` as `Rolling` takes it)."""
    return Whole(store) if window is None else Rolling(store, window, rows, cursors, stopped, **made)

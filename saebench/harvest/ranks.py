"""Several processes on one harvest or training, started by torchrun: what they tell one another.

Words are exchanged over gloo, and so are tensors of a CPU; those of GPUs go over NCCL. Whatever is large and lies on the disk that all
share goes from each process to it.
"""

import contextlib
import datetime
import importlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from saebench.models import ALL

T = TypeVar("T")
# Until all are there, and for a rank of a harvest at its end. One that died is noticed at once, by its closed connection.
_PATIENCE = datetime.timedelta(days=7)
_BEAT = 0.5  # seconds between a process's signs of life
_QUIET = 2.5  # seconds without one, after which it is taken for gone


class Watch:
    """Signs of life of all processes, in the store at which they met; so that one that is waited for in vain can be named."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store.clone(), rank, size
        self.met = [0, 0]
        """how often this process came to where all meet, and to where those of its circle do"""
        self._who, self._beats, self._over = f"{socket.gethostname()}, pid {os.getpid()}", 0, threading.Event()
        self._sign()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._over.set()
        self._thread.join()

    def missing(self, ranks: range, circle: bool = False) -> str:
        """Whom the others of these wait for: those that give no more signs of life, or else those that have met the others least often.

        All repeat what the first of them finds, who is gone itself when the last one looks.
        """
        try:
            before = self._signs()
            time.sleep(_QUIET)
            after = self._signs()
            silent = [rank for rank in ranks if before[rank] == after[rank] and rank != self._rank]
            met = {rank: int(after[rank][1 + circle]) for rank in ranks}
            found = silent or [rank for rank in ranks if met[rank] == min(met.values()) < self.met[circle]]
            first = self._store.compare_set("saebench/missing", "", " ".join(map(str, found))).decode()
            named = [int(rank) for rank in first.split()]
        except RuntimeError:
            return "process 0 or the machine at which all met"
        return " and ".join(f"process {rank} ({after[rank][3]})" for rank in named) or "another process"

    def _run(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store ended with the process that held it
            while not self._over.wait(_BEAT):
                self._sign()

    def _sign(self) -> None:
        self._beats += 1
        self._store.set(f"saebench/{self._rank}", ";".join(map(str, (self._beats, *self.met, self._who))))

    def _signs(self) -> list[list[str]]:
        return [self._store.get(f"saebench/{rank}").decode().split(";") for rank in range(self._size)]


@dataclass(frozen=True)
class World:
    """Which of how many processes this is."""

    rank: int = 0
    size: int = 1
    work: str = "harvest"
    safe: str = "whole shards are"
    """what a process that ends early leaves"""
    watch: Watch | None = None
    patience: datetime.timedelta = _PATIENCE
    first: int = 0
    """of a circle, which of all processes its first one is"""
    stride: int = 1
    """and how far each of them is from the next"""
    group: Any = None
    """that of torch.distributed; of all processes none is needed"""

    def circle(self, size: int, stride: int = 1) -> "World":
        """Those, of circles of so many processes, each so far from the next, among which this one is. All have to ask for theirs."""
        if size == self.size:
            return self
        place, group = self.rank // stride % size, None
        if size > 1:
            firsts = [rank for rank in range(self.size) if rank // stride % size == 0]
            circles = [list(range(first, first + size * stride, stride)) for first in firsts]
            group, _ = dist.new_subgroups_by_enumeration(circles, timeout=self.patience)
        return replace(self, rank=place, size=size, first=self.rank - place * stride, stride=stride, group=group)

    @property
    def processes(self) -> range:
        """Which of all they are."""
        return range(self.first, self.first + self.size * self.stride, self.stride)

    @property
    def leads(self) -> bool:
        """Whether this one holds the lock, writes the manifest and shows progress."""
        return self.rank == 0

    @property
    def neighbours(self) -> int:
        """Processes on this machine, with this one."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.size > 1 else 1

    def device(self, asked: str | None) -> str | None:
        """The device asked for; of several GPUs, the one that is this process's own. Raises ValueError where processes would share all."""
        if asked == ALL and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"device is 'all' in {os.environ['LOCAL_WORLD_SIZE']} processes of one machine, each of which would take all of its GPUs; "
                "expected one process a machine: torchrun --nproc-per-node 1"
            )
        if self.size == 1 or asked not in (None, "cuda") or not torch.cuda.is_available():
            return asked
        return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"

    @contextlib.contextmanager
    def meeting(self) -> Iterator[None]:
        """Around what all processes do together. Raises ValueError naming the one that is no longer there, or does not come."""
        circle = self.group is not None
        if self.watch is not None:
            self.watch.met[circle] += 1
        try:
            yield
        except RuntimeError as error:
            who = self.watch.missing(self.processes, circle) if self.watch is not None else "another process"
            raise ValueError(
                f"{who} of this {self.work} has ended early or stands still; see what it printed. {self.safe.capitalize()} safe: "
                "run the same command again to continue"
            ) from error

    def gather(self, word: Any) -> list[Any]:
        """The words of all, in order, once each has come here. Raises ValueError when one is no longer there."""
        words: list[Any] = [word]
        if self.size > 1:
            words = [None] * self.size
            with self.meeting():
                dist.all_gather_object(words, word, group=self.group)
        return words

    def agreed(self, action: Callable[[], T]) -> T:
        """What `action` returns here, once all are through theirs. Raises ValueError when one of them failed."""
        result, error = None, None
        try:
            result = action()
        except (ValueError, OSError) as failure:
            error = failure
        messages = self.gather(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, message in zip(self.processes, messages, strict=True):
            if message is not None:
                raise ValueError(f"process {rank} of this {self.work} failed: {message}")
        return result  # type: ignore[return-value]


@contextlib.contextmanager
def joined(
    work: str = "harvest", safe: str = "whole shards are", patience: datetime.timedelta = _PATIENCE
) -> Iterator[World]:
    """The processes that torchrun started, or this one alone; they wait for each other as long as `patience`."""
    if not dist.is_torchelastic_launched():
        yield World(work=work)
        return
    # Its functions have the group of their import as a default, which would outlive its end here: threads that are
    # still running as a process exits abort it now and then.
    importlib.import_module("torch.distributed.nn.functional")
    store, rank, size = next(dist.rendezvous("env://", timeout=_PATIENCE))  # type: ignore[operator]
    # NCCL has no two processes on one GPU.
    own_gpu = torch.cuda.is_available() and int(os.environ.get("LOCAL_WORLD_SIZE", size)) <= torch.cuda.device_count()
    backend = "cpu:gloo,cuda:nccl" if own_gpu else "gloo"
    store = dist.PrefixStore(work, store)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    watch = Watch(store, rank, size)
    world = World(rank, size, work, safe, watch, patience)
    try:
        world.gather("here")  # each has given a first sign
        yield world
    finally:
        watch.end()
        dist.destroy_process_group()

"""Several processes on one harvest, started by torchrun: what they tell one another.

Only a few words are exchanged, over gloo: rows go from each process to its own shards on the disk that all share.
"""

import contextlib
import datetime
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from saebench.models import ALL

T = TypeVar("T")
# A rank waits for the others at the end. One that died is noticed at once, by its closed connection.
_PATIENCE = datetime.timedelta(days=7)


@dataclass(frozen=True)
class World:
    """Which of how many processes this is."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this one holds the lock, writes the manifest and shows progress."""
        return self.rank == 0

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

    def gather(self, word: Any) -> list[Any]:
        """The words of all, in order, once each has come here. Raises ValueError when one is no longer there."""
        words: list[Any] = [word]
        if self.size > 1:
            words = [None] * self.size
            try:
                dist.all_gather_object(words, word)
            except RuntimeError as error:
                raise ValueError(
                    "another process of this harvest has ended early, with the message that it printed; whole shards are safe: "
                    "run the same command again to continue"
                ) from error
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
        for rank, message in enumerate(messages):
            if message is not None:
                raise ValueError(f"process {rank} of this harvest failed: {message}")
        return result  # type: ignore[return-value]


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """The processes that torchrun started, or this one alone."""
    if not dist.is_torchelastic_launched():
        yield World()
        return
    # Its functions have the group of their import as a default, which would outlive its end here: threads that are
    # still running as a process exits abort it now and then.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()

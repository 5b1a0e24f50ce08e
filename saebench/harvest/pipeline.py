"""The model runs on while what it gave is written.

A batch's rows land in one of a few sets of buffers that go round between the model and a thread that
writes. The model takes the next free set, and waits only when the writer is all of them behind; so memory is
those sets, whatever the length of the harvest.
"""

import queue
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saebench.harvest.plan import Plan
from saebench.store import StoreWriter
from saebench.store.coding import decode, encode
from saebench.store.schema import PROVENANCE, Moments, StoreDtype

SETS = 3  # one being filled, one being written, one between them


class Landing:
    """Host memory for the rows of one batch at each hook, in the store's dtype.

    Where they come from a GPU it is pinned, and their moments are computed there.
    """

    def __init__(self, dtype: StoreDtype, stream: "torch.cuda.Stream | None") -> None:
        self.dtype: StoreDtype = dtype
        self.stream = stream
        self.buffers: dict[str, Tensor] = {}
        self.filled: dict[str, Tensor] = {}
        self.copied: list[Any] = []
        """per hook of a GPU, the event after its copies and the tensors that they are copied from, to keep those alive"""
        self._keep: Tensor | None = None
        self._moments: dict[str, Tensor] = {}

    def begin(self, keep: Tensor) -> None:
        """A batch comes next, the rows of which that are kept are these, bool `[B·L]`, on the model's device."""
        self._keep = keep

    def take(self, hook: str, vectors: Tensor) -> None:
        """Copy vectors `[B, L, D]`, encoded where they are, without waiting for a GPU to be through."""
        rows = encode(vectors.flatten(0, 1), self.dtype)
        self.filled[hook] = self._room(self.buffers, hook, rows)
        if self.stream is None:
            self.filled[hook].copy_(rows)
            return
        if rows.untyped_storage().data_ptr() == vectors.untyped_storage().data_ptr():
            rows = rows.clone()  # later layers may write over the model's own tensor
        assert self._keep is not None
        moments = Moments.packed(decode(rows), self._keep)
        self.stream.wait_stream(torch.cuda.current_stream(rows.device))
        with torch.cuda.stream(self.stream):
            self.filled[hook].copy_(rows, non_blocking=True)
            self._room(self._moments, hook, moments).copy_(moments, non_blocking=True)
            self.copied.append((self.stream.record_event(), rows, moments))

    def _room(self, buffers: dict[str, Tensor], hook: str, like: Tensor) -> Tensor:
        if hook not in buffers or len(buffers[hook]) < len(like):
            buffers[hook] = torch.empty(like.shape, dtype=like.dtype, pin_memory=self.stream is not None)
        return buffers[hook][: len(like)]

    def arrived(self) -> tuple[dict[str, Tensor], dict[str, Moments] | None]:
        """Per hook the rows `[n, width]`, once they are here, and their moments where a GPU has computed them."""
        for event, *_ in self.copied:
            event.synchronize()
        self.copied.clear()
        if self.stream is None:
            return self.filled, None
        return self.filled, {hook: Moments.unpacked(values.numpy()) for hook, values in self._moments.items()}


class _Abandoned(Exception):
    """Ends the writer in the middle of a shard: the model's side has failed, or was told to stop at once."""


class BackgroundWriter:
    """Writes shards in a thread; use it as a context, whose end waits until everything given is on disk.

    The first error of the thread is raised in the model's thread, by the next call or at the end of the context.
    When the context ends by an exception, the shard in progress leaves no trace.
    """

    def __init__(self, store: StoreWriter, batch: int, device: torch.device, written: Callable[[int], None]) -> None:
        self.stall = 0.0
        """seconds for which the model waited"""
        self._store = store
        self._batch = batch
        self._written = written
        self._free: queue.SimpleQueue[Landing | None] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[Plan | Landing | type[_Abandoned] | None] = queue.SimpleQueue()
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        for _ in range(SETS):
            self._free.put(Landing(store.dtype, stream))
        self._pool = ThreadPoolExecutor(1)
        _compute_in_one_thread(self._pool)
        self._future: Future[None] = self._pool.submit(self._write)

    def begin(self, plan: Plan) -> None:
        """What is put from now on are the batches of this shard, in order."""
        self._full.put(plan)

    def landing(self) -> Landing:
        """A free set of buffers, as soon as there is one."""
        started = time.perf_counter()
        found = self._free.get()
        self.stall += time.perf_counter() - started
        if found is None:
            self._future.result()
            raise AssertionError("the writer ended before it was told to")
        return found

    def put(self, landing: Landing) -> None:
        self._full.put(landing)

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._full.put(None if error is None else _Abandoned)
        started = time.perf_counter()
        self._pool.shutdown()
        if error is None:
            self.stall += time.perf_counter() - started
            self._future.result()

    def _write(self) -> None:
        try:
            while isinstance(plan := self._full.get(), Plan):
                self._write_shard(plan)
        finally:
            self._free.put(None)

    def _write_shard(self, plan: Plan) -> None:
        contexts = plan.contexts
        length = len(contexts[0].tokens)
        with self._store.shard(len(contexts) * length, plan.number) as (shard, documents, attributes):
            for start, landing in zip(range(0, len(contexts), self._batch), self._landings(), strict=False):
                part = contexts[start : start + self._batch]
                provenance = {name: np.concatenate([getattr(context, name) for context in part]) for name in PROVENANCE}
                shard.write(provenance, *landing.arrived())
                self._free.put(landing)
                self._written(len(part) * length)
            for context in contexts:
                documents |= context.documents
            attributes |= {"split": plan.split, "context": length, "cursor": plan.cursor}

    def _landings(self) -> Iterator[Landing]:
        while isinstance(landing := self._full.get(), Landing):
            yield landing
        raise _Abandoned


def _compute_in_one_thread(pool: ThreadPoolExecutor) -> None:
    """What the pool's one thread computes takes no core from the model but its own."""
    threads = torch.get_num_threads()
    pool.submit(torch.set_num_threads, 1).result()
    torch.set_num_threads(threads)  # the default of threads to come, which the call before has changed as well

"""What is made ahead of its use, and the way of a batch's rows to the device that uses them.

To a CPU they need none. To a GPU they travel as the store has them, from a few sets of pinned memory that go round, on
a stream of their own, beside what is computed on the batch before; nobody waits but for a set to be free again.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
SETS = 3  # one being gathered into, one on its way, one between them


class ToHost:
    """Rows stay where they are gathered, a new tensor each time."""

    pinned = False

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def sent(self, rows: Tensor) -> Tensor:
        return rows


class ToGPU:
    """The same to a GPU: what is gathered into `room` is `sent` and may be overwritten by the third room after it."""

    pinned = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._sets: deque[tuple[Tensor, Any]] = deque()

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if len(self._sets) < SETS:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        rows, copied = self._sets.popleft()
        copied.synchronize()
        return rows if rows.shape == shape and rows.dtype == dtype else torch.empty(shape, dtype=dtype, pin_memory=True)

    def sent(self, rows: Tensor) -> Tensor:
        with torch.cuda.stream(self._stream):
            there = rows.to(self._device, non_blocking=True)
            copied = self._stream.record_event()
        now = torch.cuda.current_stream(self._device)
        now.wait_event(copied)
        there.record_stream(now)
        self._sets.append((rows, copied))
        return there


def feed(device: torch.device | str) -> ToHost | ToGPU:
    """How rows come to a device."""
    device = torch.device(device)
    return ToGPU(device) if device.type == "cuda" else ToHost()


def sent(small: Tensor, device: torch.device) -> Tensor:
    """A copy on a device of what is small; a GPU is not waited for."""
    return small.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else small.to(device)


def prefetched(items: Iterator[Item]) -> Iterator[Item]:
    """The same items; the next one is made in a thread while the last one is used."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, items, end)
        while (item := future.result()) is not end:
            future = pool.submit(next, items, end)
            yield item  # type: ignore[misc]

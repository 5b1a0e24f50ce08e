"""Time of a run: what it took, and when a checkpoint is due."""

import contextlib
import time
from collections.abc import Iterator

CHECKPOINT_SECONDS = 60.0  # at least, and so many that checkpoints take no more than this share of the time:
CHECKPOINT_SHARE = 0.05


class Clock:
    """Seconds of a run, across interruptions, and since its last checkpoint; rows a second since the last log line."""

    def __init__(self, before: float, rows: int) -> None:
        self.before = before
        self.started = self.last_save = self.last_line = time.monotonic()
        self.save_took = 0.0
        self.rows = rows

    @property
    def total(self) -> float:
        return self.before + time.monotonic() - self.started

    @property
    def save_is_due(self) -> bool:
        return time.monotonic() - self.last_save > max(CHECKPOINT_SECONDS, self.save_took / CHECKPOINT_SHARE)

    def rate(self, rows: int) -> float:
        """Rows a second since this was last asked, `rows` counted from the start of the run."""
        now, before, earlier = time.monotonic(), self.rows, self.last_line
        self.rows, self.last_line = rows, now
        return (rows - before) / (now - earlier)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.last_save = time.monotonic()
        self.save_took = self.last_save - began

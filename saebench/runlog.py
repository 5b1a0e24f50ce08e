"""What a long run leaves behind: progress on the terminal, metrics in JSON lines, provenance."""

import contextlib
import json
import logging
import os
import platform
import signal
import sys
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from saebench import __version__
from saebench.files import write_text

log = logging.getLogger(__name__)


def progress(
    total: int, description: str, unit: str = "tok", initial: int = 0, *, shown: bool = True, delay: float = 0.0
) -> "tqdm[Any]":
    """A bar on stderr with rate and time left, once `delay` seconds are over; where stderr is not a terminal a note now and then.

    Every 20 s, or every SAEBENCH_PROGRESS_SECONDS of the environment, for a program that reads them.
    """
    interval = 0.2 if sys.stderr.isatty() else float(os.environ.get("SAEBENCH_PROGRESS_SECONDS", "20"))
    return tqdm(
        total=total, initial=initial, desc=description, unit=unit, unit_scale=True, mininterval=interval,
        maxinterval=interval, dynamic_ncols=sys.stderr.isatty(), smoothing=0.1, disable=not shown, delay=delay,
    )  # fmt: skip


class Interrupt:
    """Whether the user asked to stop. The first Ctrl-C asks, the second stops at once."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self, *_: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        log.warning("stopping as soon as the work so far is safe; Ctrl-C again to stop at once")


@contextlib.contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Catch SIGINT and SIGTERM for the block, so that a loop can end at a good place.

    Python delivers signals to the main thread only; elsewhere nothing is caught.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class MetricsLog:
    """One JSON object per line. On resume, lines from `step` on are dropped: they will come again."""

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if _step(line) <= step] if step else []
        write_text(path, "".join(line + "\n" for line in kept))

    def write(self, **values: Any) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(values) + "\n")


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # the line that kill -9 cut short


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `MetricsLog`. Raises ValueError naming the first that is none, but for a last one that was cut short."""
    lines: list[dict[str, Any]] = []
    written = path.read_text(errors="replace").splitlines()
    for number, line in enumerate(written, 1):
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            found = None
        if isinstance(found, dict):
            lines.append(found)
        elif number < len(written):
            raise ValueError(f"line {number} of {path} is no line of metrics: delete it, or the file")
    return lines


def provenance() -> dict[str, Any]:
    """Versions and hardware behind a result; no time stamps, host names or paths."""
    packages = ("torch", "transformer-lens", "transformers", "datasets", "h5py", "numpy")
    return {
        "saebench": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} CPU threads",
    }

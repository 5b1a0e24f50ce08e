"""The process that makes a rolling run's windows, as the trainer sees it: asked by the line, and missed when it dies."""

import contextlib
import gc
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch

from saebench.harvest.window import ROLLING

log = logging.getLogger(__name__)


class Harvester:
    """Makes windows of `shards` shards behind `head`, those of `whole` apart; it starts with the first that it is asked for.

    `lock` is the lock of the windows' folder, which the process inherits, so that it is held for as long as either
    lives; `threads` are the CPU's for it, and `options` those of `python -m saebench.harvest.window`.
    """

    def __init__(
        self, head: Path, shards: int, whole: set[int], *, lock: IO[str], threads: int, options: Sequence[str] = ()
    ) -> None:
        self.whole = whole
        """numbers of the windows that can be read"""
        self.failure: str | None = None
        """what it ended of"""
        self.changed = threading.Condition()
        """guards the two, and is notified of either; held by who asks"""
        self._head, self._shards, self._lock, self._threads = head, shards, lock, threads
        self._command = [sys.executable, "-P", "-m", "saebench.harvest.window", str(head), str(shards), *options]
        self._log = head / ROLLING / "harvester.log"
        self._process: subprocess.Popen[str] | None = None
        self._passes = 0

    def ask(self, number: int) -> None:
        """Have a window made, unless it is whole. That it cannot be is told by `failure`."""
        if number in self.whole:
            return
        if self._process is None:
            self._process = self._start()
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # its end is told by the thread that reads
            self._process.stdin.write(f"{number}\n")
            self._process.stdin.flush()

    def end(self) -> bool:
        """End the process; returns whether there was one."""
        if self._process is None:
            return False
        self._process.kill()  # whole shards are safe, and the one in progress is worth nothing now
        self._reader.join()
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process = None
        return True

    def _start(self) -> "subprocess.Popen[str]":
        gc.collect()  # of a head that was harvested in this process
        torch.cuda.empty_cache()
        known = {"PYTHONPATH": os.pathsep.join(map(str, sys.path)), "OMP_NUM_THREADS": str(self._threads)}
        answers, end = os.pipe()  # not its output, to which any library may print
        with open(self._log, "w") as output:
            process = subprocess.Popen(
                [*self._command, f"--answers={end}"], stdin=subprocess.PIPE, stdout=output, stderr=output, text=True,
                pass_fds=[self._lock.fileno(), end], env=os.environ | known,
                process_group=0,  # Ctrl-C in a terminal is the trainer's alone
            )  # fmt: skip
        os.close(end)
        log.info("windows of %d shards are harvested by process %d", self._shards, process.pid)
        self._reader = threading.Thread(target=self._read, args=(process, answers), daemon=True)
        self._reader.start()
        return process

    def _read(self, process: "subprocess.Popen[str]", answers: int) -> None:
        """Take the process's answers, until its end."""
        error = None
        with open(answers) as lines:
            for line in lines:
                answer = json.loads(line)
                error = answer.get("error")
                if error is None:
                    self._take(answer)
        status = process.wait()
        with self.changed:
            self.failure = error or self._obituary(status)
            self.changed.notify_all()

    def _take(self, answer: dict[str, Any]) -> None:
        if answer["passes"] > self._passes:
            self._passes = answer["passes"]
            log.info("the text ended after %s rows to train on, and was begun again", f"{answer['fresh']:,}")
        with self.changed:
            self.whole.add(answer["window"])
            self.changed.notify_all()

    def _obituary(self, status: int) -> str:
        """What the process ended of, where it did not say so itself, with the last line of its log."""
        lines = self._log.read_text(errors="replace").split("\n") if self._log.exists() else []
        last = "".join(f" ({line.strip()})" for line in [line for line in lines if line.strip()][-1:])
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return f"the harvester of {self._head} {how}{last}; run the same command again to continue from the last checkpoint"

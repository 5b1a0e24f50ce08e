"""Long work as processes of the command line: begun from the app, and watched and stopped from any that shows the run.

A job is what lies on disk: `jobs/NNN-COMMAND.log`, which its process holds for as long as it lives, and `NNN-COMMAND.json`, in which
it notes who it is and how it ended. So it outlives the server that began it, and one that died is told apart from one that runs.
"""

import contextlib
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from saebench.files import PATIENCE, locked, read_json, write_json

_INTERRUPTED = 130  # what a command that was stopped ends with
_LINE = re.compile(r"(?P<what>[^\r\n]*?):\s+(?P<percent>\d+)%\|.*?\| (?P<rest>[^\r\n]*)")
_TAIL = 8192  # bytes of the log that are looked at


class Job:
    """A `saebench` command that runs, or has. Everything but its arguments is asked of the disk, each time."""

    def __init__(self, record: Path) -> None:
        """`record` is `jobs/NNN-COMMAND.json`. Raises ValueError where it is not a job's."""
        self.record, self.log = record, record.with_suffix(".log")
        noted = self._noted()
        self.arguments: list[str] = noted.get("arguments") or []
        self.begun: float = noted.get("begun") or 0.0
        if not isinstance(self.arguments, list) or not all(isinstance(one, str) for one in self.arguments or [None]):
            raise ValueError(f"{record} is no job's; delete it")
        if not isinstance(self.begun, float):
            raise ValueError(f"{record} says that it began at {self.begun!r}; expected seconds: delete it")

    @property
    def title(self) -> str:
        return "saebench " + shlex.join(self.arguments)

    @property
    def name(self) -> str:
        """The command and what it is for, without the folders."""
        words = [word for word in self.arguments if not word.startswith("-")]
        return " ".join(Path(word).name for word in words[:2])

    @property
    def resumes(self) -> bool:
        """Whether what is done when it is stopped is kept."""
        return self.arguments[0] not in ("steer", "map", "circuits")

    @property
    def running(self) -> bool:
        """Whether it has not noted how it ended, and its process, or one that it began, still has the log open."""
        if self.status is not None or not self.log.exists():
            return False
        with self.log.open("r+b") as file:  # for writing, as NFS wants it
            return not lock_descriptor(file.fileno(), blocking=False)

    @property
    def status(self) -> int | None:
        """Its exit status; None while it runs, and for one that died without a word."""
        return self._noted().get("status")

    @property
    def succeeded(self) -> bool:
        return self.status == 0

    @property
    def stopped(self) -> bool:
        return self.status == _INTERRUPTED

    @property
    def progress(self) -> tuple[str, float, str] | None:
        """(what, share done, rate and time left) of the latest bar; None before the first."""
        matches = list(_LINE.finditer(self._tail()))
        if not matches:
            return None
        last = matches[-1]
        return last["what"].strip(), int(last["percent"]) / 100, last["rest"].strip()

    @property
    def message(self) -> str:
        """The last thing it said that is no bar."""
        lines = [line for line in re.split(r"[\r\n]+", self._tail()) if line.strip() and not _LINE.search(line)]
        return lines[-1].strip() if lines else ""

    @property
    def ending(self) -> str:
        """How one that does not run ended, in words."""
        if self.status is None:
            return "It was killed, or the machine went down" + (": the same command goes on" if self.resumes else "")
        return "done" if self.succeeded else "stopped" if self.stopped else self.message or f"ended with {self.status}"

    def stop(self) -> None:
        """As Ctrl-C does: what is done is kept, and the same command goes on from there."""
        while self.running:  # and so its number is no other process'
            if pid := self._noted().get("pid"):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGTERM)
                return
            time.sleep(0.05)  # it has only just begun

    def wait(self, seconds: float) -> int | None:
        """`status` once it has ended. Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while self.running:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.title} still runs after {seconds:g} s; see {self.log}")
            time.sleep(0.05)
        return self.status

    def _noted(self) -> dict[str, Any]:
        found = read_json(self.record) if self.record.exists() else {}
        return found if isinstance(found, dict) else {}

    def _tail(self) -> str:
        with contextlib.suppress(FileNotFoundError), self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - _TAIL))
            return file.read().decode(errors="replace")
        return ""


class Jobs:
    """The jobs of a folder of runs, or of one run, whichever server began them: one at a time for each set of arguments."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def start(self, arguments: list[str], folder: Path) -> Job:
        """Begin a command, unless it runs already; its log goes into `folder/jobs`."""
        with locked(folder / "jobs", other="run", patience=PATIENCE):
            job = self.get(arguments)
            if job is not None and job.running:
                return job
            numbers = [int(log.name.partition("-")[0]) for log in (folder / "jobs").glob("[0-9]*-*.log")]
            record = folder / "jobs" / f"{max(numbers, default=-1) + 1:03d}-{arguments[0]}.json"
            write_json(record, {"arguments": arguments, "begun": time.time()})
            _begin(record, arguments)
            for before in self._of(arguments):
                if before.record != record:
                    self.forget(before)
            return Job(record)

    def get(self, arguments: list[str]) -> Job | None:
        return next(iter(self._of(arguments)), None)

    def all(self) -> list[Job]:
        """The latest first."""
        found = []
        for record in [*self.root.glob("jobs/*.json"), *self.root.glob("*/jobs/*.json")]:
            with contextlib.suppress(ValueError, OSError):  # one that was just forgotten, or is none of ours
                found.append(Job(record))
        return sorted(found, key=lambda job: job.begun, reverse=True)

    def forget(self, job: Job) -> None:
        """Leave out one that has ended; its log stays."""
        if not job.running:
            job.record.unlink(missing_ok=True)

    def _of(self, arguments: list[str]) -> list[Job]:
        return [job for job in self.all() if job.arguments == arguments]


def _begin(record: Path, arguments: list[str]) -> None:
    with record.with_suffix(".log").open("wb") as log:
        lock_descriptor(log.fileno())  # which the process inherits with the file, and holds until it ends (decision 28)
        # -P: what lies in the working directory is never imported.
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "saebench.browse.jobs", str(record.resolve()), *arguments], stdout=log, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True, env={**os.environ, "SAEBENCH_PROGRESS_SECONDS": "0.5", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        )  # fmt: skip
    threading.Thread(target=process.wait, daemon=True).start()  # or it would stay in the system's table


def _run(record: Path, arguments: list[str]) -> int:
    """In the process of a job: the command, and a note of how it ended. A job that is stopped ends as by Ctrl-C, whatever it is at."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    noted = read_json(record) | {"pid": os.getpid()}
    write_json(record, noted)
    sys.argv = ["saebench", *arguments]
    status = 1
    try:
        runpy.run_module("saebench.cli", run_name="__main__")  # as in a terminal
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except KeyboardInterrupt:
        status = _INTERRUPTED
    finally:
        write_json(record, noted | {"status": status})
    return status


if __name__ == "__main__":
    sys.exit(_run(Path(sys.argv[1]), sys.argv[2:]))

"""Long work as processes of the command line: begun, watched and stopped from elsewhere."""

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

_LINE = re.compile(r"(?P<what>[^\r\n]*?):\s+(?P<percent>\d+)%\|.*?\| (?P<rest>[^\r\n]*)")
_TAIL = 8192  # bytes of the log that are looked at


class Job:
    """A `saebench` command that runs, or has."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.arguments, self.log = arguments, log
        self.stopped = False
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            # -P: what lies in the working directory is never imported.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "saebench.cli", *arguments], stdout=file, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True, env={**os.environ, "SAEBENCH_PROGRESS_SECONDS": "0.5", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            )  # fmt: skip

    @property
    def title(self) -> str:
        return "saebench " + " ".join(self.arguments)

    @property
    def name(self) -> str:
        """The command and what it is for, without the folders."""
        words = [word for word in self.arguments if not word.startswith("-")]
        return " ".join(Path(word).name for word in words[:2])

    @property
    def resumes(self) -> bool:
        """Whether what is done when it is stopped is kept."""
        return self.arguments[0] != "steer"

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def succeeded(self) -> bool:
        return self._process.poll() == 0

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

    def stop(self) -> None:
        """As Ctrl-C does: what is done is kept, and the same command goes on from there."""
        if self.running:
            self.stopped = True
            # Not SIGINT, which a server begun in the background of a shell has inherited as ignored.
            os.killpg(self._process.pid, signal.SIGTERM)

    def wait(self, seconds: float) -> int:
        """Its exit status. Raises subprocess.TimeoutExpired."""
        return self._process.wait(seconds)

    def _tail(self) -> str:
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - _TAIL))
            return file.read().decode(errors="replace")


class Jobs:
    """The jobs of a server, one at a time for each set of arguments."""

    def __init__(self) -> None:
        self._jobs: dict[tuple[str, ...], Job] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def start(self, arguments: list[str], folder: Path) -> Job:
        """Begin a command, unless it runs already; its log goes into `folder/jobs`."""
        with self._lock:
            job = self._jobs.get(tuple(arguments))
            if job is None or not job.running:
                log = folder / "jobs" / f"{next(self._numbers):03d}-{arguments[0]}.log"
                job = self._jobs[tuple(arguments)] = Job(arguments, log)
            return job

    def get(self, arguments: list[str]) -> Job | None:
        return self._jobs.get(tuple(arguments))

    def all(self) -> list[Job]:
        """The latest first."""
        return list(reversed(self._jobs.values()))

    def forget(self, job: Job) -> None:
        """Leave out one that has ended."""
        with self._lock:
            if not job.running:
                self._jobs.pop(tuple(job.arguments), None)

"""Run the command line in a child process, to interrupt it, kill it or starve it of disk.

Children are forked from a server that has imported everything once: they start in milliseconds.
"""

import datetime
import multiprocessing
import os
import resource
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
# The first step of an optimizer imports torch._dynamo, for a second.
_CONTEXT.set_forkserver_preload(["processes", "saebench.cli", "transformers.models.llama", "torch._dynamo"])
_PATIENCE = 400  # seconds


class Child:
    """A running command."""

    def __init__(self, argv: tuple[str, ...], **conditions: object) -> None:
        self.output = Path(tempfile.mkstemp(prefix="saebench-test-")[1])
        self.meets_at: object = None
        """the store at which it meets others, which is there as long as one of them is known"""
        self.process = _CONTEXT.Process(target=_main, args=(argv, str(self.output)), kwargs=conditions)
        self.process.start()

    def ends(self) -> tuple[int, str]:
        """(exit status, what it printed), once it has ended; minus a signal's number if that ended it."""
        self.process.join(_PATIENCE)
        assert self.process.exitcode is not None, f"still running:\n{self.output.read_text()}"
        printed = self.output.read_text()
        self.output.unlink()
        return self.process.exitcode, printed


def start(
    *argv: str,
    file_limit: int | None = None,
    slow: float = 0.0,
    checkpoint_seconds: float | None = None,
    unit_rows: int | None = None,
    environment: dict[str, str] | None = None,
    folder: Path | None = None,
    patience: float | None = None,
) -> Child:
    """`saebench ARGV` in a child, in `folder`. `file_limit` is the largest file it may write, in bytes.

    `slow` makes every training step, forward pass and unit of an index wait that many seconds; checkpoints are
    written every `checkpoint_seconds`, and of several processes none waits longer than `patience` for another. An index goes in units of `unit_rows`, and writes a snapshot after each.
    """
    return Child(
        argv, file_limit=file_limit, slow=slow, checkpoint_seconds=checkpoint_seconds, unit_rows=unit_rows,
        environment=environment, folder=folder, patience=patience,
    )  # fmt: skip


def start_ranks(size: int, *argv: str, last: dict[str, Any] | None = None, **conditions: Any) -> list[Child]:
    """`saebench ARGV` in `size` children that are told of one another as torchrun does it, and meet at a store of this process, with nobody watching over them.

    `last` are conditions of the last alone, and under `argv` what more it is told.
    """
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    known = {
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
    }
    children = []
    for rank in range(size):
        own = dict(last or {}) if rank + 1 == size else {}
        told = (*argv, *own.pop("argv", ()))
        environment = known | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        children.append(start(*told, environment=environment, **conditions | own))
        children[-1].meets_at = store
    return children


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def together(target: Callable[..., None], size: int, *arguments: object) -> None:
    """`target(rank, size, port, *arguments)` in `size` children, to their end."""
    port = free_port()
    children = [_CONTEXT.Process(target=target, args=(rank, size, port, *arguments)) for rank in range(size)]
    for child in children:
        child.start()
    for child in children:
        child.join(_PATIENCE)
        assert child.exitcode == 0, child.exitcode


def run(*argv: str, file_limit: int | None = None, folder: Path | None = None) -> tuple[int, str]:
    """(exit status, what it printed) of a child that runs to its end."""
    return start(*argv, file_limit=file_limit, folder=folder).ends()


def signal_when(child: Child, condition: Callable[[], bool], number: signal.Signals) -> tuple[int, str]:
    """Send a signal once the condition holds, and wait. Fails when the child ends before that."""
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        assert child.process.is_alive(), child.ends()
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.002)
    assert child.process.pid is not None
    os.kill(child.process.pid, number)
    return child.ends()


def _main(
    argv: tuple[str, ...],
    output: str,
    *,
    file_limit: int | None,
    slow: float,
    checkpoint_seconds: float | None,
    unit_rows: int | None,
    environment: dict[str, str] | None,
    folder: Path | None,
    patience: float | None,
) -> None:
    import torch

    import saebench.harvest.pipeline
    import saebench.index.build
    import saebench.train.clock
    import saebench.train.loop
    import saebench.train.member
    from saebench import cli

    file = os.open(output, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    torch.set_num_threads(1)
    os.environ |= environment or {}
    if folder is not None:
        os.chdir(folder)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if checkpoint_seconds is not None:
        saebench.train.clock.CHECKPOINT_SECONDS = checkpoint_seconds
    if patience is not None:
        saebench.train.loop.PATIENCE = datetime.timedelta(seconds=patience)
    if unit_rows is not None:
        saebench.index.plan.UNIT_ROWS = unit_rows
        saebench.index.publish.SNAPSHOT_SECONDS, saebench.index.publish.SNAPSHOT_SHARE = 0.0, 1.0
    if slow:
        take, step = saebench.harvest.pipeline.Landing.take, saebench.train.member.Member.step
        encode_sparse = saebench.index.build.encode_sparse

        def slow_take(*args: object) -> None:
            time.sleep(slow)
            take(*args)  # type: ignore[arg-type]

        def slow_step(*args: object) -> None:
            time.sleep(slow)
            step(*args)  # type: ignore[arg-type]

        def slow_encode(*args: object) -> object:
            time.sleep(slow)
            return encode_sparse(*args)  # type: ignore[arg-type]

        saebench.index.build.encode_sparse = slow_encode  # type: ignore[assignment]
        saebench.harvest.pipeline.Landing.take = slow_take  # type: ignore[method-assign]
        saebench.train.member.Member.step = slow_step  # type: ignore[method-assign]
    status = cli.main(argv)
    sys.stderr.flush()
    sys.stdout.flush()
    sys.exit(status)

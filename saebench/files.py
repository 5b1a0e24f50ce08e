"""Durable files: written whole or not at all, checksummed in blocks, locked while in use."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash
from filelock import lock_descriptor

PATIENCE = 10.0
"""Seconds that a writer of one file waits for another."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place once the block ends and is on disk.

    Missing folders are made. On an exception the temporary file goes and `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(value: Any) -> str:
    """`value` with sorted keys, so that equal values give equal bytes. NaN is refused."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write `value` as `json_text` has it."""
    write_text(path, json_text(value))


def read_json(path: Path) -> Any:
    """Raises ValueError naming the file when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it or make it again") from error


def first_line(error: BaseException) -> str:
    """What a library's error says, in a line; of one that says nothing its kind."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def block_checksums(rows: np.ndarray, block_rows: int) -> np.ndarray:
    """xxh3-64 of every `block_rows` consecutive rows (the last block may be shorter), uint64."""
    if not len(rows):
        return np.empty(0, dtype=np.uint64)
    view = np.ascontiguousarray(rows).data.cast("B")
    size = len(view) // len(rows) * block_rows
    digests = [xxhash.xxh3_64_intdigest(view[start : start + size]) for start in range(0, len(view), size)]
    return np.array(digests, dtype=np.uint64)


def hash_files(paths: list[Path]) -> str:
    """xxh3-128 over the names and contents of files, in the order given."""
    digest = xxhash.xxh3_128()
    for path in paths:
        digest.update(os.fsencode(path.name))
        with open(path, "rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


def found_from(path: Path, recorded: Path) -> Path:
    """The folder that a file in `path` recorded; a relative one that is not here, under the nearest folder above `path` that has it."""
    if recorded.is_absolute() or recorded.exists():
        return recorded
    return next((above / recorded for above in path.resolve().parents if (above / recorded).exists()), recorded)


@contextlib.contextmanager
def locked(folder: Path, *, other: str = "--out", patience: float = 0.0) -> Iterator[IO[str]]:
    """Hold a folder that is written as a whole for this process, and for those that inherit the file given, until the last of them has ended.

    Raises ValueError when another process still writes into it after `patience` seconds, and where the file system has
    no locks; `other` is the option to choose another folder with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder / ".lock", folder, f"choose another {other}", patience) as file:
        yield file


@contextlib.contextmanager
def writing(path: Path, *, patience: float = PATIENCE) -> Iterator[None]:
    """Hold one file, for whoever reads it, changes it and writes it again; others in its folder are written meanwhile.

    Raises ValueError when another process still writes it after `patience` seconds, and where the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _held(path.with_name(f".{path.name}.lock"), path, "choose another file", patience):
        yield


@contextlib.contextmanager
def _held(lock: Path, what: Path, instead: str, patience: float) -> Iterator[IO[str]]:
    deadline = time.monotonic() + patience
    # Closing the file is what ends the lock, so that a child that has it open keeps it (decision 28).
    with open(lock, "w") as file:
        try:
            while not lock_descriptor(file.fileno(), blocking=False):
                if time.monotonic() >= deadline:
                    raise ValueError(f"{what} is being written by another process; wait for it or {instead}")
                time.sleep(0.05)
        except OSError as error:
            raise ValueError(
                f"{what} cannot be held against other processes ({error.strerror}): its file system has no locks; "
                f"mount it with them, or {instead}"
            ) from error
        yield file

import errno
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xxhash

import saebench.files
from saebench.files import block_checksums, hash_files, locked, read_json, replacing, write_json, writing


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half of the ne")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_equal_values_give_equal_json_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"x": 1, "y": [0.1]})
    write_json(tmp_path / "b", {"y": [0.1], "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_nan_never_reaches_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_broken_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_text('{"x": 1')
    with pytest.raises(ValueError, match=r"a is not valid JSON .*restore it or make it again"):
        read_json(tmp_path / "a")


def test_block_checksums_are_xxh3_of_each_block_of_rows() -> None:
    rows = np.arange(70, dtype=np.float32).reshape(10, 7)
    want = [xxhash.xxh3_64_intdigest(rows[start : start + 4].tobytes()) for start in (0, 4, 8)]
    assert block_checksums(rows, 4).tolist() == want
    assert block_checksums(np.asfortranarray(rows), 4).tolist() == want


def test_hash_depends_on_contents_and_names(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"one")
    b.write_bytes(b"one")
    assert hash_files([a]) != hash_files([b])
    before = hash_files([a, b])
    b.write_bytes(b"two")
    assert hash_files([a, b]) != before


def _lock(folder: Path, messages: "multiprocessing.Queue[str]") -> None:
    try:
        with locked(folder):
            messages.put("got it")
    except ValueError as error:
        messages.put(str(error))


def test_a_second_process_cannot_write_into_the_same_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    messages: multiprocessing.Queue[str] = context.Queue()

    def ask() -> str:
        process = context.Process(target=_lock, args=(tmp_path, messages))
        process.start()
        process.join()
        return messages.get(timeout=10)

    with locked(tmp_path):
        assert "is being written by another process; wait for it or choose another --out" in ask()
    assert ask() == "got it"


def test_the_lock_lives_as_long_as_a_child_that_inherited_it(tmp_path: Path) -> None:
    with locked(tmp_path) as file:
        child = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[file.fileno()], text=True
        )
    try:
        with pytest.raises(ValueError, match="is being written by another process"), locked(tmp_path, patience=0.1):
            pass
    finally:
        child.communicate("\n")
    with locked(tmp_path):
        pass


def test_a_lock_waits_for_its_holder_to_end(tmp_path: Path) -> None:
    with locked(tmp_path) as file:
        child = subprocess.Popen(["sleep", "0.3"], pass_fds=[file.fileno()])
    with locked(tmp_path, patience=10.0):
        assert child.wait() == 0


def test_files_of_one_folder_are_written_at_the_same_time_and_one_file_in_turn(tmp_path: Path) -> None:
    index, notes = tmp_path / "sae.h5", tmp_path / "sae.notes.json"
    again = pytest.raises(ValueError, match=r"sae\.h5 is being written by another process; wait for it")
    with writing(index), writing(notes, patience=0.0), locked(tmp_path), again, writing(index, patience=0.1):
        pass
    with ThreadPoolExecutor(8) as pool:  # each reads, adds and writes; none is lost
        list(pool.map(_add_one, [notes] * 40))
    assert read_json(notes) == 40


def _add_one(path: Path) -> None:
    with writing(path):
        write_json(path, (read_json(path) if path.exists() else 0) + 1)


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> bool:  # as Lustre answers that is mounted without -o flock
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(saebench.files, "lock_descriptor", missing)
    message = r"cannot be held against other processes \(Function not implemented\): .* choose another --store"
    with pytest.raises(ValueError, match=message), locked(tmp_path, other="--store"):
        pass

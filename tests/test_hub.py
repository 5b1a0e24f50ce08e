"""Models and data sets by their names on the hub, from a hub on this machine."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import CONTEXT, sentences
from hub import Hub, hub

from saebench.files import read_json


@pytest.fixture
def served(tmp_path: Path, checkpoints: dict[str, Path]) -> Iterator[Hub]:
    """A model, and a data set of JSON lines with a column that has no one type."""
    rows = [{"text": sentences(number, 60), "url": None if number < 30 else number} for number in range(60)]
    data = tmp_path / "rows"
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with hub() as running:
        running.add("models", "maker/tiny", checkpoints["llama"])
        running.add("datasets", "maker/rows", data)
        yield running


def harvests(served: Hub, folder: Path, *runs: tuple[str, ...]) -> list[list[str]]:
    """What each of some harvests, with further options, said, and behind it its exit status.

    In a process of their own, since libraries ask once where the hub is.
    """
    script = """
import json, sys
from saebench.cli import main
for argv in json.loads(sys.argv[1]):
    status = main(argv)
    print(f"\\n=== {status}", file=sys.stderr, flush=True)
"""
    usual = [
        "harvest", "--model", "maker/tiny", "--dataset", "maker/rows", "--layers", "1", "--tokens", "1500", "--context",
        str(CONTEXT), "--validation-fraction", "0.3", "--out", str(folder / "store"),
    ]  # fmt: skip
    settings = {
        "HF_ENDPOINT": served.address,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-c", script, json.dumps([[*usual, *more] for more in runs])]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    said: list[list[str]] = [[]]
    for line in done.stderr.splitlines():
        said[-1] += [line] if line else []
        if line.startswith("=== "):
            said.append([])
    return said[:-1]


def test_names_on_the_hub_are_loaded_and_pinned_to_their_commits(served: Hub, tmp_path: Path) -> None:
    (first,) = harvests(served, tmp_path, ())
    assert first[-1] == "=== 0", first
    made = read_json(tmp_path / "store" / "manifest.json")["identity"]
    commit = served.folders["datasets", "maker/rows"][1]
    assert made["text"]["fingerprint"] == commit
    assert made["model"]["id"] == "maker/tiny"
    assert not [line for line in first if "HTTP" in line]
    # The data set moves on; a store keeps to what it began with.
    data = served.folders["datasets", "maker/rows"][0]
    shutil.copytree(data, tmp_path / "newer")
    with open(tmp_path / "newer" / "train.jsonl", "a") as file:
        file.write(json.dumps({"text": "more"}) + "\n")
    assert served.add("datasets", "maker/rows", tmp_path / "newer") != commit
    again, unknown, empty, column = harvests(
        served, tmp_path, (), ("--model", "maker/none"), ("--dataset", "maker/none", "--out", str(tmp_path / "other")),
        ("--column", "words", "--out", str(tmp_path / "other")),
    )  # fmt: skip
    assert again[-1] == "=== 0"
    assert "is complete already" in again[-2]
    for said, message in (
        (unknown, "model 'maker/none' cannot be loaded"),
        (empty, "dataset 'maker/none' cannot be loaded"),
        (column, "column 'words' of dataset 'maker/rows' holds no text in row 0"),
    ):
        assert said[-1] == "=== 2"
        assert message in said[-2]
        assert not [line for line in said if "Traceback" in line]
    # A try that left no shard says nothing of the next: not which commit to read.
    data = tmp_path / "more"
    shutil.copytree(tmp_path / "newer", data)
    (data / "README.md").write_text("More of it.")
    newer = served.add("datasets", "maker/more", data)
    (other,) = harvests(served, tmp_path, ("--dataset", "maker/more", "--out", str(tmp_path / "other")))
    assert other[-1] == "=== 0", other
    assert read_json(tmp_path / "other" / "manifest.json")["identity"]["text"]["fingerprint"] == newer != commit

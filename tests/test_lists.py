import json
from pathlib import Path
from typing import Any

import pytest

from saebench.files import read_json
from saebench.index.lists import Lists


@pytest.fixture
def lists(tmp_path: Path) -> Lists:
    return Lists(tmp_path / "sae.lists.json", "abc", 10)


def test_a_latent_is_put_into_lists_and_taken_out(lists: Lists, tmp_path: Path) -> None:
    assert lists.all() == {}
    lists.put(7, ["to steer", "odd"])
    lists.put(3, ["to steer"])
    lists.put(7, ["to steer", "odd"])  # where it is, it keeps its place
    assert lists.all() == {"odd": (7,), "to steer": (7, 3)}
    again = Lists(tmp_path / "sae.lists.json", "abc", 10)
    assert again.holding(7) == ["odd", "to steer"]
    again.put(7, ["odd"])
    assert lists.all() == {"odd": (7,), "to steer": (3,)}
    lists.put(7, [])
    lists.delete("to steer")
    assert lists.all() == {}


def test_a_list_is_taken_to_another_copy_of_the_sae_and_added(lists: Lists, tmp_path: Path) -> None:
    lists.put(7, ["mine"])
    lists.put(2, ["mine", "other"])
    there = Lists(tmp_path / "there" / "sae.lists.json", "abc", 10)
    there.put(5, ["mine"])
    assert there.add(json.loads(lists.export("mine"))) == ["mine"]
    assert there.all() == {"mine": (5, 7, 2)}
    elsewhere = Lists(tmp_path / "elsewhere.lists.json", "another", 10)
    with pytest.raises(
        ValueError,
        match="what was given was made from another sae: it says abc, this one is another; its latents are others",
    ):
        elsewhere.add(json.loads(lists.export("mine")))
    assert not elsewhere.path.exists()
    with pytest.raises(ValueError, match="list 'gone' is not there; there are 'mine', 'other'"):
        lists.export("gone")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "other"}, "is not a file of lists of latents"),
        ({"schema_version": 2}, "has version 2, this saebench reads 1"),
        ({"lists": [1]}, r"lists is \[1\]; expected latents by the name of their list"),
        ({"lists": {"a": [10]}}, "latent is 10; expected 0 to 9"),
        ({"lists": {"a": [True]}}, "latent is True; expected 0 to 9"),
        ({"lists": {" ": [1]}}, "list ' ' cannot be named so"),
        ({"lists": {"a\nb": [1]}}, "cannot be named so; expected 1 to 60 characters on one line"),
    ],
)
def test_a_file_edited_into_nonsense_is_refused_and_kept(lists: Lists, change: dict[str, Any], message: str) -> None:
    lists.put(1, ["a"])
    nonsense = json.dumps(read_json(lists.path) | change)
    lists.path.write_text(nonsense)
    for use in (lists.all, lambda: lists.put(2, ["b"]), lambda: lists.export("a")):
        with pytest.raises(ValueError, match=message):
            use()
    assert lists.path.read_text() == nonsense


def test_no_latent_beyond_the_sae_is_listed(lists: Lists) -> None:
    with pytest.raises(ValueError, match="latent is 10; expected 0 to 9"):
        lists.put(10, ["a"])
    assert not lists.path.exists()

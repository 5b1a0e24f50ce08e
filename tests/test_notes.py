import json
from pathlib import Path

import pytest

from saebench.files import writing
from saebench.index.notes import Note, Notes


def test_notes_are_on_disk_at_once_and_outlive_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "index" / "relu.notes.json"
    notes = Notes(path, "abc", 10)
    assert notes[3] == Note()
    notes.write(3, Note("imports", ("syntax", "easy"), "fires on `from`"))
    notes.write(9, Note(label="last"))
    again = Notes(path, "abc", 10)
    assert again[3] == Note("imports", ("syntax", "easy"), "fires on `from`")
    assert [latent for latent, _ in again.items()] == [3, 9]
    again.write(3, Note())
    assert [latent for latent, _ in Notes(path, "abc", 10).items()] == [9]


def test_two_writers_keep_each_others_notes(tmp_path: Path) -> None:
    path = tmp_path / "n.json"
    one, two = Notes(path, "abc", 10), Notes(path, "abc", 10)
    one.write(1, Note("a"))
    two.write(2, Note("b"))
    assert [note.label for _, note in Notes(path, "abc", 10).items()] == ["a", "b"]


def test_a_note_is_written_while_an_index_is_built_beside_it(tmp_path: Path) -> None:
    with writing(tmp_path / "a.h5"), writing(tmp_path / "n.h5"):
        Notes(tmp_path / "n.notes.json", "abc", 10).write(1, Note("a"))
    assert Notes(tmp_path / "n.notes.json", "abc", 10)[1] == Note("a")


def test_an_open_file_of_notes_shows_what_others_write_since(tmp_path: Path) -> None:
    path = tmp_path / "n.json"
    one, two = Notes(path, "abc", 10), Notes(path, "abc", 10)
    two.write(2, Note("b"))
    assert one[2] == Note("b")


def test_of_two_who_edit_one_note_the_second_is_told(tmp_path: Path) -> None:
    path = tmp_path / "n.json"
    one, two = Notes(path, "abc", 10), Notes(path, "abc", 10)
    one.write(1, Note("mine"), seen=Note())
    with pytest.raises(ValueError, match="latent 1 was noted by someone else meanwhile, as 'mine'; yours is not saved"):
        two.write(1, Note("theirs"), seen=Note())
    assert two[1] == Note("mine")
    two.write(1, Note("theirs"), seen=Note("mine"))
    one.write(1, Note("theirs"), seen=Note("mine"))  # the same words twice are no quarrel
    assert one[1] == Note("theirs")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is not a file of notes: its schema is None, expected 'saebench-notes'; move it away"),
        ({"schema_version": 9}, "has version 9, this saebench reads 1"),
        ({"sae": "xyz"}, "was made from another sae: it says xyz, this one is abc; move it away"),
        ({"latents": ["a"]}, "expected notes by number"),
        ({"latents": {"ten": {}}}, "'ten' is not a latent; expected a number from 0 to 9"),
        ({"latents": {"10": {}}}, "'10' is not a latent"),
        ({"latents": {"1": "nice"}}, "latent 1 has 'nice'; expected a label, a list of tags"),
        ({"latents": {"1": {"tags": [2]}}}, r"latent 1 has .*; expected a label, a list of tags"),
        ({"latents": {"1": {"colour": "red"}}}, r"latent 1 has .*; expected a label"),
    ],
)
def test_a_file_edited_into_nonsense_is_refused_and_kept(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "n.json"
    header = {"schema": "saebench-notes", "schema_version": 1, "sae": "abc", "latents": {}}
    text = content if isinstance(content, str) else json.dumps(header | content)  # type: ignore[operator]
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Notes(path, "abc", 10)
    assert path.read_text() == text


def test_a_latent_out_of_range_gets_no_note(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="latent is 10; expected 0 to 9"):
        Notes(tmp_path / "n.json", "abc", 10).write(10, Note("x"))

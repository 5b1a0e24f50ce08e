import bz2
import gzip
import itertools
import json
import lzma
import os
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from saebench.text import (
    SPLITS,
    Context,
    Document,
    Encoder,
    TextConfig,
    encoder_of,
    fingerprint,
    open_documents,
    pack,
    split_of,
)

BOS = 0
# One token per character, so that contexts can be read off by eye: a is 1, b is 2, …
ENCODER = Encoder(lambda texts: [[ord(c) - 96 for c in text] for text in texts], BOS, frozenset({BOS}))
ONLY_TRAIN = 1e-12


def documents(*texts: str) -> Iterator[Document]:
    return (Document(i, f"doc{i}", f"doc{i}", text) for i, text in enumerate(texts))


def packed(*texts: str, length: int = 4) -> list[Context]:
    return list(pack(documents(*texts), ENCODER, length, ONLY_TRAIN))


def test_packing_by_hand() -> None:
    contexts = packed("ab", "cdefg", "h")
    assert [c.tokens.tolist() for c in contexts] == [[0, 1, 2, 0], [0, 3, 4, 5], [0, 6, 7, 0], [0, 8, 0, 0]]
    assert [c.doc_id.tolist() for c in contexts] == [[0, 0, 0, 1], [1, 1, 1, 1], [1, 1, 1, 2], [2, 2, 2, 2]]
    assert next(c.keep.tolist() for c in contexts) == [False, True, True, False]
    assert all(c.position.tolist() == [0, 1, 2, 3] for c in contexts)
    assert [c.cursor for c in contexts] == [(1, 0), (1, 3), (2, 0), (3, 0)]
    assert next(c.documents for c in contexts) == {0: "doc0", 1: "doc1"}


def test_an_empty_document_leaves_no_trace() -> None:
    assert [c.tokens.tolist() for c in packed("", "ab", "", "c")] == [[0, 1, 2, 0], [0, 3, 0, 0]]


texts = st.lists(st.text("abcdefgh", max_size=20), max_size=12)


@settings(deadline=None)
@given(texts, st.integers(2, 9), st.sampled_from([ONLY_TRAIN, 0.4]))
def test_every_token_appears_once_in_order_in_the_split_of_its_document(
    corpus: list[str], length: int, fraction: float
) -> None:
    contexts = list(pack(documents(*corpus), ENCODER, length, fraction))
    for split in SPLITS:
        kept = [int(t) for c in contexts if c.split == split for t in c.tokens[c.keep]]
        want = [ord(ch) - 96 for i, text in enumerate(corpus) if split_of(f"doc{i}", fraction) == split for ch in text]
        assert kept == want
    for context in contexts:
        assert context.tokens[0] == BOS
        assert all(split_of(f"doc{i}", fraction) == context.split for i in context.doc_id)
        owners = [corpus[int(i)] for i in context.doc_id[context.keep]]
        assert all(chr(int(t) + 96) in text for t, text in zip(context.tokens[context.keep], owners, strict=True))


@settings(deadline=None)
@given(texts, st.integers(2, 6), st.data())
def test_packing_continues_from_any_cursor(corpus: list[str], length: int, data: st.DataObject) -> None:
    fraction = 0.4
    whole = list(pack(documents(*corpus), ENCODER, length, fraction))
    cut = data.draw(st.integers(0, len(whole)))
    cursors = dict.fromkeys(SPLITS, (0, 0))
    for context in whole[:cut]:
        cursors[context.split] = context.cursor
    first = min(number for number, _ in cursors.values())
    rest = list(pack((d for d in documents(*corpus) if d.number >= first), ENCODER, length, fraction, cursors))
    for split in SPLITS:
        want = [c for c in whole[cut:] if c.split == split]
        got = [c for c in rest if c.split == split]
        assert [c.tokens.tolist() for c in got] == [c.tokens.tolist() for c in want]
        assert [c.cursor for c in got] == [c.cursor for c in want]


def test_the_split_is_a_property_of_the_document_alone() -> None:
    names = [f"module_{i}.py" for i in range(4000)]
    held_out = [name for name in names if split_of(name, 0.1) == "validation"]
    assert 0.08 < len(held_out) / len(names) < 0.12
    assert all(split_of(name, 0.2) == "validation" for name in held_out)  # a larger share only adds


# ---------------------------------------------------------------------------------------- sources


def read(path: Path | str, **options: object) -> list[Document]:
    return list(open_documents(TextConfig(dataset=str(path), **options)))  # type: ignore[arg-type]


def test_text_files_are_documents_named_by_their_path(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("zwei\nZeilen")
    (tmp_path / "one.txt").write_text("eins")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    assert [(d.number, d.name, d.text) for d in read(tmp_path)] == [
        (0, "b/two.md", "zwei\nZeilen"),
        (1, "one.txt", "eins"),
    ]
    assert [d.name for d in read(tmp_path / "one.txt")] == ["one.txt"]
    assert [d.name for d in open_documents(TextConfig(dataset=str(tmp_path)), start=1)] == ["one.txt"]


def test_text_is_read_as_what_it_is_or_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("mit \x00 Ä".encode())
    (tmp_path / "b.txt").write_bytes("mit Ä".encode("utf-8-sig"))
    (tmp_path / "c.txt").write_bytes("mit Ä".encode("utf-16"))
    (tmp_path / "d.py").write_bytes("# coding: latin-1\ns = 'Ä'\n".encode("latin-1"))
    assert [d.text for d in read(tmp_path)] == ["mit \x00 Ä", "mit Ä", "mit Ä", "# coding: latin-1\ns = 'Ä'\n"]
    (tmp_path / "e.txt").write_bytes("mit Ä".encode("latin-1"))
    with pytest.raises(ValueError, match=r"'.*e.txt' is not text in utf-8 \(byte 4\): .*iconv -f LATIN1 -t UTF-8"):
        fingerprint(TextConfig(dataset=str(tmp_path)))  # before anything is harvested


def test_errors_replace_reads_every_file_as_utf8(tmp_path: Path) -> None:
    """As all were read once; lines end in newlines either way."""
    (tmp_path / "a.txt").write_bytes("eins\r\nmit Ä\rdrei".encode("latin-1"))
    (tmp_path / "b.txt").write_bytes("\r\nb".encode("utf-8-sig"))
    assert [d.text for d in read(tmp_path, errors="replace")] == ["eins\nmit \ufffd\ndrei", "\ufeff\nb"]
    assert read(tmp_path / "b.txt")[0].text == "\nb"
    (tmp_path / "c.jsonl").write_bytes('{"text": "Ä"}'.encode("latin-1"))
    assert [d.text for d in read(tmp_path / "c.jsonl", errors="replace")] == ["\ufffd"]


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "jsonl.xz", "jsonl.gz", "jsonl.zst", "parquet", "arrow"])
def test_a_file_name_that_is_not_utf8_does_no_harm(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9." + suffix.encode())
    if suffix in ("parquet", "arrow"):
        path.write_bytes(write_rows(suffix, tmp_path / "rows").read_bytes())
    elif suffix == "txt":
        path.write_text("text")
    else:
        import pyarrow as pa

        raw = b'{"text": "text"}\n'
        pack = {"xz": lzma.compress, "gz": gzip.compress, "zst": lambda b: pa.Codec("zstd").compress(b, asbytes=True)}
        path.write_bytes(pack.get(suffix.split(".")[-1], bytes)(raw))
    documents = read(path)
    assert documents[0].text in ("text", ROWS[0]["text"])
    if suffix == "txt":
        assert documents[0].name.encode() == b"caf\\xe9.txt"
    assert fingerprint(TextConfig(dataset=str(path)))


def test_equal_documents_under_two_names_fall_into_one_split(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text("the same")
    assert len({split_of(d.key, 0.5) for d in read(tmp_path)}) == 1
    assert {d.key for d in read(tmp_path, split_by="name")} == {f"{number}.txt" for number in range(8)}
    # The embedded model has seen the modules that are not held out by their names.
    assert all(d.key == d.name for d in itertools.islice(open_documents(TextConfig()), 3))
    assert all(d.key == d.text for d in itertools.islice(open_documents(TextConfig(split_by="content")), 3))


ROWS = [{"text": f"row {i}", "id": f"n{i}", "other": i} for i in range(5)]


def write_rows(kind: str, folder: Path) -> Path:
    data = datasets.Dataset.from_list(ROWS)
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind == "parquet":
        data.to_parquet(path)
    elif kind == "arrow":
        data.save_to_disk(folder / "saved")
        (folder / "saved" / "data-00000-of-00001.arrow").rename(path)
    else:
        path = folder / "dataset"
        data.save_to_disk(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow", "save_to_disk"])
def test_rows_are_documents(kind: str, tmp_path: Path) -> None:
    path = write_rows(kind, tmp_path)
    rows = read(path)
    assert [d.text for d in rows] == [row["text"] for row in ROWS]
    assert [d.name for d in rows] == [f"train/{i}" for i in range(5)]
    assert [d.key for d in rows] == [row["text"] for row in ROWS]  # without an id, the content decides the split
    named = read(path, id_column="id")
    assert [d.name for d in named] == ["n0", "n1", "n2", "n3", "n4"]
    assert [d.key for d in named] == [row["text"] for row in ROWS]
    assert [d.key for d in read(path, id_column="id", split_by="name")] == ["n0", "n1", "n2", "n3", "n4"]
    assert [d.number for d in open_documents(TextConfig(dataset=str(path)), start=3)] == [3, 4]


def test_a_folder_of_row_files_is_one_data_set(tmp_path: Path) -> None:
    write_rows("parquet", tmp_path)
    (tmp_path / "README.md").write_text("about the data")
    assert [d.text for d in read(tmp_path)] == [row["text"] for row in ROWS]


def test_hub_names_go_through_datasets_with_all_options(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def load_dataset(*args: object, **options: object) -> datasets.IterableDataset:
        asked.update(options, args=args)
        return datasets.Dataset.from_list([{"content": "x"}]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read("org/name", subset="en", split="test", revision="abc", column="content")
    assert [d.name for d in rows] == ["test/0"]
    assert asked == {"args": ("org/name", "en"), "split": "test", "revision": "abc", "streaming": True}


def test_a_hub_name_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(ValueError, match="dataset 'nobody/nothing-here' cannot be loaded"):
        read("nobody/nothing-here")


def test_pretokenized_rows_pass_unchanged(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"input_ids": [5, 6, 0, 7]}, {"input_ids": [1, 2, 3, 4]}]).to_parquet(
        tmp_path / "ids.parquet"
    )
    config = TextConfig(dataset=str(tmp_path))
    contexts = list(pack(open_documents(config), ENCODER, 4, ONLY_TRAIN))
    assert [c.tokens.tolist() for c in contexts] == [[5, 6, 0, 7], [1, 2, 3, 4]]
    assert contexts[0].keep.tolist() == [
        False,
        True,
        False,
        True,
    ]  # BOS or not, the first position is an attention sink
    assert [c.cursor for c in contexts] == [(1, 0), (2, 0)]


def test_a_folder_of_texts_may_hold_other_files(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n\ny = 2\n")
    (tmp_path / "package.json").write_text("{}")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "notes.txt").write_text("hidden")
    assert [d.text for d in read(tmp_path)] == ["x = 1\n\ny = 2\n"]
    write_rows("parquet", tmp_path)
    with pytest.raises(ValueError, match=r"holds texts \(a.py\) as well as rows \(data.parquet\)"):
        read(tmp_path)


def test_input_ids_are_used_unless_a_column_is_named(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"text": "abc", "input_ids": [5, 6]}]).to_parquet(tmp_path / "both.parquet")
    assert [d.input_ids for d in read(tmp_path)] == [[5, 6]]
    assert [d.text for d in read(tmp_path, column="text")] == ["abc"]
    with pytest.raises(ValueError, match="column 'tex' .* holds no text in row 0"):
        read(tmp_path, column="tex")


def test_a_null_is_a_document_without_text(tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"text": None}, {"text": "three"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [d.text for d in read(tmp_path / "rows.jsonl")] == ["one", "", "three"]


def test_rows_that_are_no_text_are_named_and_half_characters_replaced(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\nnull\n{"text": "three"}\n')
    with pytest.raises(ValueError, match="row 1 of dataset .* is no set of columns but NoneType"):
        read(path)
    path.write_text('{"text": "cut \\ud83d"}\n{"text": "\\ud83d\\ude00"}\n')
    assert [d.text for d in read(path)] == ["cut \ufffd", "\U0001f600"]
    for ids in ("null", "[1, 99999999999]", "[1.5, 2.7]", "[-1]", "[true]"):
        path.write_text(f'{{"input_ids": [1]}}\n{{"input_ids": {ids}}}\n')
        with pytest.raises(ValueError, match="input_ids of dataset .* are no list of token ids in row 1"):
            read(path)


def test_empty_rows_and_splits_that_are_not_there_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"dataset '.*empty.jsonl' (is empty|cannot be loaded)"):
        read(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match="a single file has no --subset, and no --split but train"):
        read(write_rows("jsonl", tmp_path), split="test")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "dict")
    assert len(read(tmp_path / "dict")) == 5
    with pytest.raises(ValueError, match="it has no split 'test', but train"):
        read(tmp_path / "dict", split="test")
    with pytest.raises(ValueError, match="is plain text, which has no --split test"):
        list(open_documents(TextConfig(split="test")))


def test_pretokenized_rows_of_another_length_are_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"input_ids": [1, 2, 3]}]).to_parquet(tmp_path / "ids.parquet")
    with pytest.raises(
        ValueError, match=r"row train/0 of the pre-tokenized data set has 3 tokens, expected 4: .*--context"
    ):
        list(pack(open_documents(TextConfig(dataset=str(tmp_path))), ENCODER, 4, ONLY_TRAIN))


def test_a_missing_column_names_those_there_are(tmp_path: Path) -> None:
    path = write_rows("jsonl", tmp_path)
    with pytest.raises(
        ValueError,
        match=r"column 'content' of dataset .* holds no text in row 0; it has text \(str\), id \(str\), other \(int\)",
    ):
        read(path, column="content")
    with pytest.raises(ValueError, match="id_column 'name' is not in dataset"):
        read(path, id_column="name")


def test_a_missing_path_and_an_unreadable_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="does not exist; give a file, a folder, 'embedded' or the name of a hub data set"
    ):
        read(tmp_path / "nothing")
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="holds no file that can be read; expected files ending in"):
        read(tmp_path)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
def test_a_validation_fraction_outside_zero_to_one_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="expected a number between 0 and 1"):
        TextConfig(validation_fraction=fraction)


def test_the_fingerprint_follows_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    config = TextConfig(dataset=str(tmp_path))
    before = fingerprint(config)
    assert fingerprint(config) == before
    (tmp_path / "a.txt").write_text("two")  # as long as before
    assert fingerprint(config) != before


def test_a_text_that_begins_with_bos_gets_no_second_one() -> None:
    contexts = packed("`ab", "c")  # ` is token 0
    assert [c.tokens.tolist() for c in contexts] == [[0, 1, 2, 0], [0, 3, 0, 0]]
    assert ENCODER.opened([0, 1]) == [0, 1]
    assert ENCODER.opened([1]) == [0, 1]


def test_columns_that_are_not_used_are_not_read(tmp_path: Path) -> None:
    """One that is null for long and then a string has no type, for a library that wants one."""
    rows = [{"text": "a", "url": None}] * 30_000 + [{"text": "b", "url": "x"}, {"text": "c", "url": 3}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        found = list(open_documents(TextConfig(dataset=str(tmp_path / name)), start=29_999))
        assert [d.text for d in found] == ["a", "b", "c"]


def test_a_list_of_rows_and_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("\ufeff" + json.dumps(ROWS))
    assert [d.text for d in read(tmp_path / "list.json")] == [row["text"] for row in ROWS]


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.xz", "jsonl.bz2", "parquet"])
def test_a_file_that_is_damaged_is_named_among_many(suffix: str, tmp_path: Path) -> None:
    pack = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress, "parquet": lambda content: b"PAR1" + content}
    content = pack[suffix.split(".")[-1]]("".join(json.dumps(row) + "\n" for row in ROWS * 500).encode())
    for number, damaged in enumerate((content[: len(content) // 2], b"nothing of the kind" * 100)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / f"b.{suffix}").write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{number}/b.{suffix}"):
            read(folder)


def test_a_row_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n')
    with pytest.raises(ValueError, match=r"line 3 of '.*rows.jsonl' is not JSON"):
        read(path)
    path.write_bytes('{"text": "Ä"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"'.*rows.jsonl' is not text in UTF-8"):
        read(path)
    path.write_text('"only a string"\n')
    with pytest.raises(ValueError, match=r"row 0 of dataset '.*' is no set of columns but str"):
        read(path)
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "cut.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "cut.parquet").read_bytes()[:-20])
    with pytest.raises(
        ValueError, match=r"'.*cut.parquet' is damaged or no .parquet file: Parquet magic bytes not found"
    ):
        read(tmp_path / "cut.parquet")


def test_the_embedded_corpus_is_the_standard_library_without_tests() -> None:
    names = [d.name for d in open_documents(TextConfig())]
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not [n for n in names if n.startswith(("test/", "site-packages/", "encodings/")) or "/test" in n]
    assert names != sorted(names)  # a prefix is a sample, not the letter a
    assert len(names) > 300


def test_tokenizers_without_bos_or_eos_are_refused(tokenizer: object) -> None:
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "[CLS]": 1, "a": 2}, unk_token="[UNK]"))
    bare = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", bos_token="[BOS]")
    bare.name_or_path = "bare"
    bare.bos_token = None
    with pytest.raises(ValueError, match="tokenizer 'bare' has neither a BOS nor an EOS token"):
        encoder_of(bare)
    named = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", cls_token="[CLS]")
    assert encoder_of(named).bos == 1  # as WordPiece models open a text
    encoder = encoder_of(tokenizer)
    assert encoder.bos == 0
    assert encoder.special == {0}
    assert np.ndim(encoder.encode(["a cat"])[0]) == 1

"""Text as it lies about -> documents in one fixed order: the embedded corpus, local files, a data set on the hub.

Local files are read here and, where they hold rows, by `rows.py`; what `datasets` saved or the hub has is read by `datasets`.
"""

import codecs
import dataclasses
import io
import itertools
import sysconfig
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash

from saebench.files import first_line, hash_files
from saebench.text.packing import Document, unit_hash
from saebench.text.rows import ROW_SUFFIXES, rows_of, suffix_of

EMBEDDED = "embedded"
# Tests, vendored packages and generated tables say little about Python as people write it.
_EMBEDDED_SKIP = frozenset(
    ["test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"]
)
_TEXT_SUFFIXES = frozenset({".txt", ".md", ".py"})
_BOMS = {
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_END: Any = object()  # behind the last row: a row may be null


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Which documents to read and how they are told apart."""

    dataset: str | None = None
    """a file or folder (txt, md, py, jsonl, parquet, arrow, jsonl.gz, or a data set saved by `save_to_disk`), the name of a data set on the hub, or `embedded` (the standard library of the running interpreter; the default of the embedded model)"""
    subset: str | None = None
    """configuration of a hub data set, where it has several"""
    split: str = "train"
    """split of a hub data set to read; documents are divided into train and validation here"""
    revision: str | None = None
    """branch, tag or commit of a hub data set (the store keeps to the commit that it is at the time)"""
    column: str | None = None
    """column that holds the text (default: `text`; a data set with an `input_ids` column is used as it is)"""
    id_column: str | None = None
    """column that names each document"""
    split_by: Literal["content", "name"] | None = None
    """what decides whether a document is held out: its content, so that equal ones fall into one split (the default), or its name or id, so that parts of one work can (the default of the embedded corpus, whose model was trained on one of the two parts)"""
    errors: Literal["strict", "replace"] = "strict"
    """of bytes that are no text: refuse the file by name, or read all of it as UTF-8 with U+FFFD in their place"""
    validation_fraction: float = 0.1
    """share of documents held out, chosen by a hash"""

    @property
    def source(self) -> str:
        """The data set, named or not."""
        return self.dataset or EMBEDDED

    @property
    def by_content(self) -> bool:
        """Whether a document's content decides its split."""
        return self.source != EMBEDDED if self.split_by is None else self.split_by == "content"

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction is {self.validation_fraction}; expected a number between 0 and 1")


def open_documents(config: TextConfig, start: int = 0) -> Iterator[Document]:
    """The documents of a data set from number `start` on, in an order that never changes.

    Raises ValueError when the data set, its split or its column cannot be found, and naming the file or row that cannot be read.
    """
    files = _text_files(config)
    if files is None:
        return _documents(config, _rows(config), start)
    if config.split != "train" or config.subset is not None:
        raise ValueError(f"dataset {config.source!r} is plain text, which has no --split {config.split} or --subset")
    return (_read_text(config, *files[index], index) for index in range(start, len(files)))


def fingerprint(config: TextConfig, begun: Mapping[str, Any] | None = None) -> str | None:
    """A hash of the names and contents of a local source's files; the commit of a hub data set, which one that was `begun` keeps to.

    It tells a resumed harvest that the text is no longer what it began with; `begun` is what that harvest noted of its text. Raises
    ValueError when there is no such file, none that can be read, or one of texts in another encoding.
    """
    files = _text_files(config)
    if files is None:
        path = local_path(config)
        if path is None:
            return _commit(config) if begun is None else begun["fingerprint"]
        files = [(path, file) for file in _files_under(path)]
    else:
        for _, file in files:
            _decoded(config, file)
    listing = sorted(f"{file.relative_to(root).as_posix()} {hash_files([file])}" for root, file in files)
    return xxhash.xxh3_128_hexdigest("\n".join(listing).encode("utf-8", "surrogateescape"))


def pinned(config: TextConfig, source: str | None) -> TextConfig:
    """The configuration with which to read what a fingerprint names: of a hub data set, that commit."""
    if source is None or config.source == EMBEDDED or local_path(config) is not None:
        return config
    return dataclasses.replace(config, revision=source)


def _commit(config: TextConfig) -> str:
    from huggingface_hub import HfApi

    try:
        sha = HfApi().dataset_info(config.source, revision=config.revision).sha
    except Exception as error:  # whatever stands between here and the hub
        raise _cannot_load(config, error) from error
    assert sha is not None
    return sha


# ----------------------------------------------------------------------------------------- files


def local_path(config: TextConfig) -> Path | None:
    """The file or folder of a data set; None where it is none. Raises ValueError for a path that is not there."""
    path = Path(config.source).expanduser()
    if config.source == EMBEDDED:
        return None
    if not path.exists() and config.source.startswith((".", "/", "~")):
        raise ValueError(
            f"dataset {config.source!r} does not exist; give a file, a folder, 'embedded' or the name of a hub data set"
        )
    return path if path.exists() else None


def _files_under(path: Path) -> list[Path]:
    """The file itself, or every file of a folder but hidden ones, sorted."""
    if not path.is_dir():
        return [path]
    files = (file for file in path.rglob("*") if not any(part[0] == "." for part in file.relative_to(path).parts))
    return sorted(file for file in files if file.is_file())


def _text_files(config: TextConfig) -> list[tuple[Path, Path]] | None:
    """(root, file) of every document where each file is one, None where documents are rows."""
    if config.source == EMBEDDED:
        root = Path(sysconfig.get_path("stdlib"))
        files = [
            file
            for file in root.rglob("*.py")
            if _EMBEDDED_SKIP.isdisjoint(file.relative_to(root).parts) and not file.name.startswith("_sysconfigdata")
        ]
        # In the order of a hash, every prefix of the corpus is a fair sample of it.
        return [
            (root, file) for file in sorted(files, key=lambda f: unit_hash("order", f.relative_to(root).as_posix()))
        ]
    path = local_path(config)
    if path is None:
        return None
    files = _files_under(path)
    rows = [file for file in files if suffix_of(file) in ROW_SUFFIXES]
    texts = [file for file in files if file.suffix in _TEXT_SUFFIXES]
    # Beside texts a .json is a setting of something; beside rows a README is about them.
    documents = [file for file in texts if not file.name.startswith("README")]
    data = [file for file in rows if suffix_of(file) != ".json"] if documents else rows
    if documents and data:
        raise ValueError(
            f"dataset {config.source!r} holds texts ({documents[0].name}) as well as rows ({data[0].name}): "
            "give a folder of one kind, or a single file"
        )
    if data:
        return None
    if not texts:
        known = " ".join(sorted(_TEXT_SUFFIXES | ROW_SUFFIXES))
        raise ValueError(f"dataset {config.source!r} holds no file that can be read; expected files ending in {known}")
    return [(path if path.is_dir() else path.parent, file) for file in texts]


def _read_text(config: TextConfig, root: Path, file: Path, index: int) -> Document:
    path, text = file.relative_to(root).as_posix(), _decoded(config, file)
    # A name need not be UTF-8 on disk; what is kept of it is.
    name = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return Document(index, name, text if config.by_content else path, text)


def _decoded(config: TextConfig, file: Path) -> str:
    """The text of a file: UTF-8, what its byte-order mark or, in Python source, its first lines say. Raises ValueError for another.

    Its lines end in newlines, whatever they end in on disk.
    """
    raw = file.read_bytes()
    if config.errors == "replace":
        return _lines(raw.decode("utf-8", "replace"))
    encoding = next((name for mark, name in _BOMS.items() if raw.startswith(mark)), "utf-8")
    try:
        if encoding == "utf-8" and file.suffix == ".py":
            encoding = tokenize.detect_encoding(io.BytesIO(raw).readline)[0]
        return _lines(raw.decode(encoding))
    except (UnicodeDecodeError, SyntaxError, LookupError) as error:
        place = f" (byte {error.start})" if isinstance(error, UnicodeDecodeError) else ""
        raise ValueError(
            f"{str(file)!r} is not text in {encoding}{place}: leave it out, turn it into UTF-8, for instance by "
            "`iconv -f LATIN1 -t UTF-8`, or give --errors replace"
        ) from error


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


# ------------------------------------------------------------------------------------------ rows


def _rows(config: TextConfig) -> Any:
    """The rows of a data set: something to iterate over, each a dictionary, with `skip(n)` where that is cheap."""
    path = local_path(config)
    if path is None:
        return _from_hub(config)
    if path.is_file():
        if config.split != "train" or config.subset is not None:
            raise ValueError(
                f"dataset {config.source!r} cannot be loaded: a single file has no --subset, and no --split but train"
            )
        return _local(config, [path])
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return _saved(config, path)
    return _local(config, _files_of_split(config, path))


def _wanted(config: TextConfig) -> list[str]:
    """The columns that may be used."""
    text = ["text", "input_ids"] if config.column is None else [config.column]
    return text + ([] if config.id_column is None else [config.id_column])


def _local(config: TextConfig, files: list[Path]) -> Iterator[Any]:
    return itertools.chain.from_iterable(rows_of(file, _wanted(config), config.errors) for file in files)


def _files_of_split(config: TextConfig, folder: Path) -> list[Path]:
    """The files of a folder that `datasets` would take for a split, by their names or by what a README says."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(str(folder), config.subset)
        by_split: Any = builder.config.data_files or {}
    except Exception as error:
        raise _cannot_load(config, error) from error
    if config.split not in by_split:
        raise _cannot_load(config, ValueError(f"it has no split {config.split!r}, but {', '.join(map(str, by_split))}"))
    return [Path(file) for file in by_split[config.split]]


def _saved(config: TextConfig, folder: Path) -> Any:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise _cannot_load(config, error) from error
    if isinstance(saved, datasets.DatasetDict):
        if config.split not in saved:
            raise _cannot_load(
                config, ValueError(f"it has no split {config.split!r}, but {', '.join(map(str, saved))}")
            )
        saved = saved[config.split]
    return saved.to_iterable_dataset()


def _from_hub(config: TextConfig) -> Any:
    import datasets

    try:
        rows: Any = datasets.load_dataset(
            config.source, config.subset, split=config.split, revision=config.revision, streaming=True
        )
        there = rows.column_names
        wanted = [name for name in _wanted(config) if there is not None and name in there]
        return rows.select_columns(wanted) if wanted else rows
    except Exception as error:
        raise _cannot_load(config, error) from error


def _cannot_load(config: TextConfig, error: Exception) -> ValueError:
    return ValueError(f"dataset {config.source!r} cannot be loaded: {first_line(error)}")


def _documents(config: TextConfig, rows: Any, start: int) -> Iterator[Document]:
    rows = iter(rows.skip(start)) if hasattr(rows, "skip") else itertools.islice(rows, start, None)
    for index in itertools.count(start):
        try:
            row = next(rows, _END)
        except ValueError as error:
            raise ValueError(f"dataset {config.source!r} cannot be read: {error}") from error
        except Exception as error:
            raise ValueError(
                f"row {index} of dataset {config.source!r} cannot be read: {type(error).__name__}: {error}"
            ) from error
        if row is _END:
            if index == 0:
                raise ValueError(f"dataset {config.source!r} is empty: no row could be read")
            return
        yield _document(config, row, index)


def _document(config: TextConfig, row: Any, index: int) -> Document:
    if not isinstance(row, dict):
        raise ValueError(
            f"row {index} of dataset {config.source!r} is no set of columns but {type(row).__name__}: give JSON objects, "
            'for instance {"text": "…"}'
        )
    if config.id_column is not None and config.id_column not in row:
        raise ValueError(f"id_column {config.id_column!r} is not in dataset {config.source!r}; it has {', '.join(row)}")
    name = f"{config.split}/{index}" if config.id_column is None else str(row[config.id_column])
    if "input_ids" in row and config.column is None:
        ids = row["input_ids"]
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise ValueError(
                f"input_ids of dataset {config.source!r} are no list of token ids in row {index}: expected whole numbers from 0 on, "
                "or choose a column of text with --column"
            )
        return Document(index, name, _key(config, name, repr(ids)), None, ids)
    column = config.column or "text"
    text = row.get(column, 0) if row.get(column, 0) is not None else ""  # a null is a document without text
    if not isinstance(text, str):
        have = ", ".join(f"{key} ({type(value).__name__})" for key, value in row.items())
        raise ValueError(
            f"column {column!r} of dataset {config.source!r} holds no text in row {index}; "
            f"it has {have}: choose one with --column"
        )
    # Half a character, where a text was cut in the middle of one, is no Unicode, and no tokenizer takes it.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return Document(index, name, _key(config, name, text), text)


def _key(config: TextConfig, name: str, content: str) -> str:
    """What decides a row's split; one without an id is known by its content alone."""
    return content if config.by_content or config.id_column is None else name

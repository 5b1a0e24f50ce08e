"""Text sources -> documents -> packed token contexts with provenance.

`open_documents` gives the documents of the embedded corpus, of local files or of a data set on the
hub, in one fixed order; `pack` cuts them into contexts of one length, never mixing the train and
validation splits, and keeps for every token the document and the position it came from.
"""

import hashlib
import itertools
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import xxhash

from saebench.files import hash_files

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

EMBEDDED = "embedded"
# Tests, vendored packages and generated tables say little about Python as people write it.
_EMBEDDED_SKIP = frozenset(
    ["test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"]
)
_TEXT_SUFFIXES = frozenset({".txt", ".md", ".py"})
_ROW_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Which documents to read and how they are told apart."""

    dataset: str = EMBEDDED
    """`embedded` (the standard library of the running interpreter), a file or folder (txt, md, py, jsonl, parquet, arrow, or a data set saved by `save_to_disk`), or the name of a data set on the hub"""
    subset: str | None = None
    """configuration of a hub data set, where it has several"""
    split: str = "train"
    """split of a hub data set to read; documents are divided into train and validation here"""
    revision: str | None = None
    """branch, tag or commit of a hub data set"""
    column: str | None = None
    """column that holds the text (default: `text`; a data set with an `input_ids` column is used as it is)"""
    id_column: str | None = None
    """column that names each document; without one, a row is known by its content"""
    validation_fraction: float = 0.1
    """share of documents held out, chosen by a hash of the document's name"""

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction is {self.validation_fraction}; expected a number between 0 and 1")


class Document(NamedTuple):
    """One document. `number` counts documents in the source's order, `key` decides its split.

    Exactly one of `text` and `input_ids` is set.
    """

    number: int
    name: str
    key: str
    text: str | None
    input_ids: Sequence[int] | None = None


class Context(NamedTuple):
    """`length` consecutive tokens of one split, BOS first.

    tokens, doc_id, position: int32 `[length]`; keep: bool `[length]`, False at special tokens.
    `documents` names the documents by their number. `cursor` is where the split's next context
    begins: (document index, tokens of it already used).
    """

    split: Split
    tokens: np.ndarray
    doc_id: np.ndarray
    position: np.ndarray
    keep: np.ndarray
    documents: dict[int, str]
    cursor: tuple[int, int]


class Encoder(NamedTuple):
    """What packing needs of a tokenizer: text -> ids, the id that opens a context, the special ids."""

    encode: Callable[[list[str]], list[list[int]]]
    bos: int
    special: frozenset[int]


def encoder_of(tokenizer: Any) -> Encoder:
    """The `Encoder` of a Hugging Face tokenizer. BOS falls back to EOS, as in GPT-2.

    Raises ValueError when the tokenizer has neither.
    """
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if bos is None:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} has neither a BOS nor an EOS token; contexts need one to open with: "
            "set tokenizer.bos_token and save the tokenizer again"
        )

    def encode(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    return Encoder(encode, bos, frozenset(tokenizer.all_special_ids) | {bos})


def split_of(key: str, validation_fraction: float) -> Split:
    """The split of a document: a hash of its key, so that it does not depend on its neighbours."""
    return "validation" if _unit_hash("split", key) < validation_fraction else "train"


def _unit_hash(salt: str, key: str) -> float:
    digest = hashlib.sha256(f"{salt}:{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


# ---------------------------------------------------------------------------------------- sources


def open_documents(config: TextConfig, start: int = 0) -> Iterator[Document]:
    """The documents of `config.dataset` from number `start` on, in an order that never changes.

    Raises ValueError when the data set, its split or its column cannot be found.
    """
    files = _text_files(config)
    if files is None:
        return _rows(config, _load(config), start)
    if config.split != "train" or config.subset is not None:
        raise ValueError(f"dataset {config.dataset!r} is plain text, which has no --split {config.split} or --subset")
    return (_read_text(*files[index], index) for index in range(start, len(files)))


def fingerprint(config: TextConfig) -> str | None:
    """A hash of the names and contents of a local source's files; None for a hub data set.

    It tells a resumed harvest that the files are no longer those it began with. Raises ValueError
    when there is no such file, or none that can be read.
    """
    files = _text_files(config)
    if files is None:
        path = _local_path(config)
        if path is None:
            return None
        files = [(path, file) for file in _files_under(path)]
    listing = sorted(f"{file.relative_to(root).as_posix()} {hash_files([file])}" for root, file in files)
    return xxhash.xxh3_128_hexdigest("\n".join(listing).encode("utf-8", "surrogateescape"))


def _local_path(config: TextConfig) -> Path | None:
    path = Path(config.dataset).expanduser()
    if config.dataset == EMBEDDED:
        return None
    if not path.exists() and config.dataset.startswith((".", "/", "~")):
        raise ValueError(
            f"dataset {config.dataset!r} does not exist; give a file, a folder, 'embedded' or the name of a hub data set"
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
    if config.dataset == EMBEDDED:
        root = Path(sysconfig.get_path("stdlib"))
        files = [
            file
            for file in root.rglob("*.py")
            if _EMBEDDED_SKIP.isdisjoint(file.relative_to(root).parts) and not file.name.startswith("_sysconfigdata")
        ]
        # In the order of a hash, every prefix of the corpus is a fair sample of it.
        return [
            (root, file) for file in sorted(files, key=lambda f: _unit_hash("order", f.relative_to(root).as_posix()))
        ]
    path = _local_path(config)
    if path is None:
        return None
    files = _files_under(path)
    rows = [file for file in files if file.suffix in _ROW_FORMATS]
    texts = [file for file in files if file.suffix in _TEXT_SUFFIXES]
    # Beside texts a .json is a setting of something; beside rows a README is about them.
    documents = [file for file in texts if not file.name.startswith("README")]
    data = [file for file in rows if file.suffix != ".json"] if documents else rows
    if documents and data:
        raise ValueError(
            f"dataset {config.dataset!r} holds texts ({documents[0].name}) as well as rows ({data[0].name}): "
            "give a folder of one kind, or a single file"
        )
    if data:
        return None
    if not texts:
        known = " ".join(sorted(_TEXT_SUFFIXES | set(_ROW_FORMATS)))
        raise ValueError(f"dataset {config.dataset!r} holds no file that can be read; expected files ending in {known}")
    return [(path if path.is_dir() else path.parent, file) for file in texts]


def _read_text(root: Path, file: Path, index: int) -> Document:
    name = file.relative_to(root).as_posix()
    return Document(index, name, name, file.read_text(encoding="utf-8", errors="replace"))


def _load(config: TextConfig) -> Any:
    """The rows as a streaming `datasets` data set, from a file, a folder, `save_to_disk` or the hub."""
    import datasets

    path = _local_path(config)
    try:
        if path is None:
            return datasets.load_dataset(
                config.dataset, config.subset, split=config.split, revision=config.revision, streaming=True
            )
        if path.is_file():
            if config.split != "train" or config.subset is not None:
                raise ValueError("a single file has no --subset, and no --split but train")
            return datasets.load_dataset(_ROW_FORMATS[path.suffix], data_files=str(path), split="train", streaming=True)
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            saved = datasets.load_from_disk(str(path))
            if isinstance(saved, datasets.DatasetDict):
                if config.split not in saved:
                    raise ValueError(f"it has no split {config.split!r}, but {', '.join(map(str, saved))}")
                saved = saved[config.split]
            return saved.to_iterable_dataset()
        return datasets.load_dataset(str(path), config.subset, split=config.split, streaming=True)
    except StopIteration as error:
        raise ValueError(f"dataset {config.dataset!r} is empty: no row could be read") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"dataset {config.dataset!r} cannot be loaded: {error}") from error


def _rows(config: TextConfig, rows: Any, start: int) -> Iterator[Document]:
    for index, row in enumerate(rows.skip(start), start):
        name = f"{config.split}/{index}"
        if "input_ids" in row and config.column is None:
            ids = row["input_ids"]
            yield Document(index, name, _row_key(config, row, repr(ids)), None, ids)
            continue
        column = config.column or "text"
        text = row.get(column, 0) if row.get(column, 0) is not None else ""  # a null is a document without text
        if not isinstance(text, str):
            have = ", ".join(f"{key} ({type(value).__name__})" for key, value in row.items())
            raise ValueError(
                f"column {column!r} of dataset {config.dataset!r} holds no text in row {index}; "
                f"it has {have}: choose one with --column"
            )
        yield Document(index, name, _row_key(config, row, text), text)


def _row_key(config: TextConfig, row: dict[str, Any], content: str) -> str:
    if config.id_column is None:
        return content
    if config.id_column not in row:
        raise ValueError(
            f"id_column {config.id_column!r} is not in dataset {config.dataset!r}; it has {', '.join(row)}"
        )
    return str(row[config.id_column])


# --------------------------------------------------------------------------------------- packing


def pack(
    documents: Iterator[Document],
    encoder: Encoder,
    length: int,
    validation_fraction: float,
    cursors: dict[Split, tuple[int, int]] | None = None,
    batch: int = 64,
) -> Iterator[Context]:
    """Cut the documents of each split into contexts of `length` tokens.

    A split's documents follow one another, each opened by BOS; every context opens with BOS too.
    The last context of a split is filled up with BOS, so that no token is lost and none is seen
    twice. Rows of a pre-tokenized data set are contexts already and pass through unchanged.

    To continue, give `cursors` as the contexts carried them and `documents` from the smallest
    document index among them.
    """
    cursors = cursors or dict.fromkeys(SPLITS, (0, 0))
    packers = {split: _Packer(split, encoder, length, cursors[split]) for split in SPLITS}
    while group := list(itertools.islice(documents, batch)):
        texts = {document.number: document.text for document in group if document.text is not None}
        encoded = dict(zip(texts, encoder.encode(list(texts.values())), strict=True)) if texts else {}
        for document in group:
            packer = packers[split_of(document.key, validation_fraction)]
            if document.input_ids is None:
                yield from packer.add(document, encoded[document.number])
            else:
                yield from packer.add_row(document)
    for packer in packers.values():
        yield from packer.finish()


class _Packer:
    """One split's contexts: the one being filled, and where in the documents the first of them begins."""

    def __init__(self, split: Split, encoder: Encoder, length: int, start: tuple[int, int]) -> None:
        self.split: Split = split
        self.bos = encoder.bos
        self.special = np.array(sorted(encoder.special), dtype=np.int32)
        self.length = length
        self.start = start
        self.filled = 0
        self.documents: dict[int, str] = {}
        self.tokens = np.empty(length, dtype=np.int32)
        self.doc_id = np.empty(length, dtype=np.int32)

    def add(self, document: Document, ids: Sequence[int]) -> Iterator[Context]:
        """Append a document; yields the contexts that it fills."""
        first, offset = self.start
        if document.number < first:
            return
        used = offset if document.number == first else 0
        opening = used == 0
        while used < len(ids):
            if opening or self.filled == 0:
                self._put(document, [self.bos])
                opening = False
            taken = min(self.length - self.filled, len(ids) - used)
            self._put(document, ids[used : used + taken])
            used += taken
            if self.filled == self.length:
                yield self._context((document.number, used))

    def add_row(self, document: Document) -> Iterator[Context]:
        """Pass on a context that came ready-made. Raises ValueError when its length is another."""
        assert document.input_ids is not None
        if document.number < self.start[0]:
            return
        if len(document.input_ids) != self.length:
            raise ValueError(
                f"row {document.name} of the pre-tokenized data set has {len(document.input_ids)} tokens, expected "
                f"{self.length}: its rows are used as they are, so give their length as --context"
            )
        self._put(document, document.input_ids)
        yield self._context((document.number + 1, 0))

    def finish(self) -> Iterator[Context]:
        """Fill the last context up with BOS."""
        if self.filled:
            last = int(self.doc_id[self.filled - 1])
            self.tokens[self.filled :] = self.bos
            self.doc_id[self.filled :] = last
            yield self._context((last + 1, 0))

    def _put(self, document: Document, ids: Sequence[int]) -> None:
        end = self.filled + len(ids)
        self.tokens[self.filled : end] = ids
        self.doc_id[self.filled : end] = document.number
        self.documents[document.number] = document.name
        self.filled = end

    def _context(self, cursor: tuple[int, int]) -> Context:
        tokens, doc_id, documents = self.tokens.copy(), self.doc_id.copy(), self.documents
        self.filled, self.documents = 0, {}
        keep = ~np.isin(tokens, self.special)
        position = np.arange(self.length, dtype=np.int32)
        return Context(self.split, tokens, doc_id, position, keep, documents, cursor)

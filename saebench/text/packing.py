"""Documents -> packed token contexts with provenance, never mixing the train and validation splits.

For every token the document and the position are kept that it came from.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


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
    bos: int | None
    """None without a tokenizer: contexts then come ready-made"""
    special: frozenset[int]

    def opened(self, ids: Sequence[int]) -> list[int]:
        """Tokens of a text with BOS before them, if they do not begin with it. Raises ValueError without a tokenizer."""
        bos = self.opening
        return [*ids] if len(ids) and ids[0] == bos else [bos, *ids]

    @property
    def opening(self) -> int:
        """BOS. Raises ValueError without a tokenizer."""
        if self.bos is None:
            raise ValueError(_NO_TOKENIZER)
        return self.bos


_NO_TOKENIZER = (
    "the model came without a tokenizer and takes no text: put its tokenizer's files beside its weights, or give a data set "
    "with a column input_ids"
)


def encoder_of(tokenizer: Any) -> Encoder:
    """The `Encoder` of a Hugging Face tokenizer. BOS falls back to EOS, as in GPT-2, and to CLS, as in WordPiece.

    Raises ValueError when the tokenizer has none of them.
    """

    def encode(texts: list[str]) -> list[list[int]]:
        if tokenizer is None:
            raise ValueError(_NO_TOKENIZER)
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    if tokenizer is None:
        return Encoder(encode, None, frozenset())
    named = [
        (getattr(tokenizer, kind), getattr(tokenizer, f"{kind}_id")) for kind in ("bos_token", "eos_token", "cls_token")
    ]
    # A tokenizer may name a token that its vocabulary lacks, and then gives the unknown token's id for it.
    known = (token for name, token in named if token is not None and tokenizer.convert_ids_to_tokens(token) == name)
    if (bos := next(known, None)) is None:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} has neither a BOS nor an EOS token; contexts need one to open with: "
            "set tokenizer.bos_token and save the tokenizer again"
        )
    return Encoder(encode, bos, frozenset(tokenizer.all_special_ids) | {bos})


def split_of(key: str, validation_fraction: float) -> Split:
    """The split of a document: a hash of its key, so that it does not depend on its neighbours."""
    return "validation" if unit_hash("split", key) < validation_fraction else "train"


def unit_hash(salt: str, key: str) -> float:
    """A number from 0 to 1 that looks random."""
    digest = hashlib.sha256(f"{salt}:{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


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
        self.encoder = encoder
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
            if (opening or self.filled == 0) and ids[used] != self.encoder.opening:
                self._put(document, [self.encoder.opening])
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
            self.tokens[self.filled :] = self.encoder.opening
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
        keep[0] = False  # an attention sink, whether or not a ready-made context has BOS there
        position = np.arange(self.length, dtype=np.int32)
        return Context(self.split, tokens, doc_id, position, keep, documents, cursor)

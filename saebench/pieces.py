"""What tokens stand for: their bytes, and the text that they show."""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np


class TokenBytes(dict[int, bytes]):
    """Token id -> the bytes that it stands for, so that the pieces of a text, joined, are the text.

    Reads the vocabulary of byte-level BPE (GPT-2 and most since), of SentencePiece with byte fallback, of WordPiece, whose words
    begin with a space here, of BPE that marks the end of words, and plain ones. Added tokens are the text that they say.
    Ids beyond the vocabulary, as padded embeddings have, stand for nothing. Without a tokenizer an id stands for its number.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._added: dict[int, str] = {}
        self._byte_level, self._word_end, self._inside_word = False, "", ""
        if tokenizer is None:
            return
        self._added: dict[int, str] = {}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            parts = json.loads(backend.to_str())
            self._byte_level = "ByteLevel" in json.dumps([parts.get(part) for part in ("pre_tokenizer", "decoder")])
            self._word_end = parts["model"].get("end_of_word_suffix") or ""
            self._inside_word = parts["model"].get("continuing_subword_prefix") or ""
        for token, added in tokenizer.added_tokens_decoder.items():
            # Runs of spaces are such tokens in SentencePiece's vocabularies, written as in its own pieces.
            own = not added.special and not self._byte_level
            self._added[token] = str(added).replace("\u2581", " ") if own else str(added)

    def __missing__(self, token: int) -> bytes:
        self[token] = self._read(token)
        return self[token]

    def all(self) -> list[bytes]:
        """The bytes of every token of the tokenizer, by id."""
        return [self[token] for token in range(self.size)]

    @cached_property
    def size(self) -> int:
        """One more than the greatest id that the tokenizer has."""
        return 0 if self._tokenizer is None else max(self._tokenizer.get_vocab().values(), default=-1) + 1

    def known(self, n_vocab: int) -> np.ndarray:
        """`[n_vocab]` which ids the tokenizer has; all of them without a tokenizer."""
        if self._tokenizer is None:
            return np.ones(n_vocab, bool)
        return np.isin(np.arange(n_vocab), list(self._tokenizer.get_vocab().values()))

    def text(self, tokens: Sequence[int]) -> str:
        """The text of some tokens in a row; bytes that are no whole character appear as `\\xNN`."""
        return "".join(show_text([self[int(token)] for token in tokens]))

    def _read(self, token: int) -> bytes:
        if self._tokenizer is None:
            return f" {token}".encode()
        if token in self._added:
            return self._added[token].encode()
        try:
            piece = self._tokenizer.convert_ids_to_tokens(int(token)) if token >= 0 else None
        except (IndexError, KeyError, OverflowError):
            piece = None
        if piece is None:
            return b""
        if isinstance(piece, bytes):  # a tokenizer of tiktoken's kind
            return piece
        if self._byte_level and all(letter in _BYTE_OF for letter in piece):
            return bytes(_BYTE_OF[letter] for letter in piece)
        if match := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(match[1])
        if self._inside_word:
            return (
                piece.removeprefix(self._inside_word) if piece.startswith(self._inside_word) else f" {piece}"
            ).encode()
        if self._word_end and piece.endswith(self._word_end):
            piece = piece.removesuffix(self._word_end) + " "
        return piece.replace("\u2581", " ").encode()


def _bytes_of_letters() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 letters stand for themselves, the other bytes for letters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _bytes_of_letters()


def show_bytes(piece: bytes) -> str:
    """The text of a token by itself; bytes that are no whole character appear as `\\xNN`."""
    return piece.decode("utf-8", "backslashreplace")


def show_text(pieces: Sequence[bytes]) -> list[str]:
    """The text of each token of a running text: a character made of several is whole at the first, and the rest of them are empty.

    Bytes that are part of no character appear as `\\xNN`, each at its token.
    """
    owner = [token for token, piece in enumerate(pieces) for _ in piece]
    shown, place = [""] * len(pieces), 0
    for letter in b"".join(pieces).decode("utf-8", "surrogateescape"):
        broken = "\udc80" <= letter <= "\udcff"
        shown[owner[place]] += f"\\x{ord(letter) - 0xDC00:02x}" if broken else letter
        place += 1 if broken else len(letter.encode())
    return shown

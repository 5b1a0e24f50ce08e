"""What tokens stand for: their bytes, and the text that they show."""

import re
from collections.abc import Sequence
from typing import Any


class TokenBytes(dict[int, bytes]):
    """Token id -> the bytes that it stands for, so that the pieces of a text, joined, are the text.

    Reads the vocabulary of byte-level BPE (GPT-2 and most since), of SentencePiece with byte fallback, and plain ones.
    Ids beyond the vocabulary, as padded embeddings have, stand for nothing.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._byte_level = backend is not None and "ByteLevel" in backend.to_str()
        self._special = set(tokenizer.all_special_ids)

    def __missing__(self, token: int) -> bytes:
        self[token] = self._read(token)
        return self[token]

    def all(self) -> list[bytes]:
        """The bytes of every token of the tokenizer, by id."""
        return [self[token] for token in range(len(self._tokenizer))]

    def _read(self, token: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token) if 0 <= token < len(self._tokenizer) else None
        if piece is None:
            return b""
        if token in self._special:
            return piece.encode()
        if self._byte_level and all(letter in _BYTE_OF for letter in piece):
            return bytes(_BYTE_OF[letter] for letter in piece)
        if match := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(match[1])
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

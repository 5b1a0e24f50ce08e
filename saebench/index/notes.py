"""What people say of latents: labels, tags and notes, in a small JSON file beside the index that outlives it."""

from pathlib import Path
from typing import Any, NamedTuple

from saebench.files import read_json, write_json, writing
from saebench.index.schema import check_header, check_identity

_HEADER = {"schema": "saebench-notes", "schema_version": 1}


class Note(NamedTuple):
    """What is written of one latent."""

    label: str = ""
    tags: tuple[str, ...] = ()
    text: str = ""


class Notes:
    """The notes of one SAE, by latent. Every change is on disk when `write` returns."""

    def __init__(self, path: Path, sae_hash: str, d_sae: int) -> None:
        """`path` is `index/NAME.notes.json`. Raises ValueError when it is not a file of notes on this SAE."""
        self.path, self.sae_hash, self.d_sae = path, sae_hash, d_sae
        self._written = self._when()
        self._of = self._read()

    def __getitem__(self, latent: int) -> Note:
        return self._now().get(latent, Note())

    def items(self) -> list[tuple[int, Note]]:
        return sorted(self._now().items())

    def write(self, latent: int, note: Note, *, seen: Note | None = None) -> None:
        """Set a latent's note; an empty one takes it away. Others' changes to other latents are kept.

        `seen` is the note that the writer had before them. Raises ValueError, and writes nothing, where another has
        changed it since.
        """
        if not 0 <= latent < self.d_sae:
            raise ValueError(f"latent is {latent}; expected 0 to {self.d_sae - 1}")
        with writing(self.path):
            found = self._read()
            there = found.get(latent, Note())
            if seen is not None and there not in (seen, note):
                raise ValueError(
                    f"latent {latent} was noted by someone else meanwhile, as {there.label or there.text or 'nothing'!r}; "
                    "yours is not saved: discard it to see theirs, and write it again if you still want to"
                )
            found[latent] = note
            latents = {str(key): value._asdict() for key, value in sorted(found.items()) if value != Note()}
            write_json(self.path, _HEADER | {"sae": self.sae_hash, "latents": latents})

    def _now(self) -> dict[int, Note]:
        """What the file holds, read again where it has changed."""
        if (when := self._when()) != self._written:
            self._of, self._written = self._read(), when
        return self._of

    def _when(self) -> int:
        return self.path.stat().st_mtime_ns if self.path.exists() else 0

    def _read(self) -> dict[int, Note]:
        if not self.path.exists():
            return {}
        content = read_json(self.path)
        check_header(content, self.path, _HEADER, "notes")
        check_identity(self.path, content, {"sae": self.sae_hash}, "move it away to begin anew")
        latents = content.get("latents")
        if not isinstance(latents, dict):
            raise ValueError(f"{self.path}: latents is {latents!r}; expected notes by number of the latent")
        return {self._number(key): self._note(key, value) for key, value in latents.items()}

    def _number(self, key: str) -> int:
        if not key.isdecimal() or int(key) >= self.d_sae:
            raise ValueError(f"{self.path}: {key!r} is not a latent; expected a number from 0 to {self.d_sae - 1}")
        return int(key)

    def _note(self, key: str, value: Any) -> Note:
        fields = {"label": str, "tags": list, "text": str}
        right = isinstance(value, dict) and all(
            name in fields and isinstance(part, fields[name]) for name, part in value.items()
        )
        if not right or not all(isinstance(tag, str) for tag in value.get("tags", [])):
            raise ValueError(
                f"{self.path}: latent {key} has {value!r}; expected a label, a list of tags and a text, all strings"
            )
        return Note(value.get("label", ""), tuple(value.get("tags", ())), value.get("text", ""))

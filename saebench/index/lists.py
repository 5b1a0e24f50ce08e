"""Lists of latents that people make and name, in a small JSON file beside the index that outlives it."""

from pathlib import Path
from typing import Any

from saebench.files import json_text, read_json, write_json, writing
from saebench.index.reader import FeatureIndex
from saebench.index.schema import check_header, check_identity

_HEADER = {"schema": "saebench-lists", "schema_version": 1}
_LONGEST = 60  # characters of a name


class Lists:
    """The lists of one SAE, by name, each in the order in which its latents came. Every change is on disk when its method returns."""

    def __init__(self, path: Path, sae_hash: str, d_sae: int) -> None:
        """`path` is `index/NAME.lists.json`."""
        self.path, self.sae_hash, self.d_sae = path, sae_hash, d_sae

    def all(self) -> dict[str, tuple[int, ...]]:
        """Raises ValueError for a file that holds no lists of this SAE."""
        return self._checked(read_json(self.path), self.path) if self.path.exists() else {}

    def holding(self, latent: int) -> list[str]:
        """The names of those that a latent is in."""
        return [name for name, latents in self.all().items() if latent in latents]

    def put(self, latent: int, names: list[str]) -> None:
        """Have a latent in the lists of these names and in no others; a list that is not there is made, one that is left empty goes."""
        self._check_latent(latent, "")
        names = [self._named(name) for name in names]

        def change(lists: dict[str, tuple[int, ...]]) -> None:
            for name in {*lists, *names}:
                others = tuple(one for one in lists.get(name, ()) if one != latent)
                there = lists.get(name, ()) if latent in lists.get(name, ()) else (*others, latent)
                lists[name] = there if name in names else others

        self._change(change)

    def delete(self, name: str) -> None:
        """Take a list away, where it is there."""
        self._change(lambda lists: lists.update({name: ()}))

    def export(self, name: str) -> str:
        """A list as JSON, for `add`. Raises ValueError where there is none of that name."""
        lists = self.all()
        if name not in lists:
            raise ValueError(f"list {name!r} is not there; there are {', '.join(map(repr, lists)) or 'none'}")
        return json_text(self._file({name: lists[name]}))

    def add(self, content: Any) -> list[str]:
        """Take in what `export` wrote, as JSON that was read: latents are added to lists of the same name. Returns the names.

        Raises ValueError for lists of another SAE, whose latents are others, and for what is no list.
        """
        given = self._checked(content, "what was given")

        def change(lists: dict[str, tuple[int, ...]]) -> None:
            for name, latents in given.items():
                lists[name] = tuple(dict.fromkeys((*lists.get(name, ()), *latents)))

        self._change(change)
        return list(given)

    def _change(self, change: Any) -> None:
        with writing(self.path):
            lists = self.all()
            change(lists)
            write_json(self.path, self._file({name: latents for name, latents in sorted(lists.items()) if latents}))

    def _file(self, lists: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        return _HEADER | {"sae": self.sae_hash, "lists": lists}

    def _checked(self, content: Any, where: Path | str) -> dict[str, tuple[int, ...]]:
        check_header(content, where, _HEADER, "lists of latents")
        check_identity(where, content, {"sae": self.sae_hash}, "its latents are others")
        lists = content.get("lists")
        if not isinstance(lists, dict) or not all(isinstance(latents, list) for latents in lists.values()):
            raise ValueError(f"{where}: lists is {lists!r}; expected latents by the name of their list")
        for latents in lists.values():
            for latent in latents:
                self._check_latent(latent, f"{where}: ")
        return {self._named(name): tuple(dict.fromkeys(latents)) for name, latents in lists.items()}

    def _check_latent(self, latent: Any, where: str) -> None:
        if isinstance(latent, bool) or not isinstance(latent, int) or not 0 <= latent < self.d_sae:
            raise ValueError(f"{where}latent is {latent!r}; expected 0 to {self.d_sae - 1}")

    @staticmethod
    def _named(name: str) -> str:
        if not name.strip() or len(name) > _LONGEST or not name.isprintable():
            raise ValueError(f"list {name!r} cannot be named so; expected 1 to {_LONGEST} characters on one line")
        return name.strip()


def lists_of(index: FeatureIndex) -> Lists:
    """The lists of the SAE that was indexed."""
    return Lists(index.path.with_suffix(".lists.json"), index.identity["sae"], index.d_sae)

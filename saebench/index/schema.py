"""What is in an index file: its version, and whether it belongs to an SAE, a store and a tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import h5py

from saebench.files import hash_files, read_json
from saebench.sae import weights_of
from saebench.store import Store

T = TypeVar("T")

INDEX_SCHEMA = "saebench-index"
INDEX_VERSIONS = (1, 2)
"""Version 2 leaves out massive rows and repeated passages, and says so of each latent; what 1 lacks is not shown."""


def identity_of(sae: Path, store: Store | None) -> dict[str, str]:
    """Hashes of what an index is made from, as far as it is there."""
    own = {"sae": hash_files(weights_of(sae))}
    if store is None:
        return own
    made = store.manifest["identity"]
    known = {name: made[name][what] for name, what in (("tokenizer", "files"), ("model", "weights")) if name in made}
    return own | {"store": store.hash} | known


def open_index(path: Path) -> Any:
    """The HDF5 file, for reading. Raises ValueError when it is none of this version's."""
    if not path.exists():
        raise ValueError(f"{path} is not there; make it with `saebench index --sae SAE`")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} cannot be read as HDF5 ({error}); delete it and index again") from error
    schema, version = file.attrs.get("schema"), file.attrs.get("schema_version")
    if schema != INDEX_SCHEMA or version not in INDEX_VERSIONS:
        file.close()
        raise ValueError(
            f"{path} has schema {schema!r} version {version}, this saebench reads {INDEX_SCHEMA!r} version {' and '.join(map(str, INDEX_VERSIONS))}; "
            "delete it and index again"
        )
    return file


def check_header(content: Any, where: Path | str, header: dict[str, Any], what: str) -> None:
    """Raises ValueError unless what was read as JSON has the `schema` and `schema_version` of a header; `what` such a file holds."""
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != header["schema"]:
        raise ValueError(
            f"{where} is not a file of {what}: its schema is {schema!r}, expected {header['schema']!r}; move it away, or take another"
        )
    version, read = content.get("schema_version"), header["schema_version"]
    if version != read:
        raise ValueError(f"{where} has version {version}, this saebench reads {read}; move it away, or take another")


def check_identity(
    path: Path | str, found: dict[str, Any], expected: dict[str, str], remedy: str = "index again with `saebench index`"
) -> None:
    """Raises ValueError naming what differs, with both hashes."""
    for what, value in expected.items():
        if found.get(what) != value:
            raise ValueError(
                f"{path} was made from another {what}: it says {found.get(what)}, this one is {value}; {remedy}"
            )


def read_beside(
    path: Path, header: dict[str, Any], what: str, belonging: dict[str, str], again: str, of: Callable[[Any], T]
) -> T | None:
    """`of` the JSON in a file beside an index; None where there is none.

    Raises ValueError, with how to make it `again`, where it is no file of `what`, of another SAE or index, or not as `of` expects.
    """
    if not path.exists():
        return None
    content, remedy = read_json(path), f"move it away, and {again}"
    check_header(content, path, header, what)
    check_identity(path, content.get("of") or {}, belonging, remedy)
    try:
        return of(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); {remedy}") from error

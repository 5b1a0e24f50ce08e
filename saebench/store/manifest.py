"""The manifest of a store: read, held to its hash, and published.

While a store is unfinished its manifest stays as it was begun, and each whole shard adds a line to a journal beside it.
"""

import json
import os
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest, xxh3_128_hexdigest

from saebench.files import json_text, read_json, write_json, write_text
from saebench.store.schema import EXTENSION, MANIFEST, MANIFEST_HASH, SCHEMA, SCHEMA_VERSIONS, shard_name


def read_manifest(folder: Path, name: str = MANIFEST) -> dict[str, Any]:
    """The manifest, an unfinished one with the shards of its journal.

    Raises ValueError when there is none, or one that this version cannot read, and for a damaged journal.
    """
    path = folder / name
    if not path.exists():
        if lost := sorted(folder.glob("shard-*.h5")):
            raise ValueError(f"{folder} holds {lost[0].name} and no {name} that says what it is: restore it")
        raise ValueError(
            f"{folder} holds no activation store (no {MANIFEST}); make one with `saebench harvest --out {folder}`"
        )
    manifest = read_json(path)
    if manifest.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not the manifest of an activation store: schema is {manifest.get('schema')!r}")
    if (version := manifest.get("schema_version")) not in SCHEMA_VERSIONS:
        raise ValueError(
            f"{folder} has schema version {version}, this saebench reads {' and '.join(map(str, SCHEMA_VERSIONS))}: "
            "use the version that wrote it, or harvest again"
        )
    if not manifest["complete"]:
        manifest["shards"] += _journalled(_journal(path), len(manifest["shards"]))
    return manifest


def check_manifest(folder: Path) -> None:
    """Hold the manifest to the hash beside it, where there is one. Raises ValueError where it is another."""
    path, side = folder / MANIFEST, folder / MANIFEST_HASH
    if path.exists() and side.exists() and side.read_bytes() != _hash_line(path.read_bytes()).encode():
        remedy = "restore both, or harvest again"
        if (folder / EXTENSION).exists():  # killed between the files that end an extension
            remedy = "finish the extension that was begun, by the same command"
        elif not _seems_complete(path):  # or a harvest
            remedy = "run the same harvest again to complete it"
        raise ValueError(f"{path} and {side.name} do not match, and are not what the harvest wrote: {remedy}")


def begin_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of an unfinished store, whose journal is empty yet."""
    _journal(path).unlink(missing_ok=True)
    if path.name == MANIFEST:
        path.with_name(MANIFEST_HASH).unlink(missing_ok=True)  # of a store that was there before
    write_json(path, manifest)


def add_to_journal(path: Path, entry: dict[str, Any]) -> None:
    """Add a whole shard's entry to those of the unfinished manifest in `path`; it is on disk when this returns."""
    with open(_journal(path), "ab") as file:
        file.write(_line(entry))
        file.flush()
        os.fsync(file.fileno())


def mend_journal(path: Path) -> None:
    """Take away what a kill has left of a last line, so that the next one begins where a line begins."""
    if (journal := _journal(path)).exists():
        os.truncate(journal, journal.read_bytes().rfind(b"\n") + 1)


def publish_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a whole store, with its hash beside it; the unfinished one in `path` and its journal go."""
    text = json_text(manifest)
    write_text(path.with_name(MANIFEST_HASH), _hash_line(text.encode()))
    write_text(path.with_name(MANIFEST), text)
    drop_unfinished(path)


def drop_unfinished(path: Path) -> None:
    """Delete what an unfinished manifest has left once the whole one is there."""
    _journal(path).unlink(missing_ok=True)
    if path.name != MANIFEST:
        path.unlink(missing_ok=True)


def _journal(path: Path) -> Path:
    return path.with_suffix(".jsonl")


def _line(entry: dict[str, Any]) -> bytes:
    shard = json.dumps(entry, sort_keys=True)
    return f'{{"shard": {shard}, "xxh3": "{xxh3_64_hexdigest(shard.encode())}"}}\n'.encode()


def _journalled(journal: Path, first: int) -> list[dict[str, Any]]:
    """The entries of a journal, whose shards are numbered from `first` on; without the last where a kill has cut it short."""
    entries: list[dict[str, Any]] = []
    lines = journal.read_bytes().split(b"\n") if journal.exists() else [b""]
    for line in lines[:-1]:
        try:
            entry = json.loads(line)["shard"]
            if _line(entry) != line + b"\n" or entry["file"] != shard_name(first + len(entries)):
                raise ValueError
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"line {len(entries) + 1} of {journal} is not what was written: delete this file, and the same command "
                "takes the shards from their own files"
            ) from error
        entries.append(entry)
    return entries


def _seems_complete(path: Path) -> bool:
    """Whether a manifest that may be damaged is one of a whole store."""
    try:
        return bool(read_json(path)["complete"])
    except (ValueError, KeyError, TypeError):
        return True


def _hash_line(content: bytes) -> str:
    return xxh3_128_hexdigest(content) + "\n"

"""The manifest of a store: read, held to its hash, and published."""

from pathlib import Path
from typing import Any

from xxhash import xxh3_128_hexdigest

from saebench.files import json_text, read_json, write_json, write_text
from saebench.store.schema import EXTENSION, MANIFEST, MANIFEST_HASH, SCHEMA, SCHEMA_VERSIONS


def read_manifest(folder: Path, name: str = MANIFEST) -> dict[str, Any]:
    """The manifest. Raises ValueError when there is none, or one that this version cannot read."""
    path = folder / name
    if not path.exists():
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
    return manifest


def check_manifest(folder: Path) -> None:
    """Hold the manifest to the hash beside it, where there is one. Raises ValueError where it is another."""
    path, side = folder / MANIFEST, folder / MANIFEST_HASH
    if path.exists() and side.exists() and side.read_bytes() != _hash_line(path.read_bytes()).encode():
        begun = (folder / EXTENSION).exists()  # killed between the files that end an extension
        remedy = (
            "finish the extension that was begun, by the same command" if begun else "restore both, or harvest again"
        )
        raise ValueError(f"{path} and {side.name} do not match, and are not what the harvest wrote: {remedy}")


def begin_manifest(folder: Path, name: str, manifest: dict[str, Any]) -> None:
    """Write the manifest of an unfinished store."""
    write_json(folder / name, manifest)


def publish_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a whole store, with its hash beside it; what stood in for it until then goes."""
    text = json_text(manifest)
    write_text(folder / MANIFEST_HASH, _hash_line(text.encode()))
    write_text(folder / MANIFEST, text)
    (folder / EXTENSION).unlink(missing_ok=True)


def _hash_line(content: bytes) -> str:
    return xxh3_128_hexdigest(content) + "\n"

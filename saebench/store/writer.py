"""Write a store shard by shard; what is finished survives whatever happens next."""

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from saebench.config import differences, flat
from saebench.files import hash_files, replacing
from saebench.store.manifest import (
    add_to_journal,
    begin_manifest,
    drop_unfinished,
    mend_journal,
    publish_manifest,
    read_manifest,
)
from saebench.store.schema import (
    BLOCK_ROWS,
    DOCUMENTS,
    EXTENSION,
    MANIFEST,
    SCHEMA,
    SCHEMA_VERSION,
    TOKENIZER,
    UNEMBEDDING,
    Moments,
    StoreDtype,
    shard_name,
)
from saebench.store.shard import Shard, entry_of, moments_of, open_shard
from saebench.store.shard_writer import ShardWriter


def _shards_in(folder: Path) -> dict[int, Path]:
    """The shards' files by their numbers."""
    found = ((re.fullmatch(r"shard-(\d{5,})\.h5", path.name), path) for path in folder.glob("shard-*.h5"))
    return {int(match[1]): path for match, path in found if match}


class StoreWriter:
    """Adds shards to the store in `folder`, creating it or continuing one made with the same `identity`.

    `identity` is everything that decides the store's contents. Raises ValueError, naming the values
    that differ, when the folder holds shards of another identity, and naming the shard when one that
    it would continue from is missing or damaged (block contents are checked as they are read).

    With `finished`, the manifest of a whole store, shards are added behind that store's, which stays what it is
    until `complete`: the manifest of the longer one is kept in a file of its own until then.
    Of several processes that write one store, the one that `leads` writes the manifest, and opens it first.
    """

    def __init__(
        self, folder: Path, identity: dict[str, Any], widths: dict[str, int], dtype: StoreDtype,
        *, finished: dict[str, Any] | None = None, leads: bool = True,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.widths = widths
        self.dtype: StoreDtype = dtype
        self.leads = leads
        self.path = folder / (MANIFEST if finished is None else EXTENSION)
        earlier = read_manifest(folder, self.path.name) if self.path.exists() else None
        changed = differences(flat(earlier["identity"]), flat(identity)) if earlier else []
        on_disk = {} if finished else _shards_in(folder)
        if earlier is None and on_disk:
            raise ValueError(
                f"{folder} holds {len(on_disk)} shards, {on_disk[min(on_disk)].name} for one, and no {MANIFEST} that says what they are: "
                "restore it, move the shards away, or choose another --out"
            )
        # Where no shard was written yet, nothing is lost by beginning again with other settings.
        if earlier is not None and (earlier["shards"] or on_disk or not changed):
            self.manifest = earlier
            if changed:
                raise ValueError(
                    f"{folder} holds a store made with other settings: {'; '.join(changed)}. "
                    "Use the same settings to continue it, or another --out, or delete it"
                )
            for entry in self.shards:
                Shard(folder, entry, self.manifest).check()
            if leads and self.manifest["complete"]:
                drop_unfinished(self.path)  # killed between the two
            elif leads:
                mend_journal(self.path)
                self.adopt()
        else:
            self.manifest = {
                "schema": SCHEMA, "schema_version": SCHEMA_VERSION, "identity": identity, "complete": False,
                "dtype": dtype, "block_rows": BLOCK_ROWS, "shards": list(finished["shards"] if finished else []),
                "hooks": {hook: {"d_in": width} for hook, width in widths.items()},
                **({"grown_from": [*finished.get("grown_from", []), hash_files([folder / MANIFEST])]} if finished else {}),
            }  # fmt: skip
            for path in self._present().values():
                path.unlink()  # of an extension that was given up: what lies beyond a manifest is always its own
            if finished is None:
                (folder / UNEMBEDDING).unlink(missing_ok=True)
            begin_manifest(self.path, self.manifest)

    @property
    def shards(self) -> list[dict[str, Any]]:
        return self.manifest["shards"]

    @property
    def present(self) -> frozenset[int]:
        """The numbers of whole shards on disk that the manifest does not have yet: another shard before them is missing."""
        return frozenset(self._present())

    def _present(self) -> dict[int, Path]:
        return {index: path for index, path in _shards_in(self.folder).items() if index >= len(self.shards)}

    def add_tokenizer(self, files: Sequence[Path]) -> None:
        """Copy the tokenizer's files beside the store, so that text is decoded without the model."""
        target = self.folder / TOKENIZER
        target.mkdir(exist_ok=True)
        for file in files:
            with replacing(target / file.name) as temporary:
                shutil.copyfile(file, temporary)

    @property
    def has_unembedding(self) -> bool:
        return (self.folder / UNEMBEDDING).exists()

    def add_unembedding(self, W_U: Tensor, gamma: Tensor, *, centred: bool, scale: float) -> None:
        """Write what leads from the residual stream to the logits, so that logit effects are known without the model.

        `W_U` `[D, V]` in the model's dtype, the final norm's weight `gamma` `[D]`, whether it is `centred`, and the logits' `scale`.
        """
        tensors = {
            "weight": W_U.detach().T.cpu().contiguous(),
            "gamma": gamma.detach().cpu().contiguous(),
            "scale": torch.tensor(scale),  # metadata of more than one key come in an order of chance
        }
        with replacing(self.folder / UNEMBEDDING) as temporary:
            safetensors.torch.save_file(tensors, temporary, {"centred": str(centred).lower()})

    @contextmanager
    def shard(
        self, rows: int, index: int | None = None
    ) -> Iterator[tuple[ShardWriter, dict[int, str], dict[str, Any]]]:
        """Shard number `index`, or the next, of `rows` rows: its writer, and the document names and attributes to fill in.

        It joins the store when the block ends without an exception, and leaves no trace otherwise.
        A full disk is a ValueError that says what is safe.
        """
        path = self.folder / shard_name(len(self.shards) if index is None else index)
        documents: dict[int, str] = {}
        attributes: dict[str, Any] = {}
        try:
            with replacing(path) as temporary:
                writer = ShardWriter(temporary, rows, self.widths, self.dtype)
                try:
                    yield writer, documents, attributes
                    writer.finish(attributes, documents)
                finally:
                    writer.close()
            if self.leads:
                self.adopt()
        except OSError as error:
            raise ValueError(
                f"writing {path} failed: {error}. The {len(self.shards)} whole shards before it are safe; "
                "free some space and run the same command again to continue"
            ) from error

    def adopt(self) -> None:
        """Take the shards on disk that come next into the journal, whoever wrote them."""
        while (path := self.folder / shard_name(len(self.shards))).exists():
            entry = entry_of(path, self.widths)
            add_to_journal(self.path, entry)
            self.shards.append(entry)

    def complete(self, facts: dict[str, Any]) -> None:
        """Merge the shards' statistics and document names, and mark the store whole."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        moments = {hook: Moments.zero(width) for hook, width in self.widths.items()}
        documents: dict[int, tuple[str, str]] = {}
        for entry in self.shards:
            with open_shard(self.folder / entry["file"]) as file:
                names = zip(
                    file["documents/doc_id"][:].tolist(), file["documents/name"].asstr()[:].tolist(), strict=True
                )
                documents |= {doc_id: (name, entry["split"]) for doc_id, name in names}
                if entry["split"] == "train":
                    moments = {hook: total.plus(moments_of(file, hook)) for hook, total in moments.items()}
        for hook, total in moments.items():
            self.manifest["hooks"][hook]["statistics"] = total.to_json()
        table = pa.table({
            "doc_id": pa.array(sorted(documents), pa.int32()),
            "name": [documents[doc_id][0] for doc_id in sorted(documents)],
            "split": [documents[doc_id][1] for doc_id in sorted(documents)],
        })  # fmt: skip
        with replacing(self.folder / DOCUMENTS) as temporary:
            pq.write_table(table, temporary)
        self.manifest |= {
            **facts,
            "documents": len(documents),
            "documents_hash": hash_files([self.folder / DOCUMENTS]),
            **({"unembedding_hash": hash_files([self.folder / UNEMBEDDING])} if self.has_unembedding else {}),
            "schema_version": SCHEMA_VERSION,  # also of a store that an earlier version began
            "complete": True,
        }
        publish_manifest(self.path, self.manifest)

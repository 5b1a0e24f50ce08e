"""Read a store: its rows by split and hook, its statistics, and what lies beside its shards."""

import functools
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from saebench.files import hash_files
from saebench.models import HOOK, parse_hook
from saebench.store.manifest import check_manifest, read_manifest
from saebench.store.schema import (
    DOCUMENTS,
    EXTENSION,
    MANIFEST,
    MANIFEST_HASH,
    NORM_BINS,
    TOKENIZER,
    UNEMBEDDING,
    Norms,
)
from saebench.store.shard import Shard, open_shard
from saebench.text import encoder_of

_AT_ONCE = 8192  # rows given at once
_SPREAD_ROWS = 256  # consecutive rows of a sample


class Store:
    """A finished store, opened for reading."""

    def __init__(self, folder: Path, manifest: dict[str, Any], hashed: str) -> None:
        self.folder = folder
        self.manifest = manifest
        self.hash = hashed
        """what runs and indexes know a store by; taken now, since an extension may end while this one is read"""
        self.hooks: list[str] = sorted(manifest["hooks"])
        self.context: int = manifest["identity"]["context"]
        self.shards = [Shard(folder, entry, manifest) for entry in manifest["shards"]]
        self._norms: dict[str, Norms] = {}

    def of_split(self, split: str) -> list[Shard]:
        return [shard for shard in self.shards if shard.split == split]

    def d_in(self, hook: str) -> int:
        return self._hook(hook)["d_in"]

    @property
    def grown_from(self) -> list[str]:
        """The `hash` of each store that this one was before an extension: the rows of those are its first, in the same order."""
        return self.manifest.get("grown_from", [])

    def statistics(self, hook: str) -> dict[str, Any]:
        """Over kept training rows: `rows`, `mean` `[d_in]`, `mean_squared_norm`, `median_norm`, `norms`."""
        return self._hook(hook)["statistics"]

    def norm_histogram(self, hook: str) -> np.ndarray:
        """Kept training rows in each bin of norms, `[NORM_BINS]`; from the shards of a store whose manifest has none yet."""
        total = np.zeros(NORM_BINS, dtype=np.int64)
        if norms := self.statistics(hook).get("norms"):
            total[norms["first_bin"] :][: len(norms["rows"])] = norms["rows"]
            return total
        for shard in self.of_split("train"):
            with open_shard(shard.path) as file:
                total += file[f"statistics/{hook}/norm_histogram"][:]
        return total

    def norms(self, hook: str) -> Norms:
        """Which rows are massive, and how long the others are."""
        if hook not in self._norms:
            self._norms[hook] = Norms.of(self.norm_histogram(hook))
        return self._norms[hook]

    def median_norm(self, hooks: Sequence[str]) -> float:
        """Of the rows that are not massive; of several hooks that of their vectors one behind the other, about."""
        return math.hypot(*(self.norms(hook).median for hook in hooks))

    def _hook(self, hook: str) -> dict[str, Any]:
        if hook not in self.manifest["hooks"]:
            raise ValueError(
                f"hook {hook!r} is not in {self.folder}; it has {', '.join(self.hooks)}{self._how_to_have(hook)}"
            )
        return self.manifest["hooks"][hook]

    def _how_to_have(self, hook: str) -> str:
        """The harvest of a store that has this hook beside its own; nothing where none is known that could give it."""
        made = self.manifest["identity"]
        if HOOK.fullmatch(hook) is None or not {"model", "text", "layers", "kinds"} <= made.keys():
            return ""
        layer, kind = parse_hook(hook)
        layers = ",".join(map(str, sorted({*made["layers"], layer})))
        kinds = dict.fromkeys([*made["kinds"], kind])
        if "mlp_in" in kinds:  # who has what an MLP reads wants what it writes
            kinds = dict.fromkeys([*(kind for kind in kinds if kind not in ("mlp_in", "mlp_out")), "mlp"])
        return (
            f". A store that has both: `saebench harvest --model {shlex.quote(made['model']['id'])} --dataset {shlex.quote(made['text']['dataset'])} "
            f"--layers {layers} --kinds {','.join(kinds)} --tokens {made['tokens']} --context {made['context']} --out ANOTHER`"
        )

    def rows(self, split: str, *, kept: bool = False) -> int:
        entries = [entry for entry in self.manifest["shards"] if entry["split"] == split]
        return sum(entry["kept" if kept else "rows"] for entry in entries)

    def usual_rows(
        self, hook: str, split: str, *, first: int | None = None, spread: int | None = None
    ) -> Iterator[Tensor]:
        """Kept rows of a split but for massive ones, in order, float32 `[n, d_in]` at a time: all of them, the `first` so many,
        or a sample: those among about `spread` rows from all over the split."""
        for rows in self.joint_rows([hook], split, first=first, spread=spread):
            yield rows[hook]

    def joint_rows(
        self, hooks: Sequence[str], split: str, *, first: int | None = None, spread: int | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """As `usual_rows`, of several hooks at once, the same tokens in all: without rows that are massive at one of them."""
        if spread is not None:
            stretches, together = list(self.spread(split, spread)), _AT_ONCE // _SPREAD_ROWS
            for i in range(0, len(stretches), together):
                parts = [self._usual(shard, hooks, *span) for shard, *span in stretches[i : i + together]]
                yield {hook: torch.cat([part[hook] for part in parts]) for hook in hooks}
            return
        left = self.rows(split) if first is None else first
        for shard, start, stop in self._stretches(split, _AT_ONCE):
            if left <= 0:
                return
            rows = {hook: some[:left] for hook, some in self._usual(shard, hooks, start, stop).items()}
            left -= len(rows[hooks[0]])
            yield rows

    def spread(self, split: str, limit: int) -> Iterator[tuple[Shard, int, int]]:
        """(shard, first row, after the last) of stretches of rows, about `limit` of them, evenly spread over a split: all of it, where it has no more."""
        places = self._stretches(split, _SPREAD_ROWS)
        n_places = len(places) if limit >= self.rows(split) else max(limit // _SPREAD_ROWS, 1)
        for i in np.unique(np.linspace(0, len(places) - 1, n_places).round().astype(int)):
            yield places[i]

    def _stretches(self, split: str, rows: int) -> list[tuple[Shard, int, int]]:
        """(shard, first row, after the last) of every so many rows of a split."""
        return [
            (shard, start, min(start + rows, shard.n_rows))
            for shard in self.of_split(split)
            for start in range(0, shard.n_rows, rows)
        ]

    def _usual(self, shard: Shard, hooks: Sequence[str], start: int, stop: int) -> dict[str, Tensor]:
        """Kept rows of a stretch that are massive at none of the hooks, float32."""
        keep = torch.from_numpy(shard.column("keep", start, stop).copy())
        rows = {hook: shard.rows(hook, start, stop)[keep].float() for hook in hooks}
        within = [some.norm(dim=1) <= self.norms(hook).bound for hook, some in rows.items()]
        usual = torch.stack(within).all(0)
        return {hook: some[usual] for hook, some in rows.items()}

    @property
    def prepends_bos(self) -> bool:
        """Whether contexts open with BOS: those of a data set that came as tokens need not."""
        tokenizer = self.tokenizer()
        return tokenizer is not None and int(self.shards[0].column("tokens", 0, 1)[0]) == encoder_of(tokenizer).bos

    def tokenizer(self) -> Any:
        """The tokenizer copied beside the store; None where the model came without."""
        folder = self.folder / TOKENIZER
        if not folder.exists() or not any(folder.iterdir()):
            return None
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        # AutoTokenizer imports the code of the model that the tokenizer belongs to, ten times what is needed here.
        whole = (folder / "tokenizer.json").exists()
        return (PreTrainedTokenizerFast if whole else AutoTokenizer).from_pretrained(folder)

    @property
    def has_unembedding(self) -> bool:
        """Whether the model's unembedding lies beside the store; not beside stores made before it was kept."""
        return "unembedding_hash" in self.manifest

    def unembedding(self) -> tuple[Tensor, Tensor, bool, float]:
        """(`W_U` `[D, V]`, the final norm's weight `[D]`, whether it takes off the mean first, what the logits are multiplied by).

        Raises ValueError where the file is not the one that the harvest wrote.
        """
        self._check_beside(UNEMBEDDING, self.manifest["unembedding_hash"])
        with safetensors.safe_open(self.folder / UNEMBEDDING, "pt") as file:
            scale = float(file.get_tensor("scale")) if "scale" in file.keys() else 1.0  # noqa: SIM118
            return file.get_tensor("weight").T, file.get_tensor("gamma"), file.metadata()["centred"] == "true", scale

    def verify(self, checked: Callable[[int], object] = lambda rows: None) -> list[str]:
        """What is wrong, a line for every damaged shard and what lies beside them; reports rows as they are checked.

        Shards are read in as many threads as there are cores.
        """

        def look(check: Callable[[], None]) -> str | None:
            try:
                check()
            except ValueError as error:
                return str(error)
            return None

        with ThreadPoolExecutor() as pool:
            checks = [functools.partial(shard.verify, checked) for shard in self.shards]
            return [line for line in pool.map(look, [self.verify_manifest, *checks, self.verify_beside]) if line]

    def verify_manifest(self) -> None:
        """As `check_manifest`; stores made before there was a hash have none."""
        if any("hash" in entry for entry in self.manifest["shards"]) and not (self.folder / MANIFEST_HASH).exists():
            raise ValueError(f"{self.folder / MANIFEST_HASH} is gone: restore it, or harvest again")
        check_manifest(self.folder)

    def verify_beside(self) -> None:
        """Check what lies beside the shards. Raises ValueError naming the part that is not as it was written."""
        expected = {
            TOKENIZER: self.manifest["identity"].get("tokenizer", {}).get("files"),
            DOCUMENTS: self.manifest["documents_hash"],
            UNEMBEDDING: self.manifest.get("unembedding_hash"),
        }
        for name, digest_then in expected.items():
            if digest_then is not None:
                self._check_beside(name, digest_then)

    def _check_beside(self, name: str, digest_then: str) -> None:
        path = self.folder / name
        files = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
        if hash_files(files) != digest_then:
            # Killed between the two files that end an extension: the names of its documents are there, its manifest is not.
            begun = name == DOCUMENTS and (self.folder / EXTENSION).exists()
            remedy = (
                "finish the extension that was begun, by the same command" if begun else "restore it, or harvest again"
            )
            raise ValueError(f"{path} is not what the harvest wrote: {remedy}")

    def document_names(self) -> dict[int, str]:
        """By number. From the shards, which name theirs too: reading Parquet takes 80 MiB of libraries."""
        names: dict[int, str] = {}
        for shard in self.shards:
            with open_shard(shard.path) as file:
                ids, found = file["documents/doc_id"][:], file["documents/name"].asstr()[:]
            names |= zip(ids.tolist(), found.tolist(), strict=True)
        return names


def open_store(folder: Path | str) -> Store:
    """Open a finished store. Raises ValueError when there is none, it is unfinished or of another schema."""
    folder = Path(folder)
    hashed, manifest = None, read_manifest(folder)
    while hashed != (hashed := hash_files([folder / MANIFEST])):  # an extension may end between the two
        manifest = read_manifest(folder)
    if not manifest["complete"]:
        raise ValueError(
            f"{folder} is unfinished ({len(manifest['shards'])} shards so far); run the same harvest again to complete it"
        )
    return Store(folder, manifest, hashed)

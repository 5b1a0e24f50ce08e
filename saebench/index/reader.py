"""Read a feature index: any latent at random, columns for the table, contexts cut from the store."""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from jaxtyping import Bool, Float
from torch import Tensor

from saebench.evaluate.attribution import Longest, longest_at
from saebench.files import found_from
from saebench.index.derive import FLAGS
from saebench.index.evidence import Sample
from saebench.index.ruled import Rule, Ruled
from saebench.index.schema import check_identity, identity_of, open_index
from saebench.models import load_tokenizer
from saebench.pieces import show_bytes, show_text
from saebench.sae import Ends, read_config
from saebench.store import Store
from saebench.store.schema import MANIFEST
from saebench.store.source import model_name, store_of

COLUMNS = {
    "density": "latents/density",
    "fires": "latents/fires",
    "max": "latents/max",
    "mean": "latents/mean",
    "std": "latents/std",
    "decoder_norm": "decoder/norm",
    "encoder_cosine": "decoder/encoder_cosine",
    "nearest_cosine": "decoder/cosines",
    "logit_std": "logits/std",
    "rule_f1": "rules/f1",
    "rule_detection": "rules/detection",
    "tokens_f1": "lists/f1",
    "tokens_detection": "lists/detection",
    "massive": "latents/massive",
    "flags": "latents/flags",
}
"""Columns of the table over all latents, where the file has them; of a column with several values a latent, the first."""


class Example(NamedTuple):
    """A firing: `row` in the store, and the activation there."""

    row: int
    value: float


class Ranked(NamedTuple):
    """Ids, best first, each with its figure."""

    ids: np.ndarray
    values: np.ndarray


class Interval(NamedTuple):
    """Firings of a latent between two strengths: how many, and some of them at random."""

    lower: float
    upper: float
    fires: int
    examples: list[Example]


class Context(NamedTuple):
    """Tokens around a row: `rows` in the store, `tokens` their ids, `pieces` their text, `peak` the place of the row."""

    rows: range
    tokens: np.ndarray
    pieces: list[str]
    peak: int
    doc_id: int


@dataclass(frozen=True)
class Latent:
    """Everything the index has of one latent. Where it was built without logits, or is not complete yet, parts are empty."""

    latent: int
    figures: dict[str, float]
    flags: tuple[str, ...]
    histogram: np.ndarray  # [N_BINS] firings in the index's bin_edges
    top: list[Example]
    intervals: list[Interval]
    random: list[Example]
    tokens: Ranked
    positions: np.ndarray  # [P] share of the rows of each bucket of positions on which it fires
    neighbours: Ranked
    lengths: np.ndarray
    """of its decoder row at each of the hooks written; none where there is but one"""
    pmi: Ranked
    jaccard: Ranked
    top_logits: Ranked
    bottom_logits: Ranked
    logit_histogram: tuple[np.ndarray, float, float]  # (counts in equal bins, lowest effect, highest)
    rule: Rule | None
    no_rule: str
    """why there is none"""
    tokens_rule: Rule | None
    """the list of at most eight tokens that says best where it fires"""


class FeatureIndex(Ruled):
    """An index file, with the store whose rows it points to. Close it, or use it in a `with` statement."""

    def __init__(self, path: Path, store: Store | None, model: str | None = None) -> None:
        """Without a store there are no contexts and examples; the tokenizer is then that of `model`."""
        self.path, self._store, self._model = path, store, model
        self._file = open_index(path)
        attributes = self._file.attrs
        self.d_sae, self.n_rows = int(attributes["d_sae"]), int(attributes["n_rows"])
        ends = json.loads(attributes["ends"]) if "ends" in attributes else [[attributes["hook"]]] * 2  # of before
        self.ends = Ends(*map(tuple, ends))
        self.complete = bool(attributes["complete"])
        self.context: int = int(attributes["context"])
        self.share_done = float(attributes["share_done"])
        self.bin_edges: np.ndarray = attributes["bin_edges"]
        self.position_edges: np.ndarray = attributes["position_edges"]
        self.identity: dict[str, str] = json.loads(attributes["identity"])

    @cached_property
    def longest(self) -> Longest:
        """The norm above which a vector at the hook read is massive: left out here, and left alone by whatever edits the stream."""
        if "longest" in self._file.attrs:
            return longest_at(np.ravel(self._file.attrs["longest"]).tolist())
        return longest_at([self.store.norms(hook).bound if self.has_store else math.inf for hook in self.ends.reads])

    @cached_property
    def belonging(self) -> dict[str, str]:
        """Hashes of what a figure taken with this index depends on: those of `identity`, and how the index was made and how far."""
        own = [str(self._file.attrs.get(name)) for name in ("schema_version", "settings", "n_rows")]
        return self.identity | {"index": xxhash.xxh3_128_hexdigest("\n".join(own).encode())}

    @property
    def store(self) -> Store:
        """Raises ValueError where the index was opened without one."""
        if self._store is None:
            raise ValueError(
                f"the store {self._file.attrs['store']} is gone, and with it the texts that {self.path} points to; "
                "bring it back, or harvest and index again"
            )
        return self._store

    @property
    def has_store(self) -> bool:
        return self._store is not None

    @cached_property
    def _first_rows(self) -> np.ndarray:
        return np.cumsum([0, *(shard.n_rows for shard in self.store.shards)])

    def __enter__(self) -> "FeatureIndex":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    # ------------------------------------------------------------------------------------ latents

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """The table: `[d_sae]` arrays by the names of COLUMNS, read once."""
        found = {name: self._data[path] for name, path in COLUMNS.items() if path in self._data}
        return {name: data[:] if data.ndim == 1 else data[:, 0] for name, data in found.items()}

    def flagged(self, flag: str) -> np.ndarray:
        """`[d_sae]` whether each latent has a flag (dead, dense, single_token, position_bound)."""
        return (self.columns["flags"] >> FLAGS.index(flag) & 1).astype(bool)

    def __len__(self) -> int:
        return self.d_sae

    def __getitem__(self, latent: int) -> Latent:
        """All of a latent. Raises ValueError when there is none of that number."""
        if not 0 <= latent < self.d_sae:
            raise ValueError(f"latent is {latent}; {self.path} has 0 to {self.d_sae - 1}")
        get = self._row(latent)
        flags = int(get("latents/flags"))
        counts, edges = get("intervals/counts"), get("intervals/edges")
        return Latent(
            latent=latent,
            figures={
                name: float(np.ravel(get(path))[0])
                for name, path in COLUMNS.items()
                if path in self._data and name != "flags"
            },
            flags=tuple(flag for bit, flag in enumerate(FLAGS) if flags >> bit & 1),
            histogram=get("histogram/counts"),
            top=_examples(get("top/rows"), get("top/values")),
            intervals=[
                Interval(float(lower), float(upper), int(count), _examples(rows, values))
                for lower, upper, count, rows, values in zip(
                    edges, edges[1:], counts, get("intervals/rows"), get("intervals/values"), strict=False
                )
                if count
            ],
            random=_examples(get("random/rows"), get("random/values")),
            tokens=_ranked(get("tokens/ids"), get("tokens/counts")),
            positions=get("positions/counts") / np.maximum(self._data["positions/rows"][:], 1),
            neighbours=_ranked(get("decoder/ids"), get("decoder/cosines")),
            lengths=get("decoder/lengths"),
            pmi=_ranked(get("companions/pmi_ids"), get("companions/pmi")),
            jaccard=_ranked(get("companions/jaccard_ids"), get("companions/jaccard")),
            top_logits=_ranked(get("logits/top_ids"), get("logits/top")),
            bottom_logits=_ranked(get("logits/bottom_ids"), get("logits/bottom")),
            logit_histogram=(
                get("logits/histogram"),
                float(np.sum(get("logits/low"))),
                float(np.sum(get("logits/high"))),
            ),
            rule=self._rule("rules", latent),
            no_rule=self._no_rule(latent),
            tokens_rule=self._rule("lists", latent),
        )

    @cached_property
    def top_logits(self) -> np.ndarray | None:
        """`[d_sae, 20]` ids of the tokens whose logits each latent raises most, −1 for none; None without logits."""
        return self._data["logits/top_ids"][:] if "logits/top_ids" in self._data else None

    @cached_property
    def top_tokens(self) -> np.ndarray:
        """`[d_sae, 50]` ids of the tokens on which each latent fires most, −1 for none."""
        return self._data["tokens/ids"][:]

    @cached_property
    def neighbours(self) -> tuple[np.ndarray, np.ndarray]:
        """(numbers of the 20 nearest other decoder rows of each latent, −1 for none, their cosines), `[d_sae, 20]` each."""
        return self._data["decoder/ids"][:], self._data["decoder/cosines"][:]

    @cached_property
    def top_rows(self) -> np.ndarray:
        """`[d_sae, 20]` rows of the strongest examples of each latent, one of a context, −1 for none."""
        return self._data["top/rows"][:]

    @cached_property
    def histograms(self) -> np.ndarray:
        """`[d_sae, N_BINS]` firings of each latent by strength, in `bin_edges`."""
        return self._data["histogram/counts"][:]

    def _row(self, latent: int) -> Any:
        def get(path: str) -> Any:
            return self._data[path][latent] if path in self._data else np.zeros(0)

        return get

    def quantiles(self, latents: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Share of each latent's firings that are no stronger than a value, to the precision of a bin of strength."""
        counts = self.histograms[latents]
        place = np.searchsorted(self.bin_edges, values, "right") - 1
        below = np.take_along_axis(np.pad(counts.cumsum(1), ((0, 0), (1, 0))), place[:, None], 1)[:, 0]
        lower, upper = self.bin_edges[place], np.minimum(self.bin_edges[place + 1], self.columns["max"][latents])
        within = np.clip((values - lower) / np.maximum(upper - lower, 1e-30), 0, 1)
        inside = np.take_along_axis(counts, place[:, None], 1)[:, 0]
        return (below + within * inside) / np.maximum(counts.sum(1), 1)

    def sample(self, split: str) -> Sample:
        """All firings on the rows chosen by their hash, of the training or the validation split."""
        return Sample(**{name: self._data[f"sample/{split}/{name}"][:] for name in Sample._fields})

    # ------------------------------------------------------------------------------------ contexts

    def context_of(self, row: int, around: int | None = None) -> Context:
        """The tokens within `around` of a row, or its whole context; never beyond the context."""
        number = int(np.searchsorted(self._first_rows, row, "right")) - 1
        shard, local = self.store.shards[number], row - int(self._first_rows[number])
        start = local // self.context * self.context
        stop = start + self.context
        if around is not None:
            start, stop = max(start, local - around), min(stop, local + around + 1)
        tokens = shard.column("tokens", start, stop)
        doc_id = int(shard.column("doc_id", local, local + 1)[0])
        rows = range(int(self._first_rows[number]) + start, int(self._first_rows[number]) + stop)
        return Context(rows, tokens, self.running(tokens), local - start, doc_id)

    def vectors(self, rows: range) -> tuple[Float[Tensor, "n D"], Bool[np.ndarray, " n"]]:
        """What is read at rows that lie in one shard, and whether each counts: an index of the first version counted massive ones."""
        number = int(np.searchsorted(self._first_rows, rows[0], "right")) - 1
        start, stop = (row - int(self._first_rows[number]) for row in (rows.start, rows.stop))
        shard = self.store.shards[number]
        longest = np.ravel(self._file.attrs.get("longest", [math.inf] * len(self.ends.reads))).tolist()
        read = [shard.rows(hook, start, stop).float() for hook in self.ends.reads]
        usual = [(x.norm(dim=1) <= bound).numpy() for x, bound in zip(read, longest, strict=True)]
        return torch.cat(read, 1), np.logical_and.reduce([shard.column("keep", start, stop), *usual])

    def pieces(self, tokens: np.ndarray) -> list[str]:
        """The text of each token alone; bytes that are no whole character as `\\xNN`."""
        return [show_bytes(self._bytes[int(token)]) for token in tokens]

    def running(self, tokens: np.ndarray) -> list[str]:
        """The text of each token of a text, as `show_text`."""
        return show_text([self._bytes[int(token)] for token in tokens])

    def known(self, n_vocab: int) -> np.ndarray:
        """`[n_vocab]` which ids are tokens, and no padding of the vocabulary."""
        return self._bytes.known(n_vocab)

    @cached_property
    def _tokenizer(self) -> Any:
        if self._store is None and self._model is not None:
            return load_tokenizer(self._model)
        return self.store.tokenizer()

    @cached_property
    def documents(self) -> dict[int, str]:
        """Names of documents by `doc_id`."""
        return self.store.document_names()


def open_feature_index(
    path: Path | str, *, sae: Path | str | None = None, store: Path | str | None = None, need_store: bool = True
) -> FeatureIndex:
    """Open an index with its store (default: where it was built), or unless `need_store` without one that is gone.

    Raises ValueError when the file is none of this version's, or was made from another SAE, store, tokenizer or model
    than those given.
    """
    path = Path(path)
    with open_index(path) as file:
        folder = Path(store) if store else found_from(path, Path(file.attrs["store"]))
        identity = json.loads(file.attrs["identity"])
    sae = Path(sae or path.parent.parent / "saes" / path.stem)
    opened = store_of(sae, folder) if need_store or (folder / MANIFEST).exists() else None
    expected = identity_of(sae, opened)
    if opened is not None and identity.get("store") in opened.grown_from:
        expected["store"] = identity["store"]  # its rows are still where they were
    check_identity(path, identity, expected)
    name = read_config(sae).get("metadata", {}).get("model_name")
    return FeatureIndex(path, opened, None if name is None else model_name(sae, name))


def _examples(rows: np.ndarray, values: np.ndarray) -> list[Example]:
    return [Example(int(row), float(value)) for row, value in zip(rows, values, strict=True) if row >= 0]


def _ranked(ids: np.ndarray, values: np.ndarray) -> Ranked:
    there = ids >= 0
    return Ranked(ids[there], values[there])

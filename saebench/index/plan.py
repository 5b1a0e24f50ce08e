"""What an index is built of: an SAE, a store, and the stretches of its rows that are gone over."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from saebench.config import Count
from saebench.index.evidence import MAX_ROWS
from saebench.labels import LABELLERS, SPACY, WORDNET, Labeller, labeller_of
from saebench.models import choose_device
from saebench.sae import SAE, Ends, ends_of, load_sae, read_config, written_here
from saebench.sae.hub import SaePath
from saebench.store import Store
from saebench.store.shard import Shard
from saebench.store.source import store_for, store_of

UNIT_ROWS = 2048


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Which SAE to index, on which rows."""

    sae: SaePath
    """SAE, made here or in any format that others release: its folder or file, hf:OWNER/REPO[@REVISION][/FOLDER] or a release by SAELens' name"""
    hook: str | None = None
    """hook that it reads, where its files do not say"""
    store: Path | None = None
    """activation store (default: the one the SAE was trained on)"""
    out: Path | None = None
    """file to write (default: index/NAME.h5 beside the folder saes/ that holds the SAE)"""
    tokens: Count = 10_000_000
    """training tokens to go over at most"""
    sample: Count = 300_000
    """rows, and as many held-out ones in whole contexts, of which everything that fires is kept: for tokens, companions and rules"""
    rules: bool = True
    """fit a rule and a list of tokens to each latent, and score them on held-out rows"""
    spacy: str | None = None
    """spaCy pipeline whose parts of speech, dependencies and entities are literals too (extra `prose`), such as en_core_web_sm"""
    wordnet: Path | None = None
    """directory of WordNet's database files, whose supersenses are literals too, such as /usr/share/wordnet"""
    logits: bool = True
    """give each latent's direct effect on the logits (loads the model where the store has no unembedding)"""
    workers: int | None = None
    """threads (default: one per core)"""
    device: str | None = None
    """cuda or cpu for the encoder (default: cuda where it is at hand)"""

    def __post_init__(self) -> None:
        for name in ("tokens", "sample"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected more than 0")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers is {self.workers}; expected 1 or more")

    def labellers(self) -> list[Labeller]:
        """Those that literals are of. Raises ValueError where what is named is not there."""
        extra = [] if self.wordnet is None else [f"{WORDNET}{self.wordnet.resolve()}"]
        extra += [] if self.spacy is None else [f"{SPACY}{self.spacy}"]
        return [*LABELLERS, *map(labeller_of, extra)]

    @property
    def path(self) -> Path:
        sae = self.sae.resolve()
        return self.out or sae.parent.parent / "index" / f"{sae.name}.h5"


class Piece(NamedTuple):
    """Where a unit lies: a stretch of a shard."""

    shard: Shard
    start: int  # in the shard
    n_rows: int
    first_row: int  # in the store


@dataclass
class Plan:
    """What a pass goes over."""

    sae: SAE
    store: Store
    ends: Ends
    bounds: tuple[float, ...]
    """rows of a greater norm are massive, at each hook read"""
    scale: float
    """a power of two near the median norm of what is written, from which bins of strength are counted"""
    pieces: list[Piece]
    below: dict[str, int]
    """hashes of the rows in the sample, by split"""


def plan_of(config: IndexConfig) -> Plan:
    """Raises ValueError when SAE, store and hooks do not belong together."""
    if config.out is None and not written_here(config.sae):
        raise ValueError(
            f"{config.sae} is another's, beside which nothing is written; give the file of its index with --out"
        )
    device = choose_device(config.device, float64=True)
    sae = load_sae(config.sae, device=device)
    ends = ends_of(config.sae, read_config(config.sae, hook=config.hook))
    store = store_of(config.sae, store_for(config.sae, config.store))
    for what, width, hooks in (("d_in", sae.d_in, ends.reads), ("d_out", sae.d_out, ends.writes)):
        widths = [store.d_in(hook) for hook in hooks]
        if sum(widths) != width or (what == "d_out" and tuple(widths) != sae.parts):
            parts = f" in parts of {', '.join(map(str, sae.parts))}" if what == "d_out" and len(sae.parts) > 1 else ""
            raise ValueError(
                f"{config.sae} has {what} {width}{parts}, but {' + '.join(hooks)} in {store.folder} has {' + '.join(map(str, widths))}; give its own --store"
            )
    pieces = list(_pieces(store, {"train": config.tokens, "validation": config.sample}))
    rows = {split: sum(p.n_rows for p in pieces if p.shard.split == split) for split in ("train", "validation")}
    if not rows["train"]:
        raise ValueError(f"{store.folder} has no training rows; harvest more tokens")
    if sum(shard.n_rows for shard in store.shards) >= MAX_ROWS:
        raise ValueError(f"{store.folder} has more than {MAX_ROWS} rows; an index holds no more")
    below = {"train": min(2**64 - 1, config.sample * 2**64 // rows["train"]), "validation": 2**64 - 1}
    scale = 2.0 ** round(math.log2(store.median_norm(ends.writes)))
    return Plan(sae, store, ends, tuple(store.norms(hook).bound for hook in ends.reads), scale, pieces, below)


def _pieces(store: Store, limits: dict[str, int]) -> Iterator[Piece]:
    """Whole contexts, the first of each split up to its limit of rows."""
    size = max(1, UNIT_ROWS // store.context) * store.context
    left = {split: -(-limit // store.context) * store.context for split, limit in limits.items()}
    first_row = 0
    for shard in store.shards:
        n_rows = min(shard.n_rows, left[shard.split])
        for start in range(0, n_rows, size):
            yield Piece(shard, start, min(size, n_rows - start), first_row + start)
        left[shard.split] -= n_rows
        first_row += shard.n_rows

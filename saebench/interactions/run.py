"""`saebench why`: which tokens a latent, or the token that comes next, needs together, and which in place of each other."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int

from saebench.config import Count
from saebench.evaluate.attribution import left_alone, read
from saebench.index.search import token_of
from saebench.interactions.explain import check_n, interactions
from saebench.interactions.found import Interactions, Sampled
from saebench.interactions.masking import Way, mask_of
from saebench.interactions.scalars import Scalar, activation, error, log_probability
from saebench.interactions.sparse import check_sparse, sparse_interactions
from saebench.sae import latent_encoder
from saebench.sae.hub import SaePath
from saebench.steer import Bench, open_bench
from saebench.store import open_store
from saebench.store.schema import MANIFEST
from saebench.store.source import recorded_store

_CORPUS = 2**20  # tokens that the mean embedding is of


@dataclass(frozen=True, kw_only=True)
class WhyConfig:
    """What to explain, where, and what to mask."""

    sae: SaePath
    """SAE, made here or in any format that others release"""
    latent: Count | None = None
    """number of the latent whose activation is explained"""
    error: bool = False
    """explain the norm of the SAE's error instead"""
    token: str | None = None
    """explain instead why this token comes next, by its log-probability; a leading space may be written ·"""
    against: str | None = None
    """and by how much it is above this one's"""
    text: str | None = None
    """text to explain it on"""
    example: Count | None = None
    """which of the latent's strongest examples in the index, from 1 (default, without a text: 1)"""
    position: Count | None = None
    """number of the token, 0 for BOS, at which it is explained (default: where the latent fires most; the last for others)"""
    n: Count = 10
    """units that are masked, at most 12 (100 with --sparse): all of a short text, else those that matter most when masked or present alone"""
    reach: Count = 32
    """units before the position among which these are, n at least; what lies before them stays"""
    sparse: bool = False
    """of 13 to 100 units: ANDs of few, fitted to some of the maskings, with R² on others"""
    maskings: Count = 1024
    """of --sparse: how many are run"""
    order: Count = 3
    """of --sparse: how many units an AND has at most"""
    words: bool = False
    """mask words, not tokens"""
    way: Way = "unattended"
    """what a masked token is: left out of attention, a neutral token, or the corpus' mean embedding"""
    other: Way | None = None
    """another way, to say which interactions do not depend on it (default: neutral; of neutral, unattended)"""
    json: bool = False
    """print JSON"""
    hook: str | None = None
    """hook that it reads, where neither its files nor an index say"""
    model: str | None = None
    """model that it is of, where neither its files nor an index say"""
    index: Path | None = None
    """index file (default: index/NAME.h5 beside the folder saes/ that holds the SAE)"""
    store: Path | None = None
    """activation store (default: the one that was indexed)"""
    device: str | None = None
    """cuda, mps or cpu (default: the first at hand)"""

    def __post_init__(self) -> None:
        asked = [self.latent is not None, self.error, self.token is not None]
        if sum(asked) != 1:
            raise ValueError("expected one of --latent N, --error and --token TOKEN: what is to be explained")
        if self.against is not None and self.token is None:
            raise ValueError("--against is compared with --token; give that, too")
        if self.text is not None and self.example is not None:
            raise ValueError("--text and --example are both given; expected one: what it is explained on")
        if self.text is None and self.latent is None:
            raise ValueError("there is no --text; expected one, since only a --latent has examples")
        if self.example == 0:
            raise ValueError("example is 0; expected 1, the strongest, or more")
        if self.other == self.way:
            raise ValueError(
                f"way and other are both {self.way!r}; expected two, of which one is held against the other"
            )
        if self.sparse and self.other is not None:
            raise ValueError("--other is of all maskings, --sparse of some; expected one of them")
        if self.sparse:
            check_sparse(self.n, self.maskings, self.order)
        else:
            check_n(self.n)


def why(config: WhyConfig) -> Interactions | Sampled:
    """Explain one number of a model on one text.

    Raises ValueError for an example that there is not, a position beyond the text, a latent that does not fire there, a token that is
    none or several, and as `open_bench`, `mask_of` and `interactions` do.
    """
    bench = open_bench(
        config.sae, index=config.index, store=config.store, device=config.device, hook=config.hook, model=config.model
    )
    ids, scalar = _where(config, bench), _scalar(config, bench)
    counts = corpus_counts(bench)
    mask = mask_of(bench.model, config.way, counts)
    units = {"n": config.n, "reach": max(config.reach, config.n), "words": config.words}
    if config.sparse:
        return sparse_interactions(
            bench.model, ids, scalar, mask, **units, maskings=config.maskings, order=config.order
        )
    other = mask_of(bench.model, config.other or other_way(config.way), counts)
    return interactions(bench.model, ids, scalar, mask, other, **units)


def other_way(way: Way) -> Way:
    """The one that a way is held against, where none is named."""
    return "unattended" if way == "neutral" else "neutral"


def corpus_counts(bench: Bench) -> Int[np.ndarray, " V"] | None:
    """How often each token is among the first of the store that was indexed or trained on; None where there is none."""
    store = bench.index.store if bench.index is not None and bench.index.has_store else None
    if store is None and (folder := recorded_store(bench.folder)) is not None and (folder / MANIFEST).exists():
        store = open_store(folder)
    if store is None:
        return None
    counts = np.zeros(bench.model.n_vocab, np.int64)
    for shard in store.shards:
        counts += np.bincount(shard.column("tokens"), minlength=len(counts))
        if counts.sum() >= _CORPUS:
            break
    return counts


def _scalar(config: WhyConfig, bench: Bench) -> Scalar:
    if config.latent is not None:
        return activation(bench.sae, bench.ends, config.latent)
    if config.token is None:
        return error(bench.sae, bench.ends)
    token, against = (None if text is None else token_of(bench.model, text) for text in (config.token, config.against))
    assert token is not None
    return log_probability(bench.model, token, against)


def _where(config: WhyConfig, bench: Bench) -> Int[np.ndarray, " L"]:
    """The tokens up to the position that is explained."""
    position = config.position
    if config.text is None:
        ids, peak = _example(config, bench)
        position = peak if position is None else position
    else:
        ids = np.array(bench.model.tokens_of(config.text), np.int64)
    if config.latent is not None:
        acts = activations(bench, ids, config.latent)
        if not acts.any():
            raise ValueError(
                f"latent {config.latent} fires nowhere in this text; choose one in which it does, or an --example"
            )
        position = int(acts.argmax()) if position is None else position
        if position < len(ids) and acts[position] <= 0:
            fires = ", ".join(map(str, np.argsort(-acts)[: min(8, (acts > 0).sum())].tolist()))
            raise ValueError(
                f"latent {config.latent} does not fire at token {position} "
                f"({bench.model.pieces.text(ids[position : position + 1].tolist())!r}); expected one at which it does, strongest first: {fires}"
            )
    position = len(ids) - 1 if position is None else position
    if position >= len(ids):
        raise ValueError(f"position is {position}; the text has tokens 0 to {len(ids) - 1}")
    return ids[: position + 1]


def _example(config: WhyConfig, bench: Bench) -> tuple[Int[np.ndarray, " L"], int]:
    """(the context of an example of the latent, the place where it fires)."""
    if bench.index is None:
        raise ValueError(
            f"{config.sae} has no index, which has the examples; give --text, or run `saebench index --sae {config.sae}`"
        )
    assert config.latent is not None
    if config.latent >= bench.index.d_sae:
        raise ValueError(f"latent is {config.latent}; the SAE has 0 to {bench.index.d_sae - 1}")
    top, number = bench.index[config.latent].top, config.example or 1
    if number > len(top):
        raise ValueError(f"example is {number}; the index has {len(top)} of latent {config.latent}")
    context = bench.index.context_of(top[number - 1].row)
    return context.tokens.astype(np.int64), context.peak


@torch.no_grad()
def activations(bench: Bench, ids: Int[np.ndarray, " L"], latent: int) -> np.ndarray:
    """A latent's activation on each token of a text; 0 on special ones and massive vectors, which are none of its."""
    tokens = torch.from_numpy(ids).to(bench.model.device)
    encode = latent_encoder(bench.sae, [latent])
    x_LD = read(bench.model, tokens[None], bench.ends)[0][0]
    acts_L = encode(x_LD.to(bench.sae.W_dec.device))[:, 0].cpu()
    return acts_L.masked_fill(left_alone(bench.model, tokens, x_LD, bench.longest).cpu(), 0.0).numpy()

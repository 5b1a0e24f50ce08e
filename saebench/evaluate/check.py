"""A look before trust: does an SAE that others trained do on a store's rows what it says of itself, and if not, why not?

x is what it reads and y what it writes, N rows of them; an SAE writes what it reads. Nothing here is a result: a few thousand rows
tell a wrong layer, scale or threshold from a right one in seconds.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from saebench.config import Count
from saebench.evaluate.causes import (
    Some,
    Sums,
    causes,
    is_off,
    joined,
    of_names,
    of_silence,
    pairs_of,
    stated_l0,
    thinned,
)
from saebench.models import choose_device
from saebench.sae import ends_of, load_sae, read_config
from saebench.sae.hub import SaePath
from saebench.store import Store, open_store
from saebench.store.source import store_for

log = logging.getLogger(__name__)
_DOUBTFUL = 0.3  # FVU from which on causes are looked for


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Which SAE to look at, on which rows."""

    sae: SaePath
    """SAE directory of any known format, hf:OWNER/REPO[@REVISION][/FOLDER] or a SAELens RELEASE//ID"""
    hook: str | None = None
    """hook that it reads, where its files do not say"""
    store: Path | None = None
    """activation store (default: the one the SAE was trained on)"""
    rows: Count = 20_000
    """training rows to look at, about, from all over the store"""
    device: str | None = None
    """cuda or cpu (default: cuda where it is at hand)"""


class Look(NamedTuple):
    """What an SAE does on some rows, and what does not fit."""

    name: str
    rows: int
    l0: float
    stated: float | None
    """active latents per row that it says it has"""
    fvu: float
    """of what it writes"""
    silent: float
    """share of latents that never fired"""
    decoder: tuple[float, float, float]
    """least, median and greatest norm of its decoder rows"""
    read: float
    """root mean square norm of what it reads"""
    written: float
    """of what it should write"""
    reconstructed: float
    """of what it writes"""
    warnings: tuple[str, ...]

    def lines(self) -> tuple[str, str]:
        """The figures in words."""
        stated = "" if self.stated is None else f" (it states {self.stated:g})"
        rows = f"rows of norm {self.read:.3g}" + (f" to {self.written:.3g}" if self.written != self.read else "")
        low, median, high = self.decoder
        return (
            f"{self.name} on {self.rows:,} rows: L0 {self.l0:.1f}{stated}, FVU {self.fvu:.3f}, {self.silent:.1%} of its latents never fired",
            f"  it writes vectors of norm {self.reconstructed:.3g} for {rows}; decoder norms {low:.3g} to {high:.3g}, median {median:.3g}",
        )


def check(config: CheckConfig) -> Look:
    """Look at an SAE. Raises ValueError where it cannot be opened, or the store does not have what it reads and writes."""
    store = open_store(store_for(config.sae, config.store))
    return look(config.sae, store, rows=config.rows, device=config.device, hook=config.hook)


def look_at_others(folder: Path, store: Store, device: str | None = None, hook: str | None = None) -> None:
    """Log a look at an SAE that was not trained here."""
    metadata = read_config(folder).get("metadata", {})
    if "source" in metadata or "saebench" not in metadata:
        say(look(folder, store, device=device, hook=hook))


def say(found: Look) -> None:
    """Log what was seen."""
    log.info("%s", "\n".join(found.lines()))
    for warning in found.warnings:
        log.warning("  warning: %s", warning)


@torch.inference_mode()
def look(folder: Path, store: Store, *, rows: int = 20_000, device: str | None = None, hook: str | None = None) -> Look:
    """What an SAE does on about so many usual training rows of a store; `hook` of one that does not say which it reads."""
    config = read_config(folder, hook=hook)
    ends = ends_of(folder, config)
    sae = load_sae(folder, device=choose_device(device, float64=True))
    for what, hooks, width in (("takes", ends.reads, sae.d_in), ("writes", ends.writes, sae.d_out)):
        if (there := sum(map(store.d_in, hooks))) != width:
            raise ValueError(
                f"{folder} {what} vectors of {width}, {', '.join(hooks)} in {store.folder} has {there}: it is of another model or hook"
            )
    seen = Sums(sae)
    tried: list[Some] = []
    for x_ND, y_NE in pairs_of(store, ends, sae, rows):
        seen.add(x_ND, y_NE)
        tried.append(thinned(x_ND, y_NE, rows))
    if not seen.rows:
        raise ValueError(f"{store.folder} has no training rows to look at; harvest more tokens")
    norms_F = sae.W_dec.norm(dim=1)
    stated, l0 = stated_l0(sae, config), seen.l0 / seen.rows
    some = joined(tried)
    doubtful = not seen.fvu < _DOUBTFUL or is_off(l0, stated)
    return Look(
        name=folder.name,
        rows=seen.rows,
        l0=l0,
        stated=stated,
        fvu=seen.fvu,
        silent=float((seen.fires_F == 0).double().mean()),
        decoder=(float(norms_F.min()), float(norms_F.median()), float(norms_F.max())),
        read=math.sqrt(seen.squared_read / seen.rows),
        written=math.sqrt(seen.squared_y / seen.rows),
        reconstructed=math.sqrt(seen.squared_hat / seen.rows),
        warnings=tuple(of_names(config, store))
        + tuple(causes(sae, ends, store, some, stated, doubtful))
        + tuple(of_silence(seen, stated)),
    )

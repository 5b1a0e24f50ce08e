"""Whether SAEs that differ in seed alone find the same latents. Legend: F, G latents, P pairs of them, n values."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import stdtrit

from saebench.bench.results import Figure, Results, as_rate, as_shares, interval
from saebench.config import Count
from saebench.evaluate.measure import Dictionary, silent_latents
from saebench.files import hash_files
from saebench.index.compare import Matching, one_to_one
from saebench.models import choose_device
from saebench.runlog import progress
from saebench.sae import SAE, encode_sparse, ends_of, load_sae, read_config, weights_of
from saebench.sae.hub import SaePath
from saebench.store import Store
from saebench.store.source import store_for, store_of

NAME, VERSION = "stability", 2
RETURNS = (0.7, 0.9)
"""cosines above which a latent has come back"""
_OF_SEEDS = ("name", "seed", "order", "set")  # what may differ in the identities of SAEs that differ in seed alone
_SHARES = ("returning", "dead")
_LEAST = 10  # values below which there is no interval
_FIRST = 8192  # held-out rows on which all latents are looked for


@dataclass(frozen=True, kw_only=True)
class StabilityConfig:
    """Which SAEs to hold against each other."""

    run: Path
    """run directory: writes RUN/bench/stability.json"""
    sae: tuple[SaePath, ...] = ()
    """two SAEs or more of one hook, folders, files or hf:OWNER/REPO[@REVISION][/FOLDER] (default: those of the run that differ in seed alone)"""
    store: Path | None = None
    """activation store that dead latents are told by (default: the one that the SAEs were trained on)"""
    rows: Count = 200_000
    """training rows, beside 8,192 held-out ones, in which a latent must fire once not to be left out as dead"""
    seed: int = 0
    """of the sample that many latents are matched by, and of the untrained pair"""
    device: str | None = None
    """cuda or cpu (default: cuda where it is at hand)"""


class _Side(NamedTuple):
    name: str
    folder: Path
    weights: str
    """their hash"""


def stability(config: StabilityConfig) -> list[Figure]:
    """The mean over each group of seeds, with that of an untrained pair; those of each pair are in RUN/bench/stability.json.

    Raises ValueError where there are no two SAEs to be held against each other, or they are of different hooks.
    """
    groups = [list(config.sae)] if config.sae else _seeds(config.run)
    if not groups or min(map(len, groups)) < 2:
        raise ValueError(
            f"{config.run} has no SAEs that differ in seed alone; train some with `saebench train --seed 0,1,2`, or give two or "
            "more of one hook with --sae"
        )
    results = Results(config.run / "bench" / f"{NAME}.json", NAME)
    found: list[Figure] = []
    for folders in groups:
        found += _Group(config, results, folders).figures()
    return found


def _seeds(run: Path) -> list[list[Path]]:
    """SAEs of a run that were told the same but for their seed, by two or more."""
    groups: dict[str, list[Path]] = {}
    for path in sorted((run / "saes").glob("*/cfg.json")):
        identity = read_config(path.parent).get("metadata", {}).get("saebench", {}).get("identity")
        if identity:
            told = {name: value for name, value in identity.items() if name not in _OF_SEEDS}
            groups.setdefault(repr(sorted(told.items())), []).append(path.parent)
    return [group for group in groups.values() if len(group) > 1]


def _hooks(folder: Path) -> str:
    """Which vectors a dictionary reads and writes, in words."""
    config = read_config(folder)
    return f"{ends_of(folder, config)}, {config.get('d_out', config['d_in'])} dimensions"


class _Group:
    """SAEs of one hook, in pairs; what is not needed for pairs that are done is never loaded."""

    def __init__(self, config: StabilityConfig, results: Results, folders: Sequence[Path]) -> None:
        self.config, self.results = config, results
        ends = {_hooks(folder): folder for folder in folders}
        if len(ends) > 1:
            both = " and ".join(f"{folder} ({hooks})" for hooks, folder in ends.items())
            raise ValueError(f"{both} are of different hooks; expected SAEs of one")
        names = [folder.name for folder in folders]
        self.sides = [
            _Side(
                folder.name if names.count(folder.name) == 1 else str(folder),
                folder,
                hash_files(weights_of(folder)),
            )
            for folder in folders
        ]
        self.store: Store = store_of(folders[0], store_for(folders[0], config.store))
        self.device = choose_device(config.device, float64=True)
        self._open: dict[str, tuple[SAE, np.ndarray]] = {}

    def figures(self) -> list[Figure]:
        """Of the seeds together, and of the untrained pair."""
        pairs = list(itertools.combinations(self.sides, 2))
        with progress(len(pairs) + 1, f"match seeds of {self.sides[0].name}", "pair", delay=1.0) as bar:
            of_pairs = []
            for pair in pairs:
                of_pairs.append(self._pair(*pair))
                bar.update()
            untrained = self._untrained(*pairs[0])
            bar.update()
        name, whole = self.sides[0].name, of_pairs[0]
        if len(pairs) > 1:
            whole = [_over_seeds(columns, len(self.sides)) for columns in zip(*of_pairs, strict=True)]
        label = " ~ ".join(side.name for side in self.sides) if len(self.sides) == 2 else f"{len(self.sides)} seeds"
        return [*(each._replace(sae=name, of=label) for each in whole), *untrained]

    def _identity(self, pair: Sequence[_Side]) -> dict[str, Any]:
        config = self.config
        told = {name: getattr(config, name) for name in ("rows", "seed")}
        return {"version": VERSION, "weights": [side.weights for side in pair], "store": self.store.hash, **told}

    def _pair(self, left: _Side, right: _Side) -> list[Figure]:
        unit, identity = f"{left.name} ~ {right.name}", self._identity((left, right))
        if (done := self.results.get(unit, identity)) is not None:
            return done
        (one, alive_F), (other, alive_G) = self._opened(left), self._opened(right)
        matching = one_to_one(one.W_dec, other.W_dec, alive_F, alive_G, self.config.seed)
        encoder_P = torch.cosine_similarity(one.W_enc.T[matching.left], other.W_enc.T[matching.right], dim=1)
        dead = Figure(left.name, unit, "dead", None, 1 - float(np.concatenate([alive_F, alive_G]).mean()))
        figures = figures_of(matching, encoder_P.double().cpu().numpy(), left.name, unit)
        return self.results.put(unit, identity, [*figures, dead._replace(n=len(alive_F) + len(alive_G))])

    def _untrained(self, left: _Side, right: _Side) -> list[Figure]:
        """The same of two sets of random directions, as many as the first pair has living latents."""
        unit, identity = f"{left.name} ~ {right.name}, untrained", self._identity((left, right))
        if (done := self.results.get(unit, identity)) is not None:
            return done
        generator = torch.Generator().manual_seed(self.config.seed)
        one, other = (
            torch.randn(int(alive.sum()), sae.d_out, generator=generator).to(self.device)
            for sae, alive in map(self._opened, (left, right))
        )
        matching = one_to_one(one, other, seed=self.config.seed)
        return self.results.put(unit, identity, figures_of(matching, None, "untrained", left.name))

    def _opened(self, side: _Side) -> tuple[SAE, np.ndarray]:
        """(an SAE, `[F]` which of its latents are alive)."""
        if side.name not in self._open:
            sae = load_sae(side.folder, device=self.device)
            self._open[side.name] = sae, self._alive(side.folder, sae)
        return self._open[side.name]

    @torch.inference_mode()
    def _alive(self, folder: Path, sae: SAE) -> np.ndarray:
        ends = ends_of(folder, read_config(folder))
        dictionary = Dictionary(folder, sae, ends)
        for rows in self.store.joint_rows(ends.hooks, "validation", first=_FIRST):
            x_ND = torch.cat([rows[hook] for hook in ends.reads], dim=1).to(self.device)
            dictionary.fires_F += encode_sparse(sae, x_ND)[0].latents.bincount(minlength=sae.d_sae)
        (silent_F,), _ = silent_latents(self.store, ends, [dictionary], self.config.rows)
        return ~silent_F.cpu().numpy()


def figures_of(matching: Matching, encoder_P: Float[np.ndarray, " P"] | None, sae: str, of: str) -> list[Figure]:
    """Of one pair, with intervals over its latents; `encoder_P` are the cosines of what matched latents read."""
    columns: dict[tuple[str, float | None], np.ndarray] = {
        ("pw_mcc", None): matching.cosines,
        **{("returning", least): (matching.cosines > least).astype(np.float64) for least in RETURNS},
        ("best_cosine", None): matching.best,
    }
    if encoder_P is not None:
        columns["encoder_cosine", None] = encoder_P
    return [
        Figure(sae, of, figure, at, *mean_over_latents(values, share=figure in _SHARES), n=len(values))
        for (figure, at), values in columns.items()
    ]


def mean_over_latents(
    values: Float[np.ndarray, " n"], *, share: bool = False
) -> tuple[float, float | None, float | None]:
    """(mean, its 95% interval by Student's t); no interval of fewer than ten."""
    mean, n = float(values.mean()), len(values)
    if n < _LEAST:
        return mean, None, None
    ends = interval(values.tolist())
    low, high = as_rate(mean, *ends, n) if share else ends
    return mean, low, high


def _over_seeds(pairs: Sequence[Figure], n_seeds: int) -> Figure:
    """The mean over pairs of `n_seeds` seeds, the pairs in the order of `itertools.combinations`."""
    values = [pair.value for pair in pairs]
    if any(value is None for value in values):
        return pairs[0]._replace(value=None, low=None, high=None, n=n_seeds)
    mean, low, high = over_seeds(np.array(values, np.float64), n_seeds)
    if pairs[0].figure in _SHARES:
        low, high = as_shares(low, high)
    return pairs[0]._replace(value=mean, low=low, high=high, n=n_seeds)


def over_seeds(pairs: Float[np.ndarray, " n"], n_seeds: int) -> tuple[float, float, float]:
    """(mean over the pairs of three seeds or more, its 95% interval), as if the seeds were drawn from many.

    By the jackknife over seeds, since pairs that share one are not independent: θ₋ₛ is the mean over the pairs without seed s,
    the variance (S − 1)/S Σ (θ₋ₛ − θ̄)², and Student's t has S − 1 degrees of freedom.
    """
    of_pair = np.array(list(itertools.combinations(range(n_seeds), 2)))
    left_out = np.array([pairs[(of_pair != seed).all(1)].mean() for seed in range(n_seeds)])
    error = math.sqrt((n_seeds - 1) / n_seeds * ((left_out - left_out.mean()) ** 2).sum())
    margin = float(stdtrit(n_seeds - 1, 0.975)) * error
    return float(pairs.mean()), float(pairs.mean()) - margin, float(pairs.mean()) + margin


def in_words(figures: Sequence[Figure]) -> str:
    """What a pair's figures say, in a line."""
    found = {(each.figure, each.at): each for each in figures}
    whole = found["pw_mcc", None]
    shares = (f"{found['returning', least].value:.0%} of them above {least}" for least in RETURNS)
    between = "" if whole.low is None else f" ({whole.low:.3f} to {whole.high:.3f}, over latents)"
    return f"One to one, {whole.n:,} latents have a mean cosine (PW-MCC) of {whole.value:.3f}{between}; {', '.join(shares)}."


def recorded(run: Path, left: Path, right: Path) -> list[Figure] | None:
    """The figures that a run's file has of a pair of SAEs as they are on disk now, in either order; None where it has none."""
    path = run / "bench" / f"{NAME}.json"
    if not path.exists():
        return None
    weights = sorted(hash_files(weights_of(folder)) for folder in (left, right))
    for _, identity, figures in Results(path, NAME).units():
        if sorted(identity["weights"]) == weights and figures[0].sae != "untrained":
            return figures
    return None


def table_of(run: Path) -> list[list[str]]:
    """A heading and a row for every pair that a run's file has, and for the untrained ones; empty where it has none."""
    path = run / "bench" / f"{NAME}.json"
    if not path.exists():
        return []
    rows = [["stability", "PW-MCC", "back above 0.7", "back above 0.9", "encoders"]]
    for unit, _, figures in Results(path, NAME).units():
        values = {(figure.figure, figure.at): figure.value for figure in figures}
        wanted = (("pw_mcc", None), ("returning", 0.7), ("returning", 0.9), ("encoder_cosine", None))
        cells = ["—" if (value := values.get(name)) is None else f"{value:.3f}" for name in wanted]
        rows.append([unit, *cells])
    return rows

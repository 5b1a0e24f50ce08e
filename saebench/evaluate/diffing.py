"""What one of two models has and the other has not, by the latents of a crosscoder that reads and writes both.

A latent of activation f is written into the base model as f d_base and into the tuned one as f d_tuned. Three things are said of
it, in units in which both models' rows have mean squared norm D (decision 36):

- relative norm: r = ‖d_tuned‖ / (‖d_base‖ + ‖d_tuned‖), 0 for what the base model alone has, 1 for what the tuned one alone has
- cosine of d_base and d_tuned
- latent scaling (Minder et al. 2025, arXiv 2504.02922): with d the longer of the two, y_base and y_tuned some vectors of each
  model, β_m = argmin_β Σ ‖β f d - y_m‖² = Σ f d·y_m / (‖d‖² Σ f²), and ν the β of the model with the shorter row over that of
  the one with d itself. ν_error takes for y_m what the other latents leave of x_m, x_m - x̂_m + f d_m: near 1 where the other model
  holds d, too, and the crosscoder did not write it there. ν_reconstruction takes what all latents write, x̂_m - b_m: near 1 where
  other latents write d into the other model whenever this one is active.

Suffixes: B rows, F latents, H width of all hooks of a model, C that of both, the tuned one behind the base.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saebench.config import Count
from saebench.files import hash_files, read_json, write_json
from saebench.models import choose_device
from saebench.runlog import progress, provenance
from saebench.sae import SAE, Ends, encode_sparse, ends_of, load_sae, read_config
from saebench.sae.io import WEIGHTS
from saebench.store.norms import usual_moments
from saebench.store.pair import TUNED, PairedStore, open_pair
from saebench.store.source import recorded_store

DIFF = "diff.json"
_SCHEMA, _VERSION = "saebench-diff", 1  # of the figures' definitions: another one makes the file again

EXCLUSIVE = 1 / 6
"""r within this of 0 or 1, one row at most 1/5 as long as the other: the norm says that one model alone has the latent"""
SHARED = 1 / 18
"""r within this of 1/2, the shorter row at least 4/5 as long as the other: both have it"""
LOW_ERROR, LOW_RECONSTRUCTION = 0.2, 0.5
"""ν below both: latent scaling agrees with the norm"""
RARE = 10
"""held-out rows below which a latent's ν say nothing"""
KINDS = ("shared", "base-only", "tuned-only", "unconfirmed", "between", "rare")
MEANINGS = {
    "shared": f"written into both models at about the same norm: r from {0.5 - SHARED:.2f} to {0.5 + SHARED:.2f}",
    "base-only": f"r at most {EXCLUSIVE:.2f}, and latent scaling does not find it in the tuned model",
    "tuned-only": f"r at least {1 - EXCLUSIVE:.2f}, and latent scaling does not find it in the base model",
    "unconfirmed": f"of such a norm, but the other model has it, too: ν_error from {LOW_ERROR:g} on, or ν_reconstruction from {LOW_RECONSTRUCTION:g} on",
    "between": "all other norms: in both models, more in one",
    "rare": f"active on fewer than {RARE} held-out rows",
}


@dataclass(frozen=True, kw_only=True)
class DiffConfig:
    """Which crosscoder of two models to take apart, on what."""

    sae: Path
    """directory of a crosscoder that was trained with --beside"""
    store: Path | None = None
    """the base model's store (default: the one it was trained on)"""
    beside: Path | None = None
    """the tuned model's store of the same tokens (default: the one it was trained on)"""
    tokens: Count = 1_000_000
    """held-out rows to use at most"""
    device: str | None = None
    """cuda or cpu (default: cuda where it is at hand)"""


class Diff(NamedTuple):
    """Of each latent, `[F]`; NaN where it has no value."""

    rows: int
    """held-out rows that it is of"""
    relative: np.ndarray
    """r"""
    cosine: np.ndarray
    error: np.ndarray
    """ν_error"""
    reconstruction: np.ndarray
    """ν_reconstruction"""
    fires: np.ndarray
    """held-out rows on which it is active"""

    @property
    def kinds(self) -> np.ndarray:
        """Places in KINDS, `[F]`."""
        edge, own = np.abs(self.relative - 0.5) >= 0.5 - EXCLUSIVE, self._is_own
        cases = {
            "rare": self.fires < RARE,
            "tuned-only": edge & own & (self.relative > 0.5),
            "base-only": edge & own,
            "unconfirmed": edge,
            "shared": np.abs(self.relative - 0.5) <= SHARED,
        }
        return np.select(list(cases.values()), [KINDS.index(kind) for kind in cases], KINDS.index("between"))

    @property
    def _is_own(self) -> np.ndarray:
        return (self.error < LOW_ERROR) & (self.reconstruction < LOW_RECONSTRUCTION)

    def counts(self) -> dict[str, int]:
        """Latents of each kind."""
        return dict(zip(KINDS, np.bincount(self.kinds, minlength=len(KINDS)).tolist(), strict=True))

    def of(self, kind: str) -> np.ndarray:
        """The latents of a kind, those active on most rows first."""
        latents = np.flatnonzero(self.kinds == KINDS.index(kind))
        return latents[np.argsort(-self.fires[latents], kind="stable")]

    def towards(self, model: Literal["base", "tuned"]) -> np.ndarray:
        """All latents but rare ones, those first that are most one model's own."""
        latents = np.flatnonzero(self.kinds != KINDS.index("rare"))
        return latents[np.argsort(self.relative[latents] * (-1 if model == "tuned" else 1), kind="stable")]

    def count_table(self) -> list[list[str]]:
        """A heading, and for each kind how many latents it has and what it means."""
        return [
            ["", "latents", "what that is"],
            *([kind, f"{n:,}", MEANINGS[kind]] for kind, n in self.counts().items()),
        ]

    def table(self, latents: list[int]) -> list[list[str]]:
        """A heading, and a row of figures for each latent."""
        rows = [["latent", "kind", "rows", "r", "cosine", "ν error", "ν reconstruction"]]
        for latent in latents:
            figures = (column[latent] for column in (self.relative, self.cosine, self.error, self.reconstruction))
            kind = KINDS[self.kinds[latent]]
            rows.append([str(latent), kind, f"{self.fires[latent]:,}", *(f"{figure:.3f}" for figure in figures)])
        return rows


def is_of_two_models(ends: Ends) -> bool:
    """Whether a dictionary reads and writes the same hooks of a base and of a tuned model."""
    half = len(ends.reads) // 2
    return half > 0 and ends.tied and ends.reads[half:] == tuple(TUNED + hook for hook in ends.reads[:half])


def read_diff(folder: Path) -> Diff | None:
    """What `diff` wrote beside a crosscoder; None where there is nothing. Raises ValueError for that of other weights or of another version."""
    path = folder / DIFF
    if not path.exists():
        return None
    found = read_json(path)
    if (found.get("schema"), found.get("identity", {}).get("version")) != (_SCHEMA, _VERSION):
        raise ValueError(f"{path} is none of this version's: run `saebench diff --sae {folder}` again")
    if found["identity"]["weights"] != hash_files([folder / WEIGHTS]):
        raise ValueError(f"{path} is of other weights than {folder} has: run `saebench diff --sae {folder}` again")
    columns = {name: np.array(values, dtype=float) for name, values in found["columns"].items()}
    return Diff(found["rows"], **(columns | {"fires": columns["fires"].astype(int)}))


def diff(config: DiffConfig) -> Diff:
    """Measure every latent of a crosscoder of two models on held-out rows, and write `diff.json` beside it; what is there already is read.

    Raises ValueError for what is no such crosscoder, stores that do not belong together or to it, and models of two widths.
    """
    folder = config.sae
    ends = ends_of(folder, read_config(folder))
    if not is_of_two_models(ends):
        raise ValueError(
            f"{folder} reads {', '.join(ends.reads)}; expected a crosscoder of two models' hooks: train one with "
            "`saebench train --kind crosscoder --hook HOOK --store BASE --beside TUNED`"
        )
    paths = config.store or recorded_store(folder), config.beside or recorded_store(folder, "beside")
    if paths[0] is None or paths[1] is None:
        raise ValueError(f"{folder} does not say what it was trained on; give the stores with --store and --beside")
    store = open_pair(paths[0], paths[1])
    assert isinstance(store, PairedStore)
    widths = {hook: store.d_in(hook) for hook in ends.reads}
    for hook in ends.reads[: len(widths) // 2]:
        if widths[hook] != widths[TUNED + hook]:
            raise ValueError(
                f"{hook} has width {widths[hook]} in {paths[0]} and {widths[TUNED + hook]} in {paths[1]}; expected models of one "
                "width: directions of two cannot be compared"
            )
    identity = {
        "version": _VERSION,
        "weights": hash_files([folder / WEIGHTS]),
        "store": store.hash,
        "beside": store.beside.hash,
        "tokens": config.tokens,
    }
    bounds = {
        "exclusive": EXCLUSIVE,
        "shared": SHARED,
        "low_error": LOW_ERROR,
        "low_reconstruction": LOW_RECONSTRUCTION,
        "rare": RARE,
    }
    path = folder / DIFF
    kept = read_json(path) if path.exists() else {}
    if (kept.get("identity"), kept.get("bounds")) == (identity, bounds):
        found = read_diff(folder)
        assert found is not None
        return found
    found = _measured(store, ends, folder, config)
    columns = {name: [_number(value) for value in values] for name, values in found._asdict().items() if name != "rows"}
    write_json(
        path,
        {
            "schema": _SCHEMA, "identity": identity, "hooks": list(ends.reads), "rows": found.rows, "bounds": bounds,
            "counts": found.counts(), "columns": columns, "provenance": provenance(),
        },
    )  # fmt: skip
    return found


def _number(value: Any) -> float | int | None:
    """As JSON has it: rounded to six digits, and None where there is none."""
    if np.issubdtype(type(value), np.integer):
        return int(value)
    return float(f"{value:.6g}") if np.isfinite(value) else None


def _measured(store: PairedStore, ends: Ends, folder: Path, config: DiffConfig) -> Diff:
    device = choose_device(config.device, float64=True)
    sae = load_sae(folder, device=device)
    scales = [(store.d_in(hook) / usual_moments(store, hook)[1]) ** 0.5 for hook in ends.reads]
    scale = torch.tensor(scales).repeat_interleave(torch.tensor(sae.parts)).to(device)
    scaling = LatentScaling(sae, scale)
    total = min(config.tokens, store.rows("validation"))
    with progress(total, f"diff {folder.name}", "row") as bar:
        for rows in store.joint_rows(ends.reads, "validation", first=config.tokens):
            scaling.add(torch.cat([rows[hook] for hook in ends.reads], 1).to(device))
            bar.update(len(rows[ends.reads[0]]))
    return scaling.diff()


class LatentScaling:
    """Sums over rows, of which β and ν follow for every latent at once."""

    def __init__(self, sae: SAE, scale: Float[Tensor, " C"]) -> None:
        """`scale`: what each coordinate is multiplied by to bring both models' rows to one size."""
        self.sae, self.scale = sae, scale
        self.base_FH, self.tuned_FH = (sae.W_dec.detach() * scale).chunk(2, dim=1)
        self.norms_2F = torch.stack([self.base_FH.norm(dim=1), self.tuned_FH.norm(dim=1)])
        self.tuned_is_longer_F = self.norms_2F[1] >= self.norms_2F[0]
        self.longer_FH = torch.where(self.tuned_is_longer_F[:, None], self.tuned_FH, self.base_FH)
        """d"""
        self.rows = 0
        self.fires_F = torch.zeros(sae.d_sae, dtype=torch.int64, device=scale.device)
        self.squares_F = torch.zeros(sae.d_sae, dtype=torch.float64, device=scale.device)
        """Σ f²"""
        self.error_2F, self.written_2F = (torch.zeros_like(self.squares_F).repeat(2, 1) for _ in range(2))
        """Σ f d·(x - x̂) and Σ f d·(x̂ - b), of base and tuned"""

    @torch.no_grad()
    def add(self, x_BC: Float[Tensor, "B C"]) -> None:
        """Count rows in, as the stores have them: those of the base model with those of the tuned one behind."""
        code, values = encode_sparse(self.sae, x_BC)
        written_BC = code.decode(values, self.sae.W_dec)
        error_BC = (x_BC - written_BC - self.sae.b_dec) * self.scale
        self.rows += len(x_BC)
        self.fires_F += code.latents.bincount(minlength=self.sae.d_sae)
        self.squares_F += code.sum_latents(values.square())
        for sums_2F, y_BC in ((self.error_2F, error_BC), (self.written_2F, written_BC * self.scale)):
            for sums_F, y_BH in zip(sums_2F, y_BC.chunk(2, dim=1), strict=True):
                sums_F += code.sum_latents(values * code.products(y_BH.contiguous(), self.longer_FH))

    def diff(self) -> Diff:
        """The figures of all latents. What is common to both β of a ratio is left out of it."""
        own_2F = torch.stack([(self.longer_FH * part).sum(1) for part in (self.base_FH, self.tuned_FH)])
        ratios = []
        for sums_2F in (self.error_2F + self.squares_F * own_2F, self.written_2F):
            shorter_F = torch.where(self.tuned_is_longer_F, sums_2F[0], sums_2F[1])
            longer_F = torch.where(self.tuned_is_longer_F, sums_2F[1], sums_2F[0])
            ratios.append(torch.where(longer_F > 0, shorter_F / longer_F, torch.nan))
        columns = [
            self.norms_2F[1] / self.norms_2F.sum(0),
            torch.nn.functional.cosine_similarity(self.base_FH, self.tuned_FH, dim=1),
            *ratios,
            self.fires_F,
        ]
        return Diff(self.rows, *(column.cpu().numpy() for column in columns))

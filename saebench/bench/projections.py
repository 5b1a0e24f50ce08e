"""What a probe finds, the latents that a concept is split over, and the examples that those have left to others.

Legend: N examples, F latents, S main ones, D what is read, E what is written, n examples of one concept that its probe finds, r some of them.
"""

import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saebench.sae import SAE
from saebench.sae.architectures import normalized

FULL_COSINE, PARTIAL_COSINE, SHARE, ABSORBERS, MOST = 0.025, 0.1, 0.4, 3, 10
"""SAEBench's: least cosines of the latents that absorb wholly and in part, least share of the projection that they carry, how many
absorb in part at most; and how many main latents a concept has at most"""
_C = 0.01  # inverse strength of the probe's penalty, of coordinates of unit variance
_ROWS = 512  # made dense at once


class Probe(NamedTuple):
    """A logistic regression on what is written."""

    weight_E: Float[np.ndarray, " E"]
    bias: float

    def finds(self, written_NE: Float[Tensor, "N E"]) -> Bool[np.ndarray, " N"]:
        return written_NE.numpy() @ self.weight_E + self.bias > 0

    @property
    def direction_E(self) -> Float[np.ndarray, " E"]:
        return self.weight_E / np.linalg.norm(self.weight_E)


class Absorbed(NamedTuple):
    """What became of examples of a concept."""

    full: Bool[np.ndarray, " n"]
    fraction: Float[np.ndarray, " n"]


def fit_probe(written_NE: Float[Tensor, "N E"], holds: Bool[np.ndarray, " N"]) -> Probe:
    """Logistic regression with an L2 penalty on coordinates of unit variance, both classes of equal weight."""
    x_NE = written_NE.double().numpy()
    mean_E, std_E = x_NE.mean(0), x_NE.std(0)
    std_E = np.where(std_E > 1e-9 * std_E.max(), std_E, np.inf)  # a constant coordinate says nothing
    model = _logistic((x_NE - mean_E) / std_E, holds, _C)
    weight_E = model.coef_[0] / std_E
    return Probe(weight_E, float(model.intercept_[0] - mean_E @ weight_E))


def _logistic(x: np.ndarray, holds: np.ndarray, C: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=C, class_weight="balanced", max_iter=300).fit(x, holds)


def main_latents(acts_NF: Any, holds: Bool[np.ndarray, " N"], tau: float) -> tuple[Int[np.ndarray, " S"], float]:
    """(the latents that a concept is split over, F1 of a logistic regression on them), of training examples.

    The first is the latent with the largest difference of class means, in units of its mean where it fires; each next one that of the
    largest difference between examples of the concept that the regression has missed so far and those of others. One that
    does not raise F1, at its best threshold, by more than `tau` ends it. `acts_NF` is CSC.
    """
    fires_F = np.diff(acts_NF.indptr)
    total_F = np.asarray(acts_NF.sum(0)).ravel()
    unit_F = np.divide(total_F, fires_F, out=np.full(len(total_F), np.inf), where=fires_F > 0)
    others_F = np.asarray(acts_NF[~holds].mean(0)).ravel()
    main: list[int] = []
    missed, best = holds.copy(), 0.0
    while len(main) < MOST and missed.any():
        score_F = (np.asarray(acts_NF[missed].mean(0)).ravel() - others_F) / unit_F
        score_F[main] = -np.inf
        if score_F.max() <= 0:
            break
        tried = [*main, int(score_F.argmax())]
        f1, found = _best_f1(
            _logistic(acts_NF[:, tried].toarray() / unit_F[tried], holds, 1.0), acts_NF, tried, unit_F, holds
        )
        if main and f1 - best <= tau:
            break
        main, best, missed = tried, f1, holds & ~found
    return np.array(main, np.int64), best


def _best_f1(
    model: Any, acts_NF: Any, latents: list[int], unit_F: np.ndarray, holds: np.ndarray
) -> tuple[float, Bool[np.ndarray, " N"]]:
    """(F1 at the threshold that makes it largest, what is above it)."""
    score = model.decision_function(acts_NF[:, latents].toarray() / unit_F[latents])
    of = np.unique(-score, return_inverse=True)[1]  # the highest score first
    said = np.bincount(of).cumsum()
    true = np.bincount(of, holds.astype(np.float64)).cumsum()
    f1 = 2 * true / (said + holds.sum())
    return float(f1.max()), of <= f1.argmax()


def f1_of(holds: Bool[np.ndarray, " N"], finds: Bool[np.ndarray, " N"]) -> float | None:
    """None where nothing holds and nothing is found."""
    total = int(holds.sum() + finds.sum())
    return float(2 * (holds & finds).sum() / total) if total else None


@torch.no_grad()
def absorbed_at(
    sae: SAE,
    main: Int[np.ndarray, " S"],
    probe: Probe,
    acts_nF: Any,
    read_nD: Float[Tensor, "n D"],
    written_nE: Float[Tensor, "n E"],
) -> Absorbed:
    """Which examples of a concept, found by its probe, its main latents have left to others.

    With p the probe's direction, d_j the decoder row and a_j the activation of latent j, latent j carries a_j d_j·p of
    (y − b)·p, y what is to be written and b what the SAE writes where nothing fires. `full`: no main latent fires, (y − b)·p > 0, and the
    latent that carries most has cos(d_j, p) ≥ 0.025 and carries at least 0.4 of it. `fraction`: of the three others that carry most, among
    those of cos ≥ 0.1, A together, and M the main ones': 0 where M is all of it or more, or A less than 0.4 of it; 1 where
    M ≤ 0; else m/(m + M), m = min(A, (y − b)·p − M).
    """
    rows_nD, scale, shift = normalized(read_nD.to(sae.W_dec.device), sae.normalize)
    wanted_nE = (written_nE.to(sae.W_dec.device) - shift) / scale - sae.base(rows_nD)
    p_E = torch.from_numpy(probe.direction_E).to(wanted_nE)
    whole_n = (wanted_nE @ p_E).double().cpu().numpy()
    along_F = (sae.W_dec @ p_E).double().cpu().numpy()
    cosine_F = along_F / sae.W_dec.norm(dim=1).clamp(min=1e-30).double().cpu().numpy()
    others_F = cosine_F >= PARTIAL_COSINE
    others_F[main] = False
    parts = [Absorbed(np.zeros(0, bool), np.zeros(0))]
    acts_nF = acts_nF.tocsr()
    for start in range(0, len(whole_n), _ROWS):
        acts_rF, whole_r = acts_nF[start : start + _ROWS].toarray().astype(np.float64), whole_n[start : start + _ROWS]
        carried_rF = acts_rF * along_F
        top_r = carried_rF.argmax(1)
        most_r = np.take_along_axis(carried_rF, top_r[:, None], 1)[:, 0]
        silent_r = (acts_rF[:, main] == 0).all(1)
        full_r = silent_r & (whole_r > 0) & (cosine_F[top_r] >= FULL_COSINE) & (most_r >= SHARE * whole_r)
        taken_rF = np.sort(np.where(others_F, carried_rF, 0.0).clip(min=0), axis=1)[:, -ABSORBERS:]
        parts.append(Absorbed(full_r, _fractions(whole_r, carried_rF[:, main].sum(1), taken_rF.sum(1))))
    return Absorbed(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _fractions(
    whole_n: Float[np.ndarray, " n"], main_n: Float[np.ndarray, " n"], others_n: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    absorbed_n = np.minimum(others_n, whole_n - main_n)
    with np.errstate(divide="ignore", invalid="ignore"):
        part_n = np.where(main_n <= 0, 1.0, absorbed_n / (absorbed_n + main_n))
    none_n = (whole_n <= 0) | (main_n >= whole_n) | (others_n < SHARE * whole_n)
    return np.where(none_n, 0.0, part_n)

"""What a trained SAE must beat: PCA of the same rank, and an SAE that was never trained."""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saebench.metrics import Sums, reconstruction_terms, total, total_variance
from saebench.sae import initialise, new_sae
from saebench.store import Store

_FIT_ROWS = 262_144  # training rows behind the covariance: 64 per dimension at d_in 4,096


class PCA:
    """Principal components of training rows, and how much of the evaluated rows each explains."""

    def __init__(self, mean_D: Float[Tensor, " D"], components_DD: Float[Tensor, "D D"]) -> None:
        """`components_DD` holds a direction per column, strongest first."""
        self.mean_D, self.components_DD = mean_D, components_DD
        self.energy_D = torch.zeros(len(mean_D), dtype=torch.float64, device=mean_D.device)
        self.squared_norm = 0.0

    @classmethod
    def fit(cls, store: Store, hook: str, device: str) -> "PCA":
        """From up to 262,144 kept training rows of the store."""
        d_in = store.d_in(hook)
        second = torch.zeros(d_in, d_in, dtype=torch.float64, device=device)
        first, n = torch.zeros(d_in, dtype=torch.float64, device=device), 0
        for rows in store.kept_rows(hook, "train", _FIT_ROWS, 8192):
            x = rows.to(device).double()
            second += x.T @ x
            first += x.sum(0)
            n += len(x)
        mean = first / n
        _, vectors = torch.linalg.eigh(second / n - mean.outer(mean))
        return cls(mean.float(), vectors.flip(1).float())

    def observe(self, x_ND: Float[Tensor, "N D"]) -> None:
        """Count evaluated rows in."""
        centred = x_ND - self.mean_D
        self.energy_D += (centred @ self.components_DD).double().pow(2).sum(0)
        self.squared_norm += float(centred.double().pow(2).sum())

    def fvu(self, rank: float, variance: float) -> float:
        """FVU of the reconstruction from the first `rank` components, linear between whole ranks.

        `variance` is Σ‖x − x̄‖² of the evaluated rows.
        """
        explained = np.concatenate([[0.0], np.cumsum(self.energy_D.cpu().numpy())])
        kept = np.interp(rank, np.arange(len(explained)), explained)
        return float((self.squared_norm - kept) / variance)


@torch.inference_mode()
def untrained_fvu(store: Store, hook: str, d_sae: int, l0: float, seed: int, n_rows: int) -> float:
    """FVU of a TopK SAE as training begins it, k the nearest whole number to `l0`, on `rows` validation rows.

    Its reconstruction is b_dec plus one factor, the best on training rows, times what it decodes:
    without it random rows overshoot, and any SAE would win.
    """
    d_in, statistics = store.d_in(hook), store.statistics(hook)
    sae = new_sae("topk", d_in, d_sae, k=max(1, min(round(l0), d_sae)))
    scale = math.sqrt(d_in / statistics["mean_squared_norm"])
    initialise(sae, torch.tensor(statistics["mean"]) * scale, torch.Generator().manual_seed(seed))
    sums = Sums()
    zeros = torch.zeros(8192)
    x = next(store.kept_rows(hook, "train", 8192, 8192)) * scale
    decoded = sae(x).x_hat - sae.b_dec
    factor = float((decoded * (x - sae.b_dec)).sum() / decoded.pow(2).sum())
    for rows in store.kept_rows(hook, "validation", n_rows, 8192):
        x = rows * scale
        x_hat = sae.b_dec + factor * (sae(x).x_hat - sae.b_dec)
        doc = torch.zeros(len(x), dtype=torch.int64)
        sums.add(doc, {**reconstruction_terms(x, x_hat, zeros[: len(x)], zeros[: len(x)]), "vector": x})
    everything = total(sums.table())
    return float(everything["squared_error"] / total_variance(everything))

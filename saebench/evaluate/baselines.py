"""What a trained SAE must beat: PCA of the same rank, and an SAE that was never trained."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from saebench.metrics import Sums, total, total_variance
from saebench.runlog import progress
from saebench.sae import initialise, new_sae
from saebench.store import Store
from saebench.store.norms import usual_moments

_FIT_ROWS = 262_144  # training rows behind the covariance: 64 per dimension at d_in 4,096
_VALUES = 2**25  # pre-activations held at once
_SCALE_ROWS = 8192  # training rows behind the factor of an untrained SAE


class PCA:
    """Principal components of training rows, and how much of the evaluated rows each explains."""

    def __init__(self, mean_D: Float[Tensor, " D"], components_DD: Float[Tensor, "D D"]) -> None:
        """`components_DD` holds a direction per column, strongest first."""
        self.mean_D, self.components_DD = mean_D, components_DD
        self.energy_D = torch.zeros(len(mean_D), dtype=torch.float64, device=mean_D.device)
        self.squared_norm = torch.zeros((), dtype=torch.float64, device=mean_D.device)

    @classmethod
    def fit(cls, store: Store, hook: str, device: str) -> "PCA":
        """From up to 262,144 kept training rows, massive ones left out, spread over all of the store's training text."""
        d_in = store.d_in(hook)
        second = torch.zeros(d_in, d_in, dtype=torch.float64, device=device)
        first, n = torch.zeros(d_in, dtype=torch.float64, device=device), 0
        rows = min(_FIT_ROWS, store.rows("train"))
        with progress(rows, f"principal components of {hook}", "row", delay=1.0) as bar:
            for part in store.usual_rows(hook, "train", spread=_FIT_ROWS):
                x = part.to(device).double()
                second += x.T @ x
                first += x.sum(0)
                n += len(x)
                bar.update(len(x))
        mean = first / n
        _, vectors = torch.linalg.eigh(second / n - mean.outer(mean))
        return cls(mean.float(), vectors.flip(1).float())

    def observe(self, x_ND: Float[Tensor, "N D"]) -> None:
        """Count evaluated rows in."""
        centred = x_ND - self.mean_D
        self.energy_D += (centred @ self.components_DD).double().pow(2).sum(0)
        self.squared_norm += centred.double().pow(2).sum()

    def fvu(self, rank: float, variance: float) -> float:
        """FVU of the reconstruction from the first `rank` components, linear between whole ranks.

        `variance` is Σ‖x − x̄‖² of the evaluated rows.
        """
        explained = np.concatenate([[0.0], np.cumsum(self.energy_D.cpu().numpy())])
        kept = np.interp(rank, np.arange(len(explained)), explained)
        return float((float(self.squared_norm) - kept) / variance)


@torch.inference_mode()
def untrained_fvus(
    store: Store, hook: str, d_sae: int, l0s: Sequence[float], seed: int, n_rows: int, device: str = "cpu"
) -> list[float]:
    """For each of `l0s`, FVU of a TopK SAE as training begins it, k the nearest whole number, on `n_rows` validation rows.

    Its reconstruction is b_dec plus one factor, the best on training rows, times what it decodes:
    without it random rows overshoot, and any SAE would win. The SAEs differ in k alone, and share the encoder's product.
    """
    d_in, (mean_D, mean_square) = store.d_in(hook), usual_moments(store, hook)
    ks = [max(1, min(round(l0), d_sae)) for l0 in l0s]
    sae = new_sae("topk", d_in, d_sae, k=max(ks))
    scale = math.sqrt(d_in / mean_square)
    initialise(sae, torch.from_numpy(mean_D).float() * scale, torch.Generator().manual_seed(seed))
    sae.to(device)

    def decoded(x_BD: Tensor) -> dict[int, Tensor]:
        """x̂ − b_dec of each k."""
        parts = [sae.project(part).topk(max(ks), dim=-1) for part in x_BD.split(max(1, _VALUES // d_sae))]
        values_BK, idx_BK = (torch.cat(column) for column in zip(*parts, strict=True))
        acts_BK = torch.relu(values_BK)
        return {
            k: functional.embedding_bag(
                idx_BK[:, :k].contiguous(), sae.W_dec, mode="sum", per_sample_weights=acts_BK[:, :k].contiguous()
            )
            for k in sorted(set(ks))
        }

    x_BD = torch.cat(list(store.usual_rows(hook, "train", spread=_SCALE_ROWS))).to(device) * scale
    centred_BD = x_BD - sae.b_dec
    factors = {k: float((out * centred_BD).sum() / out.pow(2).sum()) for k, out in decoded(x_BD).items()}
    error = {k: torch.zeros((), dtype=torch.float64, device=device) for k in factors}
    sums = Sums()
    bar = progress(n_rows, f"untrained SAE of {d_sae} latents", "row", delay=1.0)
    for rows in store.usual_rows(hook, "validation", first=n_rows):
        bar.update(len(rows))
        x_BD = rows.to(device) * scale
        centred_BD = (x_BD - sae.b_dec).double()
        for k, out in decoded(x_BD).items():
            error[k] += (centred_BD - factors[k] * out).pow(2).sum()
        doc = torch.zeros(len(rows), dtype=torch.int64, device=device)
        sums.add(doc, {"rows": doc + 1, "squared_norm": x_BD.double().pow(2).sum(1), "vector": x_BD})
    bar.close()
    variance = float(total_variance(total(sums.table())))
    return [float(error[k]) / variance for k in ks]

"""What a trained dictionary must beat: PCA of the same rank, the best linear map, and a dictionary that was never trained."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from saebench.metrics import Sums, ratio, total, total_variance
from saebench.runlog import progress
from saebench.sae import Ends, Writes, initialise, new_sae
from saebench.store import Store
from saebench.store.norms import usual_moments

_FIT_ROWS = 262_144  # training rows behind the covariance: 64 per dimension at d_in 4,096
_VALUES = 2**25  # pre-activations held at once
_SCALE_ROWS = 8192  # training rows behind the factor of an untrained SAE


def joined(rows: Mapping[str, Tensor], hooks: Sequence[str]) -> Float[Tensor, "N D"]:
    """The vectors of some hooks, one behind the other."""
    return torch.cat([rows[hook] for hook in hooks], dim=1)


def widths(store: Store, hooks: Sequence[str]) -> tuple[int, ...]:
    """Those of the vectors of each hook."""
    return tuple(store.d_in(hook) for hook in hooks)


def _covariance(
    store: Store, reads: Sequence[str], others: Sequence[str], device: str, scale: Tensor | float = 1.0
) -> tuple[Float[Tensor, " E"], Float[Tensor, "D E"]]:
    """(mean of all, covariance of what is read with all), in float64: of the vectors at `reads` and, behind them, at `others`.

    From up to 262,144 kept training rows, massive ones left out, spread over all of the store's training text.
    """
    d_read, d_all = sum(widths(store, reads)), sum(widths(store, (*reads, *others)))
    second = torch.zeros(d_read, d_all, dtype=torch.float64, device=device)
    first, n = torch.zeros(d_all, dtype=torch.float64, device=device), 0
    rows = min(_FIT_ROWS, store.rows("train"))
    with progress(rows, f"covariance of {', '.join((*reads, *others))}", "row", delay=1.0) as bar:
        for some in store.joint_rows([*dict.fromkeys((*reads, *others))], "train", spread=_FIT_ROWS):
            x = (joined(some, (*reads, *others)).to(device) * scale).double()
            second += x[:, :d_read].T @ x
            first += x.sum(0)
            n += len(x)
            bar.update(len(x))
    mean = first / n
    return mean, second / n - mean[:d_read].outer(mean)


class PCA:
    """Principal components of training rows, and how much of the evaluated rows each explains.

    Of several hooks it is that of their vectors one behind the other, each multiplied so that E‖x‖² is in proportion to its width.
    """

    name = "pca_fvu"

    def __init__(
        self,
        mean_D: Float[Tensor, " D"],
        components_DD: Float[Tensor, "D D"],
        scale_D: Float[Tensor, " D"],
        parts: tuple[int, ...],
    ) -> None:
        """`components_DD` holds a direction per column, strongest first; `parts` are the hooks' widths."""
        self.mean_D, self.components_DD, self.scale_D, self.parts = mean_D, components_DD, scale_D, parts
        self.energy_D = torch.zeros(len(mean_D), dtype=torch.float64, device=mean_D.device)
        self.squared_norm = torch.zeros((), dtype=torch.float64, device=mean_D.device)
        # Of several hooks, the second moments of all coordinates: at one hook components are not orthogonal.
        several = len(mean_D) if len(parts) > 1 else 0
        self.moments_DD = torch.zeros(several, several, dtype=torch.float64, device=mean_D.device)

    @classmethod
    def fit(cls, store: Store, hooks: Sequence[str], device: str) -> "PCA":
        """From training rows, massive ones left out."""
        parts = widths(store, hooks)
        scales = [math.sqrt(d / usual_moments(store, hook)[1]) for d, hook in zip(parts, hooks, strict=True)]
        each = [torch.full((d,), scale / scales[0]) for d, scale in zip(parts, scales, strict=True)]
        scale_D = torch.cat(each).to(device)
        mean, covariance = _covariance(store, hooks, (), device, scale_D)
        _, vectors = torch.linalg.eigh(covariance)
        return cls(mean.float(), vectors.flip(1).float(), scale_D, parts)

    def observe(self, x_ND: Float[Tensor, "N D"], y_NE: Float[Tensor, "N D"]) -> None:
        """Count evaluated rows in; both are the same."""
        centred = x_ND * self.scale_D - self.mean_D
        along_ND = centred @ self.components_DD
        self.energy_D += along_ND.double().pow(2).sum(0)
        self.squared_norm += centred.double().pow(2).sum()
        if len(self.parts) > 1:
            self.moments_DD += (along_ND.T @ along_ND).double()

    def errors(self, rank: float) -> list[float]:
        """Σ‖x − x̂‖² at each hook, x̂ from the first `rank` components; linear between whole ranks."""
        if len(self.parts) == 1:
            explained = np.concatenate([[0.0], np.cumsum(self.energy_D.cpu().numpy())])
            return [float(self.squared_norm) - float(np.interp(rank, np.arange(len(explained)), explained))]
        below = min(math.floor(rank), len(self.mean_D))
        left, right = self._left_at(below), self._left_at(min(below + 1, len(self.mean_D)))
        return (left + (rank - below) * (right - left)).tolist()

    def reconstruct(self, x_ND: Float[Tensor, "N D"], rank: int) -> Float[Tensor, "N D"]:
        """x̂ from the first `rank` components."""
        along_DR = self.components_DD[:, :rank]
        return ((x_ND * self.scale_D - self.mean_D) @ along_DR @ along_DR.T + self.mean_D) / self.scale_D

    def _left_at(self, rank: int) -> Float[Tensor, " H"]:
        """Σ‖x − x̂‖² of each hook: the energy of the components that are left out, where some of a hook's cancel."""
        left_DR = self.components_DD[:, rank:].double()
        error_D = ((left_DR @ self.moments_DD[rank:, rank:]) * left_DR).sum(1) / self.scale_D.double().pow(2)
        return torch.stack([part.sum() for part in error_D.split(self.parts)])


class LinearMap:
    """The best linear map, with a bias, from what is read to what is written: least squares on training rows."""

    name = "linear_fvu"

    def __init__(
        self,
        mean_D: Float[Tensor, " D"],
        mean_E: Float[Tensor, " E"],
        map_DE: Float[Tensor, "D E"],
        parts: tuple[int, ...],
    ) -> None:
        """`parts` are the widths of the hooks written."""
        self.mean_D, self.mean_E, self.map_DE, self.parts = mean_D, mean_E, map_DE, parts
        self.error_H = torch.zeros(len(parts), dtype=torch.float64, device=mean_D.device)

    @classmethod
    def fit(cls, store: Store, ends: Ends, device: str) -> "LinearMap":
        """From training rows, without those that are massive at one of the hooks."""
        mean, covariance = _covariance(store, ends.reads, ends.writes, device)
        d_in = len(covariance)
        map_DE = torch.linalg.pinv(covariance[:, :d_in], hermitian=True) @ covariance[:, d_in:]
        return cls(mean[:d_in].float(), mean[d_in:].float(), map_DE.float(), widths(store, ends.writes))

    def observe(self, x_ND: Float[Tensor, "N D"], y_NE: Float[Tensor, "N E"]) -> None:
        """Count evaluated rows in."""
        error_NE = (y_NE - self.reconstruct(x_ND)).double()
        self.error_H += torch.stack([part.pow(2).sum() for part in error_NE.split(self.parts, dim=1)])

    def errors(self, rank: float) -> list[float]:
        """Σ‖y − ŷ‖² at each hook written; the same at any rank."""
        return self.error_H.tolist()

    def reconstruct(self, x_ND: Float[Tensor, "N D"], rank: int = 0) -> Float[Tensor, "N E"]:
        """ŷ, the same at any rank."""
        return self.mean_E + (x_ND - self.mean_D) @ self.map_DE


Baseline = PCA | LinearMap
"""What is fitted on training rows, observes the evaluated ones, and says how far it is from them; `name` is its FVU's."""


class Untrained:
    """A TopK dictionary as training begins it, of one seed, with each of several k.

    Its reconstruction is b_dec plus one factor, the best on training rows, times what it decodes: without it random rows
    overshoot, and any dictionary would win. They differ in k alone, and share the encoder's product.
    """

    def __init__(self, store: Store, ends: Ends, d_sae: int, ks: Sequence[int], seed: int, device: str) -> None:
        self.ends, self.ks, self.device, self.parts = ends, sorted(set(ks)), device, widths(store, ends.writes)
        means: dict[str, Tensor] = {}
        self.scales: dict[str, float] = {}
        for hook in ends.hooks:
            mean_D, mean_square = usual_moments(store, hook)
            self.scales[hook] = math.sqrt(store.d_in(hook) / mean_square)
            means[hook] = torch.from_numpy(mean_D).float() * self.scales[hook]
        writes = Writes(d_out=None if ends.tied else sum(self.parts), parts=self.parts)
        sae = new_sae("topk", sum(widths(store, ends.reads)), d_sae, k=max(ks), writes=writes)
        mean_E = torch.cat([means[hook] for hook in ends.writes])
        generator = torch.Generator().manual_seed(seed)
        initialise(sae, torch.cat([means[hook] for hook in ends.reads]), generator, mean_E=mean_E)
        self.sae = sae.to(device).requires_grad_(False)
        some = list(store.joint_rows(ends.hooks, "train", spread=_SCALE_ROWS))
        sample = {hook: torch.cat([rows[hook] for rows in some]) for hook in ends.hooks}
        centred_BE, outs = self.scaled(sample, ends.writes) - sae.b_dec, self._decoded(sample)
        self._factors = {k: float((out * centred_BE).sum() / out.pow(2).sum()) for k, out in outs.items()}

    def scaled(self, rows: Mapping[str, Tensor], hooks: Sequence[str]) -> Float[Tensor, "N D"]:
        """The vectors of some hooks as the dictionary has them: of E‖x‖² = d each."""
        return joined({hook: rows[hook].to(self.device) * self.scales[hook] for hook in hooks}, hooks)

    def written(self, rows: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """ŷ − b_dec of each k, scaled."""
        return {k: self._factors[k] * out for k, out in self._decoded(rows).items()}

    def reconstruct(self, rows: Mapping[str, Tensor], k: int) -> Float[Tensor, "N E"]:
        """ŷ of one k, of vectors as the model has them."""
        parts = (self.written(rows)[k] + self.sae.b_dec).split(self.parts, dim=1)
        return torch.cat([part / self.scales[hook] for hook, part in zip(self.ends.writes, parts, strict=True)], dim=1)

    def _decoded(self, rows: Mapping[str, Tensor]) -> dict[int, Tensor]:
        x_BD, most = self.scaled(rows, self.ends.reads), max(self.ks)
        halves = [self.sae.project(part).topk(most, dim=-1) for part in x_BD.split(max(1, _VALUES // self.sae.d_sae))]
        values_BK, idx_BK = (torch.cat(column) for column in zip(*halves, strict=True))
        acts_BK = torch.relu(values_BK)
        return {
            k: functional.embedding_bag(
                idx_BK[:, :k].contiguous(), self.sae.W_dec, mode="sum", per_sample_weights=acts_BK[:, :k].contiguous()
            )
            for k in self.ks
        }


@torch.inference_mode()
def untrained_fvus(
    store: Store, ends: Ends, d_sae: int, l0s: Sequence[float], seed: int, n_rows: int, device: str = "cpu"
) -> list[list[float]]:
    """For each of `l0s`, FVU at each hook written of an untrained dictionary, k the nearest whole number, on `n_rows` validation rows."""
    ks = [max(1, min(round(l0), d_sae)) for l0 in l0s]
    untrained = Untrained(store, ends, d_sae, ks, seed, device)
    parts = untrained.parts
    error = {k: torch.zeros(len(parts), dtype=torch.float64, device=device) for k in untrained.ks}
    sums = {hook: Sums() for hook in ends.writes}
    bar = progress(n_rows, f"untrained, {d_sae} latents", "row", delay=1.0)
    for rows in store.joint_rows(ends.hooks, "validation", first=n_rows):
        y_BE = untrained.scaled(rows, ends.writes)
        bar.update(len(y_BE))
        centred_BE = (y_BE - untrained.sae.b_dec).double()
        for k, out in untrained.written(rows).items():
            wrong_BE = (centred_BE - out).pow(2)
            error[k] += torch.stack([part.sum() for part in wrong_BE.split(parts, dim=1)])
        doc = torch.zeros(len(y_BE), dtype=torch.int64, device=device)
        for hook, y_BD in zip(ends.writes, y_BE.split(parts, dim=1), strict=True):
            sums[hook].add(doc, {"rows": doc + 1, "squared_norm": y_BD.double().pow(2).sum(1), "vector": y_BD})
    bar.close()
    variances = [float(total_variance(total(one.table()))) for one in sums.values()]
    return [[float(ratio(one, whole)) for one, whole in zip(error[k].tolist(), variances, strict=True)] for k in ks]

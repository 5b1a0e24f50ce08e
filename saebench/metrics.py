"""Metric arithmetic: sums over tokens, kept per document, and the ratios taken from them once.

A `Sums` table holds one row per document and one column per summed quantity, in float64. Metrics
are functions of such rows added up, so the same few lines give the figure for all documents and
for every bootstrap resample of them. Definitions follow the field's: see each function.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

SMALL_DENOMINATOR = 0.05  # nats; loss recovered over less says little
DUPLICATE = 0.99  # cosine
FLAT = 1e-12
"""of Σ‖x‖²: float32 and sums leave less variance than this of rows that are all the same"""
_PAIRS = 2**26  # of latents at once
_DRAWS = 2**24  # resamples × documents at once: 256 MiB with their copy in float64
_CHUNK_CPU = 2**19  # numbers worked on at once: what stays in a core's cache from one operation to the next,
_CHUNK = 2**26  # and, on a GPU, what is worth a launch


def reconstruction_terms(
    x: Float[Tensor, "B D"], x_hat: Float[Tensor, "B D"], l0: Real[Tensor, " B"], l1: Float[Tensor, " B"]
) -> dict[str, Float[Tensor, " B"]]:
    """Per-row terms that L0, L1, MSE, FVU, cosine, norm ratio and γ are made of, in float64.

    `l0` counts active latents, `l1` is Σ_j |f_j|‖d_j‖.
    """
    x, x_hat = x.double(), x_hat.double()
    error = x - x_hat
    dots = ((x, x), (x_hat, x_hat), (x, x_hat), (error, error))
    x2, x_hat2, dot, error2 = (torch.linalg.vecdot(left, right) for left, right in dots)
    norms = (x2 * x_hat2).sqrt()
    return {
        "rows": torch.ones_like(x2),
        "l0": l0.double(),
        "l1": l1.double(),
        "squared_error": error2,
        "squared_norm": x2,
        "squared_norm_hat": x_hat2,
        "dot": dot,
        "cosine": torch.where(norms > 0, dot / norms.clamp(min=1e-300), 0.0),
        "norm_ratio": torch.where(x2 > 0, (x_hat2 / x2.clamp(min=1e-300)).sqrt(), 0.0),
    }


def loss_and_kl(
    log_p: Float[Tensor, "N V"], logits: Float[Tensor, "N V"], following: Int[Tensor, " N"]
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """(−ln q of the token that follows, KL(p ‖ q)) at each position, in nats: p the clean model's, as log p in float32, q of other logits."""
    chunk = max(1, (_CHUNK_CPU if logits.device.type == "cpu" else _CHUNK) // logits.shape[-1])
    losses, divergences = [], []
    for log_p_nV, row_nV, wanted in zip(*(column.split(chunk) for column in (log_p, logits, following)), strict=True):
        log_q_nV = row_nV.float().log_softmax(-1)
        losses.append(-log_q_nV.gather(1, wanted[:, None]).squeeze(1))
        divergences.append(torch.linalg.vecdot(log_p_nV.exp(), log_p_nV - log_q_nV))
    return torch.cat(losses), torch.cat(divergences)


class Sums:
    """Per-document sums of named quantities, and of whole vectors (for the mean)."""

    def __init__(self) -> None:
        self.index: dict[int, int] = {}
        self._columns: dict[str, np.ndarray] = {}

    def add(self, doc_id: Int[Tensor, " n"], terms: Mapping[str, Tensor]) -> None:
        """Add per-token terms, `[n]` or `[n, ...]`, to the rows of their documents; all of it is read from the device at once."""
        documents, inverse = torch.unique(doc_id, return_inverse=True)
        parts = [documents.double()]
        for values in terms.values():
            sums = torch.zeros(len(documents), *values.shape[1:], dtype=torch.float64, device=values.device)
            parts.append(sums.index_add_(0, inverse, values.double()))
        ids, *read = _on_host(parts)
        places = np.array([self.index.setdefault(int(d), len(self.index)) for d in ids], dtype=np.int64)
        for (name, values), sums in zip(terms.items(), read, strict=True):
            self._column(name, values.shape[1:])[places] += sums

    def _column(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        have = self._columns.get(name, np.zeros((0, *shape)))
        if len(have) < len(self.index):
            grown = np.zeros((max(len(self.index), 2 * len(have)), *shape))
            grown[: len(have)] = have
            self._columns[name] = have = grown
        return have

    def table(self) -> dict[str, np.ndarray]:
        """Each quantity as `[documents, ...]`, in the order of the documents' ids, whatever order they were added in."""
        order = np.argsort(list(self.index))  # which are unique
        return {name: self._column(name, column.shape[1:])[order] for name, column in list(self._columns.items())}


def _on_host(columns: Sequence[Float[Tensor, "n ..."]]) -> list[np.ndarray]:
    """Columns of equal length, by one copy from the device."""
    read = torch.cat([column[:, None].flatten(1) for column in columns], dim=1).cpu().numpy()
    widths = [math.prod(column.shape[1:]) for column in columns]
    parts = np.split(read, np.cumsum(widths)[:-1], axis=1)
    return [part.reshape(column.shape) for part, column in zip(parts, columns, strict=True)]


def total(table: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The sums over all documents."""
    return {name: column.sum(0) for name, column in table.items()}


def resampled(tables: Sequence[Mapping[str, np.ndarray]], resamples: int, seed: int) -> list[dict[str, np.ndarray]]:
    """The sums of `resamples` bootstrap samples of documents, `[resamples, ...]` each: the same samples for all tables.

    They are drawn some at a time: all would be as many numbers as resamples × documents.
    """
    documents = len(next(iter(tables[0].values())))
    generator, shares = np.random.default_rng(seed), np.full(documents, 1 / documents)
    found = [{name: np.empty((resamples, *column.shape[1:])) for name, column in table.items()} for table in tables]
    step = max(1, _DRAWS // documents)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        draws = generator.multinomial(documents, shares, size=size).astype(np.float64)
        for table, sums in zip(tables, found, strict=True):
            for name, column in table.items():
                sums[name][start : start + size] = np.tensordot(draws, column, 1)
    return found


def total_variance(sums: Mapping[str, Any]) -> Any:
    """Σ‖x − x̄‖², x̄ the mean of the same rows; 0 where no more is left than rounding makes, so that shares of it are undefined."""
    variance = sums["squared_norm"] - (sums["vector"] ** 2).sum(-1) / sums["rows"]
    return np.where(variance > FLAT * sums["squared_norm"], variance, 0.0)


def reconstruction_metrics(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Of the sums of `reconstruction_terms` and of the vectors themselves (`vector`).

    l0 = mean number of active latents; l1 = mean Σ|f_j|‖d_j‖; mse = mean ‖x−x̂‖²;
    fvu = Σ‖x−x̂‖²/Σ‖x−x̄‖² with x̄ the mean of all rows; gamma = Σ‖x̂‖²/Σx·x̂, under 1 for shrinkage
    (Rajamanoharan et al. 2024, section 4.2).
    """
    rows = sums["rows"]
    fvu = ratio(sums["squared_error"], total_variance(sums))
    return {
        "l0": sums["l0"] / rows,
        "l1": sums["l1"] / rows,
        "mse": sums["squared_error"] / rows,
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "cosine": sums["cosine"] / rows,
        "l2_ratio": sums["norm_ratio"] / rows,
        "gamma": ratio(sums["squared_norm_hat"], sums["dot"]),
    }


def massive_metrics(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Of the sums of rows that are scored, and of those of massive ones beside them (`massive_…`, absent where there are none).

    massive_share = share of Σ‖x−x̄‖² that massive rows hold, x̄ the mean of all rows; fvu_all = FVU over all rows.
    """
    rows, massive = sums["rows"], sums.get("massive_rows", 0.0)
    everything = {
        "rows": rows + massive,
        "squared_norm": sums["squared_norm"] + sums.get("massive_norm", 0.0),
        "vector": sums["vector"] + sums.get("massive_vector", 0.0),
    }
    variance = total_variance(everything)
    # Σ‖x−x̄‖² of the others about the mean of all: about their own, and as many times the square of the way between the means.
    between = np.asarray(everything["vector"]) / np.asarray(everything["rows"])[..., None]
    between = between - np.asarray(sums["vector"]) / np.asarray(rows)[..., None]
    usual = total_variance(sums) + rows * (between**2).sum(-1)
    return {
        "fvu_all": ratio(sums["squared_error"] + sums.get("massive_error", 0.0), variance),
        "massive_share": np.where(massive > 0, 1 - ratio(usual, variance), 0.0),
    }


def fidelity_metrics(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Of the sums of next-token losses of the clean, spliced, zero- and mean-ablated model, and of KL.

    loss_recovered = (CE_ablated − CE_spliced)/(CE_ablated − CE_clean), never clipped; kl_score is the
    same ratio for KL(clean ‖ ·) under zero ablation.
    """
    n = sums["positions"]
    clean, spliced, zero, mean = (sums[f"ce_{arm}"] for arm in ("clean", "spliced", "zero", "mean"))
    return {
        "ce_clean": clean / n,
        "ce_spliced": spliced / n,
        "ce_zero": zero / n,
        "ce_mean": mean / n,
        "delta_ce": (spliced - clean) / n,
        "loss_recovered_zero": ratio(zero - spliced, zero - clean),
        "loss_recovered_mean": ratio(mean - spliced, mean - clean),
        "kl": sums["kl"] / n,
        "kl_zero": sums["kl_zero"] / n,
        "kl_score": ratio(sums["kl_zero"] - sums["kl"], sums["kl_zero"]),
    }


def ratio(numerator: Any, denominator: Any) -> Any:
    """Not finite where the denominator is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(numerator, denominator)


def density_metrics(fires: Int[Tensor, " F"], rows: int) -> dict[str, float]:
    """Shares of latents that fire on more than 1% and 10% of rows, and those latents' share of all firing."""
    density = fires.double() / max(rows, 1)
    everything = max(float(fires.sum()), 1.0)
    return {
        "dense_fraction": float((density > 0.01).double().mean()),
        "dense_fraction_10": float((density > 0.1).double().mean()),
        "dense_share_of_firing": float(fires[density > 0.01].sum()) / everything,
        "dense_share_of_firing_10": float(fires[density > 0.1].sum()) / everything,
    }


@torch.no_grad()
def near_duplicates(W_dec: Float[Tensor, "F D"]) -> int:
    """Latents whose decoder row has a cosine above 0.99 with another's: each such group does the work of one."""
    unit_FD = torch.nn.functional.normalize(W_dec.float(), dim=1)
    found = 0
    for part_RD in unit_FD.split(max(1, _PAIRS // len(unit_FD))):
        found += int(((part_RD @ unit_FD.T > DUPLICATE).sum(1) > 1).sum())  # more than itself
    return found


def assignment(value_FN: Float[Tensor, "F N"]) -> tuple[Tensor, Tensor]:
    """Rows and the columns assigned to them, one to one, with the largest sum of values."""
    from scipy.optimize import linear_sum_assignment  # most commands can do without its half a second

    rows, columns = linear_sum_assignment(value_FN.double().cpu().numpy(), maximize=True)
    return torch.from_numpy(rows).to(value_FN.device), torch.from_numpy(columns).to(value_FN.device)

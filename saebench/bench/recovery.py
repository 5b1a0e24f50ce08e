"""How much of known features an SAE recovers. Suffixes: B rows, D dimension, N true features, F latents."""

import torch
from jaxtyping import Float
from torch import Tensor

from saebench.bench.synthetic import Sample, Synthetic
from saebench.metrics import assignment
from saebench.sae import SAE

RECOVERED = 0.9  # a true feature counts as recovered above this cosine


class Recovery:
    """Counts of firing and error over samples, and the scores made of them.

    Features are numbered from the most frequent; an SAE of F latents could hold the first F.
    """

    def __init__(self, W_dec_FD: Float[Tensor, "F D"], directions_ND: Float[Tensor, "N D"]) -> None:
        normalize = torch.nn.functional.normalize
        self.cosine_FN = normalize(W_dec_FD.detach(), dim=1) @ normalize(directions_ND, dim=1).T
        # Below 2^24 rows a float32 counts exactly.
        self.both_FN = torch.zeros_like(self.cosine_FN)
        self.fires_F, self.true_N = self.both_FN[:, 0].double(), self.both_FN[0].double()
        self.sum_D = torch.zeros_like(directions_ND[0], dtype=torch.float64)
        self.squared_norm, self.squared_error, self.rows = 0.0, 0.0, 0

    @torch.no_grad()
    def add(self, sample: Sample, acts_BF: Float[Tensor, "B F"], x_hat_BD: Float[Tensor, "B D"]) -> None:
        """Count a batch in: what fired, what should have, and the reconstruction."""
        fires_BF, true_BN = (acts_BF != 0).float(), (sample.coefficients > 0).float()
        self.both_FN += fires_BF.T @ true_BN
        self.fires_F += fires_BF.sum(0)
        self.true_N += true_BN.sum(0)
        self.sum_D += sample.x.double().sum(0)
        self.squared_norm += float(sample.x.double().pow(2).sum())
        self.squared_error += float((sample.x - x_hat_BD).double().pow(2).sum())
        self.rows += len(sample.x)

    def scores(self) -> dict[str, float]:
        """The scores by name, in [0, 1] but for the L0s and `explained_variance`, which may be below 0.

        As SAELens has them, and so comparable with published rows (`sae_lens.synthetic.evals`): `f1`,
        `precision` and `recall` of each latent for the feature of highest |cosine|, averaged over all
        latents, dead ones at 0; `mcc`, mean |cosine| under the best one-to-one assignment, where signs and
        dead latents do not matter; `uniqueness`, distinct features of highest |cosine| per latent;
        `explained_variance`, 1 - Σ‖x - x̂‖² / Σ‖x - mean‖².

        Stricter: cosines below 0 and those of dead latents are 0. `signed_mcc` is the mean cosine and
        `matched_f1` the mean F1 of the best assignment; `mmcs`, the mean over true features of the best
        cosine, `recovered` the share of them whose best is above 0.9. `rare_*` are of the rarest tenth of
        the F most frequent features, `rare_f1` with 0 for those that no latent is assigned to.
        """
        n_latents, n_features = self.cosine_FN.shape
        nearest_F = self.cosine_FN.abs().argmax(1)
        every_F = torch.arange(n_latents, device=nearest_F.device)
        both_F = self.both_FN[every_F, nearest_F]
        strict_FN = self.cosine_FN.clamp(min=0) * (self.fires_F > 0)[:, None]
        latents, features = assignment(strict_FN)
        matched_f1 = self._f1(latents, features)
        f1_N = torch.zeros(n_features, dtype=torch.float64, device=matched_f1.device)
        f1_N[features] = matched_f1
        best_N = strict_FN.amax(0)
        last = min(n_latents, n_features)
        rare = slice(last - max(1, last // 10), last)
        variance = self.squared_norm - float(self.sum_D.pow(2).sum()) / self.rows
        values = {
            "f1": self._f1(every_F, nearest_F).mean(),
            "precision": (both_F / self.fires_F.clamp(min=1)).mean(),
            "recall": (both_F / self.true_N[nearest_F].clamp(min=1)).mean(),
            "mcc": self.cosine_FN.abs()[assignment(self.cosine_FN.abs())].mean(),
            "uniqueness": len(nearest_F.unique()) / n_latents,
            "explained_variance": 1 - self.squared_error / variance,
            "signed_mcc": strict_FN[latents, features].mean(),
            "matched_f1": matched_f1.mean(),
            "mmcs": best_N.mean(),
            "recovered": (best_N > RECOVERED).double().mean(),
            "rare_mmcs": best_N[rare].mean(),
            "rare_recovered": (best_N[rare] > RECOVERED).double().mean(),
            "rare_f1": f1_N[rare].mean(),
            "l0": self.fires_F.sum() / self.rows,
            "true_l0": self.true_N.sum() / self.rows,
            "dead": (self.fires_F == 0).double().mean(),
        }
        return {name: float(value) for name, value in values.items()}

    def _f1(self, latents: Tensor, features: Tensor) -> Tensor:
        """2 TP / (fired + should have), 0 where neither ever did."""
        total = self.fires_F[latents] + self.true_N[features]
        return 2 * self.both_FN[latents, features] / total.clamp(min=1)


def recovery_of_sae(sae: SAE, data: Synthetic, n_rows: int, generator: torch.Generator) -> dict[str, float]:
    """Scores of an SAE on fresh rows, in batches of 4096. It must take the data at its own scale (`fold`)."""
    recovery = Recovery(sae.W_dec, data.directions_ND)
    with torch.no_grad():
        for n in _batches(n_rows):
            sample = data.sample(n, generator)
            out = sae(sample.x)
            recovery.add(sample, out.acts, out.x_hat)
    return recovery.scores()


def recovery_of_oracle(data: Synthetic, d_sae: int, n_rows: int, generator: torch.Generator) -> dict[str, float]:
    """Scores of the truth cut to `d_sae` latents: directions and coefficients of the most frequent features.

    No SAE has its code, which cannot be read off x alone; what it misses is due to the width.
    """
    if not 0 < d_sae <= data.settings.n_features:
        raise ValueError(f"d_sae is {d_sae}; expected 1 to n_features = {data.settings.n_features} for an oracle")
    W_dec_FD = data.directions_ND[:d_sae]
    recovery = Recovery(W_dec_FD, data.directions_ND)
    for n in _batches(n_rows):
        sample = data.sample(n, generator)
        acts_BF = sample.coefficients[:, :d_sae]
        recovery.add(sample, acts_BF, acts_BF @ W_dec_FD + data.bias_D)
    return recovery.scores()


def _batches(n_rows: int) -> list[int]:
    return [min(4096, n_rows - start) for start in range(0, n_rows, 4096)]

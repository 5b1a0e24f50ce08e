"""Superposition data whose features are known; `recovery` scores what an SAE finds of them.

The data is that of SynthSAEBench (Chanin et al. 2026, arXiv 2602.14687) as `sae_lens.synthetic` builds it:
x = Σ_i c_i d_i + bias, where Zipf-distributed features fire through a Gaussian copula of low rank and,
below the roots of a hierarchy, only together with their parent. `benchmarks/synthetic_check.py` compares
the two. Suffixes: B rows, D dimension, N true features (the most frequent first), F latents,
R rank of the copula, M (row, active parent) pairs, C children of a parent.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

_LARGEST_SHARED_VARIANCE = 0.99  # of a feature's normal; what the copula's factors may take of it


@dataclass(frozen=True, kw_only=True)
class Hierarchy:
    """Trees that fill the first features breadth first: roots, then their children, and so on."""

    n_roots: int
    """Trees."""
    branching: int = 4
    """Children of each feature above the last level."""
    depth: int = 3
    """Levels below the roots."""
    exclusive: bool = True
    """Whether at most one child of a parent fires; among several, chance decides."""
    scale_children: bool = True
    """Whether a child's coefficient is multiplied by its parent's over the parent's mean."""

    def __post_init__(self) -> None:
        for name, least in (("n_roots", 1), ("branching", 2), ("depth", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"hierarchy {name} is {getattr(self, name)}; expected at least {least}")

    def n_features(self) -> int:
        """Features in all trees."""
        return self.n_roots * sum(self.branching**level for level in range(self.depth + 1))

    def n_parents(self) -> int:
        """Features that have children: the first ones."""
        return self.n_features() - self.n_roots * self.branching**self.depth

    def first_child(self, parent: Any) -> Any:
        """The first of the consecutive children of a feature, given as a number or a tensor."""
        return self.n_roots + parent * self.branching


@dataclass(frozen=True, kw_only=True)
class SyntheticSettings:
    """What defines the data. Equal settings and seeds give SAELens' constants too, on the CPU."""

    n_features: int
    """N, true features."""
    d_in: int
    """D, dimension of the data."""
    exponent: float = 0.5
    """Of the Zipf law of firing probabilities."""
    max_probability: float = 0.4
    """Of the most frequent feature; the law is shifted and scaled to meet both ends."""
    min_probability: float = 5e-4
    """Of the rarest."""
    correlation_rank: int = 25
    """R, factors behind the copula's correlations."""
    correlation_scale: float = 0.1
    """Standard deviation of a feature's loading on a factor; 0 for independent features."""
    hierarchy: Hierarchy | None = None
    """Trees, or None for features that all fire on their own."""
    mean_coefficients: tuple[float, float] = (5.0, 4.0)
    """Mean coefficient of the first and last feature, linear between."""
    std_coefficients: tuple[float, float] = (0.5, 0.5)
    """m, s: each feature's standard deviation is drawn as |N(m, s²)|."""
    orthogonal_steps: int = 100
    """Adam steps that push the directions apart; 0 leaves them random."""
    orthogonal_lr: float = 3e-4
    """Their learning rate."""
    bias_norm: float = 0.5
    """Length of the bias."""
    seed: int = 42
    """Of directions, loadings and standard deviations; samples have a generator of their own."""

    def __post_init__(self) -> None:
        for name in ("n_features", "d_in"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 2")
        if not 0 < self.min_probability < self.max_probability <= 1:
            raise ValueError(
                f"firing probabilities run from {self.max_probability} to {self.min_probability}; "
                "expected 0 < min_probability < max_probability <= 1"
            )
        for name in ("exponent", "orthogonal_lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected more than 0")
        for name in ("correlation_rank", "correlation_scale", "orthogonal_steps", "bias_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 0")
        if min(self.mean_coefficients) <= 0 or min(self.std_coefficients) < 0:
            raise ValueError(
                f"coefficients have means {self.mean_coefficients} and deviations {self.std_coefficients}; "
                "expected means above 0 and deviations of at least 0"
            )
        if self.hierarchy is not None and self.hierarchy.n_features() > self.n_features:
            raise ValueError(
                f"n_features is {self.n_features}; the hierarchy has {self.hierarchy.n_features()}: "
                "add features, or take fewer roots, branches or levels"
            )


SIZES = {
    "16k": SyntheticSettings(n_features=16_384, d_in=768, hierarchy=Hierarchy(n_roots=128)),
    "mini": SyntheticSettings(n_features=1024, d_in=128, hierarchy=Hierarchy(n_roots=8)),
}
"""`16k` is SynthSAEBench-16k as its paper and its creation script have it; `mini` fits a laptop.

The released weights of SynthSAEBench-16k are reported to have been saved without `scale_children`.
"""


class Sample(NamedTuple):
    """Rows and the true coefficients behind them."""

    x: Float[Tensor, "B D"]
    coefficients: Float[Tensor, "B N"]


class Synthetic:
    """The data of given settings: its constants, and samples of it.

    `rates_N` are the firing probabilities of the settings, `drawn_N` those of the copula: conditional on
    an active parent and raised for what exclusion takes away, so that the data has about `rates_N`.
    """

    def __init__(self, settings: SyntheticSettings, device: str = "cpu") -> None:
        self.settings, self.device = settings, device
        n, seed = settings.n_features, settings.seed
        generator = torch.Generator().manual_seed(seed)
        directions_ND = _unit(torch.randn(n, settings.d_in, generator=generator)).to(device)
        bias_D = torch.randn(settings.d_in, generator=generator)
        self.bias_D = (bias_D / bias_D.norm() * settings.bias_norm).to(device)
        self.directions_ND = orthogonalised(directions_ND, settings.orthogonal_steps, settings.orthogonal_lr)
        # SAELens' offsets of the seed.
        mean, spread = settings.std_coefficients
        std_N = (mean + torch.randn(n, generator=torch.Generator().manual_seed(seed + 1)) * spread).abs()
        self.std_N = std_N.to(device)
        self.mean_N = torch.linspace(*settings.mean_coefficients, n).to(device)
        loadings_NR = torch.randn(n, settings.correlation_rank, generator=torch.Generator().manual_seed(seed + 4))
        loadings_NR *= settings.correlation_scale
        shared_N = loadings_NR.pow(2).sum(1, keepdim=True)
        loadings_NR *= (_LARGEST_SHARED_VARIANCE / shared_N.clamp(min=_LARGEST_SHARED_VARIANCE)).sqrt()
        self.loadings_NR = loadings_NR.to(device)
        self.own_N = (1 - self.loadings_NR.pow(2).sum(1)).sqrt()
        rates_N = zipf_probabilities(settings)
        drawn_N = compensated(rates_N, settings.hierarchy)
        self.rates_N, self.drawn_N = rates_N.to(device), drawn_N.to(device)
        self.threshold_N = math.sqrt(2) * torch.erfinv(1 - 2 * self.drawn_N)
        tree = settings.hierarchy
        top = torch.arange(n, device=device)
        self._top = top if tree is None else top[(top < tree.n_roots) | (top >= tree.n_features())]
        self._top_loadings_RT = self.loadings_NR[self._top].T.contiguous()

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Sample:
        """`n` rows. The generator must be on the data's device."""
        factors_BR = self._normal(n, self.settings.correlation_rank, generator=generator)
        own_BT = self._normal(n, len(self._top), generator=generator)
        shared_BT = factors_BR @ self._top_loadings_RT
        fires_BT = torch.addcmul(shared_BT, own_BT, self.own_N[self._top]) > self.threshold_N[self._top]
        rows_M, features_M = fires_BT.nonzero(as_tuple=True)
        features_M = self._top[features_M]
        values_M = self._magnitudes(features_M, generator)
        coefficients_BN = torch.zeros(n, self.settings.n_features, device=self.device)
        coefficients_BN[rows_M, features_M] = values_M
        tree = self.settings.hierarchy
        for _ in range(tree.depth if tree else 0):
            assert tree is not None
            active = (values_M > 0) & (features_M < tree.n_parents())
            rows_M, parents_M = rows_M[active], features_M[active]
            children_MC = tree.first_child(parents_M)[:, None] + torch.arange(tree.branching, device=self.device)
            values_MC = self._children(factors_BR[rows_M], values_M[active], parents_M, children_MC, tree, generator)
            rows_M = rows_M.repeat_interleave(tree.branching)
            features_M, values_M = children_MC.flatten(), values_MC.flatten()
            coefficients_BN[rows_M, features_M] = values_M
        return Sample(self._decode(coefficients_BN), coefficients_BN)

    def _decode(self, coefficients_BN: Tensor) -> Tensor:
        """Rows of given coefficients, from the few that are not 0."""
        rows_M, features_M = coefficients_BN.nonzero(as_tuple=True)
        offsets_B = torch.searchsorted(rows_M, torch.arange(len(coefficients_BN), device=self.device))
        weights_M = coefficients_BN[rows_M, features_M]
        x_BD = torch.nn.functional.embedding_bag(
            features_M, self.directions_ND, offsets_B, mode="sum", per_sample_weights=weights_M
        )
        return x_BD + self.bias_D

    def _children(
        self,
        factors_MR: Tensor,
        parent_values_M: Tensor,
        parents_M: Tensor,
        children_MC: Tensor,
        tree: Hierarchy,
        generator: torch.Generator,
    ) -> Tensor:
        """Coefficients of the children of active parents. No others are drawn: they could not fire."""
        normal_MC = self._normal(*children_MC.shape, generator=generator) * self.own_N[children_MC]
        normal_MC += (self.loadings_NR[children_MC] @ factors_MR[:, :, None]).squeeze(2)
        values_MC = self._magnitudes(children_MC, generator) * (normal_MC > self.threshold_N[children_MC])
        if tree.scale_children:
            values_MC *= (parent_values_M / self.mean_N[parents_M])[:, None]
        if tree.exclusive:
            lots_MC = torch.rand(children_MC.shape, generator=generator, device=self.device) * (values_MC > 0)
            values_MC *= lots_MC == lots_MC.amax(1, keepdim=True)
        return values_MC

    def _magnitudes(self, features: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(features.shape, generator=generator, device=self.device)
        return torch.relu(torch.addcmul(self.mean_N[features], noise, self.std_N[features]))

    def _normal(self, *shape: int, generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator, device=self.device)


def zipf_probabilities(settings: SyntheticSettings) -> Float[Tensor, " N"]:
    """rank^-exponent, shifted and scaled to run from the largest probability to the smallest."""
    law_N = torch.arange(1, settings.n_features + 1).float() ** -settings.exponent
    share_N = (law_N - law_N[-1]) / (law_N[0] - law_N[-1])
    return settings.min_probability + (settings.max_probability - settings.min_probability) * share_N


def compensated(rates_N: Float[Tensor, " N"], tree: Hierarchy | None) -> Float[Tensor, " N"]:
    """Probabilities to draw with so that features under a hierarchy fire about as often as `rates_N`.

    A child's is divided by its parent's rate and, where siblings exclude each other, multiplied by one plus
    how many siblings fire with it on average; at most 1 (`sae_lens.synthetic`, `compensate_probabilities`).
    """
    drawn_N = rates_N.clone()
    if tree is None:
        return drawn_N
    parents_P = rates_N[: tree.n_parents(), None]
    children_PC = rearrange(rates_N[tree.n_roots : tree.n_features()], "(p c) -> p c", c=tree.branching)
    drawn_PC = children_PC / parents_P
    if tree.exclusive:
        drawn_PC = drawn_PC * (1 + (children_PC.sum(1, keepdim=True) - children_PC) / parents_P)
    drawn_N[tree.n_roots : tree.n_features()] = rearrange(drawn_PC, "p c -> (p c)")
    return drawn_N.clamp(max=1.0)


@torch.no_grad()
def orthogonalised(directions_ND: Float[Tensor, "N D"], steps: int, lr: float) -> Float[Tensor, "N D"]:
    """Unit rows after Adam steps on Σ_{i≠j} (d_i·d_j)² + N Σ_i (‖d_i‖² - 1)² (arXiv 2602.14687, section 3).

    The gradient needs DᵀD only, not the N × N products of rows.
    """
    rows_ND = torch.nn.Parameter(directions_ND.clone())
    optimizer = torch.optim.Adam([rows_ND], lr=lr)
    for _ in range(steps):
        squared_N = rows_ND.pow(2).sum(1, keepdim=True)
        others_ND = rows_ND @ (rows_ND.T @ rows_ND) - squared_N * rows_ND
        rows_ND.grad = 4 * others_ND + 4 * len(rows_ND) * (squared_N - 1) * rows_ND
        optimizer.step()
    return _unit(rows_ND.detach())


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)

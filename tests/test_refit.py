"""Coefficients of least squares for the latents that fire, against SciPy's in float64, row by row."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from test_sae import D, F, inputs, random_sae

from saebench.sae import SAE, ReLUSAE, encode_sparse, reconstruct_sparse
from saebench.sae.architectures import ARCHITECTURES
from saebench.sae.refit import refit
from saebench.sae.sparse import SparseCode


def code_of(rows: list[list[int]], d_sae: int) -> SparseCode:
    """Latents of each row."""
    offsets = np.cumsum([0, *map(len, rows)])
    latents = [latent for row in rows for latent in row]
    return SparseCode(torch.tensor(offsets).int(), torch.tensor(latents).int(), d_sae)


def naive(code: SparseCode, values: torch.Tensor, target: torch.Tensor, W_dec: torch.Tensor) -> np.ndarray:
    """What `refit` says it finds, by SciPy, a row at a time: ridge as further rows of the system."""
    found, starts = [], code.offsets.tolist()
    for row, (start, end) in enumerate(itertools.pairwise(starts)):
        if start == end:
            continue
        d_KE = W_dec[code.latents[start:end].long()].double().numpy()
        ridge = math.sqrt(1e-5 * (d_KE**2).sum())
        system = np.vstack([d_KE.T, ridge * np.eye(end - start)])
        wanted = np.concatenate([target[row].double().numpy(), ridge * values[start:end].double().numpy()])
        found.append(nnls(system, wanted)[0])
    return np.concatenate(found) if found else np.zeros(0)


def test_by_hand() -> None:
    """d are (1, 0), (0.6, 0.8), and (0.6, 0.8) again. (2.2, 1.6) is 1 and 2 of the first two, which two alike share as they were
    shared; (−1, 1) would take −1.75 and 1.25: without the first, 0.2 of the second."""
    W_dec = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]])
    code = code_of([[0, 1], [], [0, 1, 2], [0, 1], [0]], 3)
    values = torch.tensor([0.5, 1.5, 0.5, 1.0, 2.0, 1.0, 1.0, 3.0])
    target = torch.tensor([[2.2, 1.6], [5.0, 5.0], [2.2, 1.6], [-1.0, 1.0], [-1.0, 0.0]])
    found = refit(code, values, target, W_dec)
    want = [
        1.0,
        2.0,
        1.0,
        0.5,
        1.5,
        0.0,
        0.2,
        0.0,
    ]  # of the twins 1 and 2 add up to 3, and to 2 in the end: half less each
    assert found.tolist() == pytest.approx(want, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000), d_out=st.integers(1, 12), d_sae=st.integers(1, 30), density=st.floats(0, 1),
    twins=st.booleans(), block=st.sampled_from([1, 300, 2**21]),
)  # fmt: skip
def test_it_is_non_negative_least_squares(
    seed: int, d_out: int, d_sae: int, density: float, twins: bool, block: int
) -> None:
    """Rows without a latent, of one, and of more than there are dimensions; in blocks of any size."""
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(d_sae, d_out, generator=generator)
    if twins:
        W_dec[d_sae // 2 :] = W_dec[: d_sae - d_sae // 2].clone()
    active = torch.rand(9, d_sae, generator=generator) < density
    code = code_of([row.nonzero()[:, 0].tolist() for row in active], d_sae)
    values = torch.rand(len(code.latents), generator=generator)
    target = torch.randn(9, d_out, generator=generator) * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saebench.sae.refit._VALUES", {"cpu": block})
        found = refit(code, values, target, W_dec)
    want = torch.from_numpy(naive(code, values, target, W_dec))
    assert (found >= 0).all()
    decoded, best = (code.decode(c.float(), W_dec).double() for c in (found, want))
    error, least = ((target - decoded).pow(2).sum(1), (target - best).pow(2).sum(1))
    assert (error <= 1.01 * least + 1e-4 * target.pow(2).sum(1)).all()
    exact = refit(code, values.double(), target.double(), W_dec.double())
    assert exact.numpy() == pytest.approx(want.numpy(), abs=1e-6)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
@torch.no_grad()
def test_no_row_is_worse_and_no_latent_fires_that_did_not(architecture: str) -> None:
    sae, x = random_sae(architecture), inputs()
    _check(sae, x)
    sae.normalize = "layer_norm"  # undone after decoding, and so is refitting
    _check(sae, x)


def _check(sae: SAE, x: torch.Tensor) -> None:
    plain, code, _ = reconstruct_sparse(sae, x)
    refitted, kept, values = reconstruct_sparse(sae, x, refitted=True)
    errors = [(x - x_hat).pow(2).sum(1) for x_hat in (plain, refitted)]
    assert (errors[1] <= errors[0] * (1 + 1e-4)).all()
    assert errors[1].sum() < 0.9 * errors[0].sum()
    assert (values > 0).all()
    fired = set(zip(code.rows.tolist(), code.latents.tolist(), strict=True))
    assert set(zip(kept.rows.tolist(), kept.latents.tolist(), strict=True)) <= fired


@torch.no_grad()
def test_an_sae_whose_coefficients_are_the_best_stays_as_it_is() -> None:
    sae = random_sae("relu")
    assert isinstance(sae, ReLUSAE)
    sae.W_dec.copy_(torch.eye(F, D))
    sae.W_enc.copy_(torch.eye(D, F))
    sae.b_enc.zero_()
    x = inputs()
    _, values = encode_sparse(sae, x)
    assert reconstruct_sparse(sae, x, refitted=True)[2].tolist() == pytest.approx(values.tolist(), rel=1e-5)


def test_what_is_no_autoencoder_is_refused() -> None:
    with pytest.raises(ValueError, match="writes other vectors than it reads; expected an autoencoder"):
        reconstruct_sparse(random_sae("relu", d_out=D), inputs(), refitted=True)

"""Coefficients of least squares for the latents that fire, against SciPy's in float64, row by row; and figures of SAEs that have them."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONTEXT, WIDTH
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from test_evaluate import metrics_of, save, scaled_identity
from test_sae import D, F, inputs, random_sae

from saebench.evaluate import EvalConfig, evaluate, table, tables, write_report
from saebench.files import read_json
from saebench.sae import SAE, encode_sparse, new_sae, reconstruct_sparse
from saebench.sae.architectures import ARCHITECTURES
from saebench.sae.refit import refit
from saebench.sae.sparse import SparseCode
from saebench.store import Store


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
    sae, eye = new_sae("relu", D, F), torch.eye(F, D)
    sae.W_enc.copy_(eye.T)
    sae.W_dec.copy_(eye)
    x = inputs()
    _, values = encode_sparse(sae, x)
    assert reconstruct_sparse(sae, x, refitted=True)[2].tolist() == pytest.approx(values.tolist(), rel=1e-5)


def test_what_is_no_autoencoder_is_refused() -> None:
    with pytest.raises(ValueError, match="writes other vectors than it reads; expected an autoencoder"):
        reconstruct_sparse(random_sae("relu", d_out=D), inputs(), refitted=True)


# --------------------------------------------------------------------------------------- evaluation


def test_an_sae_that_writes_half_of_each_vector_is_exact_when_refitted(store: Store, tmp_path: Path) -> None:
    folder = save(scaled_identity(0.5), tmp_path, "half", store)
    evaluate(EvalConfig(run=tmp_path, dead_rows=480))
    plain, draws = read_json(folder / "evaluation.json"), (folder / "bootstrap.safetensors").read_bytes()
    assert "refitted" not in plain
    evaluate(EvalConfig(run=tmp_path, dead_rows=480, refit=True))
    both = read_json(folder / "evaluation.json")
    refitted = both.pop("refitted")
    metrics = refitted["metrics"]
    assert metrics["fvu"] == pytest.approx(0, abs=1e-6)
    assert (metrics["delta_ce"], metrics["kl"]) == (pytest.approx(0, abs=1e-5), pytest.approx(0, abs=1e-5))
    assert metrics["gamma"] == pytest.approx(1, abs=1e-3)
    assert metrics["l0"] == WIDTH
    for name, (change, half) in refitted["change"].items():
        assert change == metrics[name] - plain["metrics"][name]
        assert half > 0
    assert refitted["intervals"]["fvu"][1] < 1e-6
    # What is not refitted is what it was, to the last bit, and is not evaluated again without.
    assert both["metrics"] == plain["metrics"]
    assert both["intervals"] == plain["intervals"]
    assert (folder / "bootstrap.safetensors").read_bytes() == draws
    assert both["identity"] == plain["identity"] | {"refit": True}
    written = (folder / "evaluation.json").stat().st_mtime_ns
    for again in (False, True):
        evaluate(EvalConfig(run=tmp_path, dead_rows=480, refit=again))
    assert (folder / "evaluation.json").stat().st_mtime_ns == written


def test_reports_show_refitted_figures_apart(store: Store, tmp_path: Path) -> None:
    folders = [save(scaled_identity(0.5), tmp_path, "half", store)]
    evaluate(EvalConfig(run=tmp_path, dead_rows=480, refit=True))
    folders.append(save(scaled_identity(0.9), tmp_path, "later", store))
    evaluate(EvalConfig(run=tmp_path, dead_rows=480))
    summary = write_report(tmp_path, folders)
    half, later = summary["saes"]
    assert half["fvu"] == metrics_of(folders[0])["fvu"] > 0.2
    assert "refitted" not in later
    main, refitted, *_ = tables(summary)
    assert main == table(summary["saes"], summary["least_differences"])
    assert refitted[0][:4] == ["Refitted", "L0", "FVU", "change"]
    assert [row[:3] for row in refitted[1:]] == [["half", f"{WIDTH:.1f}", "0.0000"]]
    change, width = half["refitted"]["change"]["fvu"]
    assert refitted[1][3] == f"{change:+.4f} ±{width:.4f}"
    assert "Refitted: the same latents fire" in (tmp_path / "report.html").read_text()


def test_one_document_gives_no_interval_of_a_change(store: Store, tmp_path: Path) -> None:
    folder = save(scaled_identity(0.5), tmp_path, "half", store)
    summary = write_report(tmp_path, evaluate(EvalConfig(run=tmp_path, tokens=CONTEXT, dead_rows=480, refit=True)))
    assert read_json(folder / "evaluation.json")["refitted"]["change"]["fvu"][1] is None
    assert "±" not in tables(summary)[1][1][3]

"""docs/metrics.md: its examples, worked again."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import stdtr

from saebench.evaluate.compare import Evaluated, half_of
from saebench.evaluate.frontiers import at_equal_l0
from saebench.metrics import fidelity_metrics, reconstruction_metrics, reconstruction_terms
from saebench.sae.refit import refit
from saebench.sae.sparse import SparseCode

PAGE = (Path(__file__).parents[1] / "docs/metrics.md").read_text()


def table() -> list[list[str]]:
    """Rows of the page's table."""
    lines = [line for line in PAGE.splitlines() if line.startswith(("| A |", "| B |"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def vector(cell: str) -> list[float]:
    return [float(part) for part in cell.strip("()").split(",")]


def said(text: str) -> None:
    assert text in PAGE


def test_reconstruction() -> None:
    x, x_hat = (torch.tensor([vector(row[column]) for row in table()]) for column in (1, 2))
    l0 = torch.tensor([float(row[3]) for row in table()])
    sums = {name: float(values.sum()) for name, values in reconstruction_terms(x, x_hat, l0, l0).items()}
    found = reconstruction_metrics({**sums, "vector": x.double().sum(0).numpy()})
    assert (found["l0"], found["fvu"]) == (1.25, 0.5)
    said("(1 + 1 + 1 + 2) ÷ 4 = 1.25")
    said("4 ÷ 8 = 0.5")
    assert (sums["squared_norm_hat"], sums["dot"]) == (32, 34)
    said(f"32 ÷ 34 = {found['gamma']:.3f}")
    cosines = torch.nn.functional.cosine_similarity(x, x_hat)
    said("(" + " + ".join(f"{cosine:.3f}" for cosine in cosines) + f") ÷ 4 = {found['cosine']:.3f}")


def test_losses() -> None:
    sums = {
        f"ce_{arm}": sum(float(row[4 + n]) for row in table())
        for n, arm in enumerate(("clean", "spliced", "zero", "mean"))
    }
    found = fidelity_metrics({**sums, "positions": 4.0, "kl": 1.0, "kl_zero": 4.0})
    assert found["delta_ce"] == 0.25
    said("(1.75 − 1.5) = 0.25")
    said(f"(5.5 − 1.75) ÷ (5.5 − 1.5) = {found['loss_recovered_zero']:.4f}")
    said(f"(4.5 − 1.75) ÷ (4.5 − 1.5) = {found['loss_recovered_mean']:.3f}")


def test_refitted() -> None:
    W_dec, x = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[2.2, 1.6], [-1.0, 1.0]])
    code = SparseCode(torch.tensor([0, 2, 4]).int(), torch.tensor([0, 1, 0, 1]).int(), 2)
    values = torch.tensor([0.5, 1.5, 1.0, 1.0])
    x_hat = code.decode(values, W_dec)
    assert x_hat[0].tolist() == pytest.approx([1.4, 1.2])
    assert float((x - x_hat)[0].pow(2).sum()) == pytest.approx(0.8)
    said("an encoder that says 0.5 and 1.5 makes (1.4, 1.2): error 0.8. Refitted they are 1 and 2, error 0.")
    assert torch.linalg.solve(W_dec.T, x[1]).tolist() == pytest.approx([-1.75, 1.25])
    assert refit(code, values, x, W_dec).tolist() == pytest.approx([1, 2, 0, 0.2], abs=1e-4)
    said("signed coefficients would be −1.75 and 1.25; non-negative ones are 0 and 0.2.")


def test_a_paired_difference() -> None:
    samples = list(itertools.product("AB", repeat=2))  # each as likely as the others
    one, other = ({"A": 1.0, "B": 0.0}, {"A": 1.4, "B": 0.4})
    means = [[sum(sae[doc] for doc in sample) / 4 for sample in samples] for sae in (one, other)]
    assert sorted({round(value, 2) for value in means[0]}) == [0.0, 0.25, 0.5]
    said("the first has 0.5, 0.25 and 0, the second 0.7, 0.45 and 0.2")
    said(f"a standard deviation of {np.std(means[0]):.2f}")
    assert np.std(np.subtract(*means)) == pytest.approx(0, abs=1e-12)
    said(f"their difference is {means[1][0] - means[0][0]:.1f} on every sample")
    half = half_of(0.0, None, 0.03**2 * (1 / 3 + 1 / 3), 4)
    said(
        f"are told apart from {half:.3f} on where documents add nothing: ν = 4, t = {half / (0.03 * math.sqrt(2 / 3)):.3f}"
    )
    said(f"would be told apart in {100 * 2 * stdtr(4, -1.96):.0f} of 100 draws")
    assert half_of(1.0, None, 1e-9, 4) == pytest.approx(1.96, rel=1e-4)  # of documents there are many


def test_equal_l0() -> None:
    def sae(architecture: str, l0: float, fvu: float) -> Evaluated:
        entry = {"name": f"{architecture}{l0}", "path": f"{architecture}{l0}", "architecture": architecture, "kind": "SAE",
                 "writes": ["a"], "d_sae": 8, "l0": l0, "fvu": fvu, "baselines": {}}  # fmt: skip
        return Evaluated(entry, {}, "")

    (found,) = at_equal_l0([sae("x", 8, 0.5), sae("x", 32, 0.3), sae("y", 8, 0.6), sae("y", 32, 0.4)])
    assert [round(l0) for l0 in found["l0s"]] == [8, 16, 32]
    lines = found["figures"]["fvu"]
    assert lines["x"]["values"][1] == pytest.approx(0.4)
    assert lines["x"]["mean"] == pytest.approx(0.4)
    assert lines["y"]["behind"] == pytest.approx(0.1)
    said(
        "make 0.4 at 16, halfway in log L0, and a mean of 0.4 over that range; a line from 0.6 to 0.4 is 0.1 behind it"
    )
    assert math.log(16) == pytest.approx((math.log(8) + math.log(32)) / 2)


def test_beyond_baselines_by_loss() -> None:
    """ΔCE 0.2 and 0.1 at L0 8 and 32, beside an untrained one that was spliced in: 0.9 and 0.5; PCA, 1.2 and 0.6, is behind that."""

    def sae(architecture: str, l0: float, delta_ce: float, spliced: dict[str, float]) -> Evaluated:
        entry = {"name": f"{architecture}{l0}", "path": f"{architecture}{l0}", "architecture": architecture, "kind": "SAE",
                 "writes": ["a"], "d_sae": 8, "l0": l0, "fvu": delta_ce, "delta_ce": delta_ce, "baselines": {},
                 **({"spliced_baselines": {name: {"delta_ce": value} for name, value in spliced.items()}} if spliced else {})}  # fmt: skip
        return Evaluated(entry, {}, "")

    first, last = {"pca": 1.2, "untrained": 0.9}, {"pca": 0.6, "untrained": 0.5}
    (found,) = at_equal_l0(
        [sae("x", 8, 0.2, first), sae("x", 32, 0.1, last), sae("y", 8, 0.3, {}), sae("y", 32, 0.2, {})]
    )
    lines = found["figures"]["delta_ce"]
    assert lines["untrained SAE"]["mean"] == pytest.approx(0.7)
    assert lines["PCA of rank L0"]["mean"] == pytest.approx(0.9)
    assert lines["x"]["excess"] == pytest.approx(0.55)
    assert "excess" not in found["figures"]["fvu"]["x"]

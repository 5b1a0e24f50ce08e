"""docs/metrics.md: its examples, worked again."""

import ast
import inspect
import itertools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.special import stdtr
from test_detection import half
from torch import Tensor

from saebench.bench.absorption import AbsorptionConfig, Asked
from saebench.bench.concepts import Concepts, Examples
from saebench.bench.detection import PythonConfig
from saebench.bench.detection import _figures as python_figures
from saebench.bench.ground_truth import SHOWN
from saebench.bench.projections import f1_of, main_latents
from saebench.bench.recovery import Recovery
from saebench.bench.results import Figure, Results
from saebench.bench.stability import StabilityConfig, _Group, _Side
from saebench.bench.synthetic import Sample
from saebench.bench.table import BENCHES
from saebench.evaluate.baselines import PCA
from saebench.evaluate.compare import Evaluated, half_of
from saebench.evaluate.figures import figures, resampled_metrics
from saebench.evaluate.frontiers import at_equal_l0
from saebench.evaluate.measure import Dictionary, Measurement, Subject, silent_latents
from saebench.evaluate.sets import error_shares
from saebench.evaluate.tables import COLUMNS, SET_COLUMNS
from saebench.evaluate.tables import table as table_of
from saebench.metrics import (
    Sums,
    density_metrics,
    fidelity_metrics,
    loss_and_kl,
    reconstruction_metrics,
    reconstruction_terms,
)
from saebench.sae import SAE, Ends, new_sae
from saebench.sae.refit import refit
from saebench.sae.sparse import SparseCode
from saebench.store import Store

PAGE = (Path(__file__).parents[1] / "docs/metrics.md").read_text()


def table() -> list[list[str]]:
    """Rows of the page's table."""
    lines = [line for line in PAGE.splitlines() if line.startswith(("| A |", "| B |"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def vector(cell: str) -> list[float]:
    return [float(part) for part in cell.strip("()").split(",")]


def said(text: str) -> None:
    assert text in PAGE


def section(heading: str) -> str:
    """The page's text under a heading."""
    return PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def an_sae(W_dec: list[list[float]]) -> SAE:
    """A ReLU SAE of given decoder rows, tied."""
    rows = torch.tensor(W_dec)
    sae = new_sae("relu", rows.shape[1], len(rows)).requires_grad_(False)
    sae.W_dec.copy_(rows)
    sae.W_enc.copy_(rows.T)
    return sae


def sums_of_table() -> dict[str, Tensor]:
    """Terms of the page's table, a row each, as they are summed."""
    x, x_hat = (torch.tensor([vector(row[column]) for row in table()]) for column in (1, 2))
    l0 = torch.tensor([float(row[3]) for row in table()])
    return {**reconstruction_terms(x, x_hat, l0, l0), "vector": x}


def evaluated() -> tuple[Subject, dict[str, Any]]:
    """The page's table as a pass would have summed it, with a massive row beside, and what is stored of it: of an SAE of the page's twins."""
    hook = "blocks.0.hook_resid_post"
    ends, documents, terms = Ends((hook,), (hook,)), torch.tensor([0, 0, 1, 1]), sums_of_table()
    losses = {f"ce_{arm}": torch.tensor([float(row[4 + n]) for row in table()]) for n, arm in enumerate(("clean", "spliced", "zero", "mean"))}  # fmt: skip
    shared_names, loss_names = ("rows", "squared_norm", "vector"), ("ce_clean", "ce_zero", "ce_mean")
    subject = Subject(Path(), [Dictionary(Path(), an_sae([[1, 0], [2, 0.2], [0, 1], [-1, 0]]), ends)], ends)
    own, shared = subject.sums[hook], Sums()
    own.add(documents, {name: values for name, values in terms.items() if name != "vector"})
    own.add(documents, {"ce_spliced": losses["ce_spliced"], "kl": torch.ones(4)})
    shared.add(documents, {name: terms[name] for name in shared_names})
    shared.add(documents, {"positions": torch.ones(4), "kl_zero": torch.full((4,), 4.0), **{name: losses[name] for name in loss_names}})  # fmt: skip
    massive = torch.tensor([[12.0, 2.0]])
    shared.add(documents[3:], {"massive_rows": torch.ones(1), "massive_norm": massive.pow(2).sum(1), "massive_vector": massive})  # fmt: skip
    own.add(documents[3:], {"massive_error": torch.zeros(1)})
    pca = PCA(torch.tensor([2.0, 2.0]), torch.eye(2), torch.ones(2), (2,))
    pca.observe(terms["vector"], terms["vector"])
    measured = Measurement.__new__(Measurement)  # there is no model
    measured.shared, measured.subjects, measured.baseline = {hook: shared}, [subject], pca
    (draws,) = resampled_metrics(measured, 10)
    silent = torch.tensor([True, False, False, False])
    return subject, figures(subject, measured, draws, silent, 500, {"untrained_fvu": [0.6]})


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

    def of(x_hat: Tensor) -> dict[str, Any]:
        sums = {name: float(values.sum()) for name, values in reconstruction_terms(x, x_hat, l0, l0).items()}
        return reconstruction_metrics({**sums, "vector": x.double().sum(0).numpy()})

    mean, scaled = of(x.mean(0).expand(4, 2)), of(x_hat * 34 / 32)
    assert mean["fvu"] == 1
    said(f"x̂ = x̄ in every row has {mean['cosine']:.3f} here, at FVU 1")
    assert scaled["gamma"] == pytest.approx(1)
    said(f"34/32 of this x̂ has γ 1, and FVU {scaled['fvu']:.3f}")


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


def test_kl() -> None:
    clean, spliced, zero = (
        torch.tensor([[1 / n for n in row]] * 2).log() for row in ((2, 4, 8, 8), (4, 2, 8, 8), (8, 8, 4, 2))
    )
    following = torch.tensor([0, 1])
    (was, _), (loss, kl), (_, kl_zero) = (loss_and_kl(clean, other, following) for other in (clean, spliced, zero))
    assert (loss - was).tolist() == pytest.approx([math.log(2), -math.log(2)])
    found = fidelity_metrics(
        {f"ce_{arm}": float(was.sum()) for arm in ("clean", "zero", "mean")}
        | {"ce_spliced": float(loss.sum()), "positions": 2.0, "kl": float(kl.sum()), "kl_zero": float(kl_zero.sum())}
    )
    assert found["delta_ce"] == pytest.approx(0, abs=1e-6)
    said(
        f"ΔCE 0. KL is (1/2 − 1/4) ln 2 = {found['kl']:.3f}, KL_zero 7/8 ln 2 = {found['kl_zero']:.3f}, the score {found['kl_score']:.3f}."
    )


class _Rows(Store):
    """A store of some training rows of one hook, `a`."""

    def __init__(self, x: Tensor) -> None:
        self._x = x

    def rows(self, split: str, *, kept: bool = False) -> int:
        return len(self._x)

    def joint_rows(self, hooks: Any, split: str, first: int | None = None, **_: Any) -> Any:
        yield {"a": self._x[:first]}


def test_dead_and_dense() -> None:
    fires = torch.tensor([0, 1, 2, 30])
    found = density_metrics(fires, 200)
    assert found["dense_fraction"] == 0.25
    said(f"1% is not more than 1%: 0.25, with 30 ÷ 33 = {found['dense_share_of_firing']:.3f} of all firing")
    rows = torch.zeros(300, 4)
    rows[7, 0] = 1.0
    store = _Rows(rows)
    dictionary = Dictionary(Path(), an_sae(torch.eye(4).tolist()), Ends(("a",), ("a",)))
    dictionary.fires_F += fires
    (silent,), seen = silent_latents(store, dictionary.ends, [dictionary], 300)
    assert (int(silent.sum()), seen) == (0, 300)
    (silent,), _ = silent_latents(store, dictionary.ends, [dictionary], 0)
    assert float(silent.double().mean()) == 0.25
    said("0 are dead of 500 rows, a quarter of the 200.")


def test_columns_of_a_report() -> None:
    subject, found = evaluated()
    metrics = found["metrics"]
    first, second = torch.nn.functional.normalize(subject.members[0].sae.W_dec[:2], dim=1)
    assert metrics["duplicate_fraction"] == 0.5
    said(f"of (1, 0), (2, 0.2), (0, 1) and (−1, 0) the first two, with {float(first @ second):.3f}; the share is 0.5.")
    assert (metrics["fvu"], metrics["dead_fraction"], metrics["massive_rows"]) == (0.5, 0.25, 1)
    said(f"`fvu_all` 4 ÷ 88 = {metrics['fvu_all']:.3f}, `massive_share` 64 ÷ 88 = {metrics['massive_share']:.3f}")
    said(f"the error is 8 − 4 − 0.25 · 4 = 3, `pca_fvu` {found['baselines']['pca_fvu']}")
    headings, row = table_of([{"name": "x", **metrics, "baselines": found["baselines"]}])
    beyond = float(row[headings.index("beyond these")])
    said(f"beyond these is 0.375 − 0.5 = −{-beyond:.3f}, whatever an untrained one with 0.6 says")
    assert "all rows" in headings
    (hook,) = subject.sums
    assert error_shares(subject) == (0.1, {hook: 0.1})
    more = Sums()
    more.add(torch.tensor([0]), {"squared_error": torch.ones(1), "squared_norm": torch.full((1,), 10.0)})
    subject.sums["other"] = more
    assert error_shares(subject)[0] == 5 / 50
    said("`error_share` of them is 4 ÷ 40 = 0.1, with a second hook of error 1 and Σ‖y‖² 10 it is 5 ÷ 50.")


def recovered(*, silent: bool = False) -> dict[str, float]:
    """Scores of the page's SAE for its three features; `silent` is its third latent."""
    rows = [line.strip("|").split("|") for line in section("Known features").splitlines() if line.startswith("| (")]
    c, acts = (torch.tensor([vector(row[column].strip()) for row in rows]) for column in (0, 1))
    W_dec, b_dec = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [0, 0, -1.0]]), torch.tensor([0, 0, 1.0])
    x_hat = acts @ W_dec + b_dec
    assert (c - x_hat).pow(2).sum(1).tolist() == pytest.approx([float(row[2]) for row in rows])
    recovery = Recovery(W_dec, torch.eye(3))
    recovery.add(Sample(c, c), acts * torch.tensor([1.0, 1.0, 1.0 - silent]), x_hat)
    return recovery.scores()


def test_known_features() -> None:
    found = recovered()
    assert found["uniqueness"] == pytest.approx(2 / 3)
    assert (found["precision"], found["recall"]) == pytest.approx((1 / 2, 1 / 3))
    assert found["recovered"] == pytest.approx(1 / 3)
    said(f"2·2/(2 + 3) = 0.8, 2·1/(2 + 3) = 0.4 and 0, as the third fires where its feature does not: `f1` {found['f1']:.1f}.")  # fmt: skip
    said(f"`mcc`, (1 + 0.6 + 1)/3 = {found['mcc']:.3f}, does not see that")
    said(f"`signed_mcc` is (1 + 0.6 + 0)/3 = {found['signed_mcc']:.3f}, and so is `mmcs`")
    assert found["mmcs"] == pytest.approx(found["signed_mcc"])
    said(f"(0.8 + 1 + 0)/3 = {found['matched_f1']:.1f};\n`rare_f1`, the third feature's, {found['rare_f1']:.0f}.")
    said(f"Of Σ‖x − x̄‖² = 3.75 1 is left: `explained_variance` {found['explained_variance']:.3f}.")
    said(f"`l0` is {found['l0']}, `true_l0` {found['true_l0']}.")
    silent = recovered(silent=True)
    assert (found["dead"], silent["dead"], silent["mcc"]) == (0, pytest.approx(1 / 3), found["mcc"])
    said("Were the third latent silent, `dead` would be 1/3, and `mcc` the same.")


class _Pair(_Group):
    """SAEs that lie nowhere, with what is known of their latents."""

    def __init__(self, file: Path, opened: dict[str, tuple[SAE, np.ndarray]]) -> None:
        self.config, self.results = StabilityConfig(run=file.parent), Results(file, "stability")
        self._draws, self._open = (10, 0), opened

    def _identity(self, pair: Any) -> dict[str, Any]:
        return {}


def stability_figures(folder: Path) -> list[Figure]:
    """Of the page's pair, with other encoders and a dead latent."""
    one, other = an_sae(torch.eye(3).tolist()), an_sae([[1, 0, 0], [0, 0.8, 0.6], [0, 0.6, -0.8], [1, 1, 1]])
    other.W_enc.copy_(torch.tensor([[1, 0, 0], [0, 0, 1], [0, 0.6, 0.8], [1, 1, 1]]).T)
    alive = np.ones(3, bool), np.array([True, True, True, False])
    pair = _Pair(folder / "stability.json", {"a": (one, alive[0]), "b": (other, alive[1])})
    return pair._pair(_Side("a", folder, ""), _Side("b", folder, ""))


def test_stability(tmp_path: Path) -> None:
    found = {(each.figure, each.at): each.value or 0.0 for each in stability_figures(tmp_path)}
    said(f"`encoder_cosine` is (1 + 0.6 + 1)/3 = {found['encoder_cosine', None]:.3f}")
    assert found["dead", None] == pytest.approx(1 / 7)
    said("with a fourth latent of the other that never fires `dead` is 1/7, and all else the same.")
    said(f"`pw_mcc` is 2.2/3 = {found['pw_mcc', None]:.3f}")
    assert found["best_cosine", None] == pytest.approx(0.8)


def test_main_latents_and_their_probe() -> None:
    holds = np.arange(10) < 5
    acts = np.zeros((10, 3))
    acts[:3, 0], acts[3:5, 1], acts[:, 2] = 1.0, 1.0, 1.0
    (both, f1), (one, less) = (main_latents(sparse.csc_array(acts), holds, tau) for tau in (0.03, 0.3))
    assert (both.tolist(), f1, one.tolist(), less) == ([0, 1], 1.0, [0], 0.75)
    said("S begins with the first, F1 2·3/(3 + 5) = 0.75; with the second it is 1: `main_latents` 2, `main_f1` 1 (at τ = 0.3 they would be 1 and 0.75)")  # fmt: skip
    finds = np.array([True] * 4 + [False] + [True] + [False] * 4)
    said(f"`probe_f1` 2·4/(5 + 5) = {f1_of(holds, finds)}.")


def label_figures() -> list[Figure]:
    """Of the page's two labels."""
    fires = np.array([[1, 1], [1, 0], [0, 1], [0, 1], [1, 1], [0, 0], [1, 0], [0, 0]], bool)
    holds = np.array([[1, 0], [1, 0], [0, 1], [0, 1], [1, 1], [1, 1], [0, 0], [0, 0]], bool)
    chosen, documents = np.arange(8) < 4, np.repeat(np.arange(4), 2)
    sides = sparse.csr_array(fires), sparse.csc_array(holds)
    config = PythonConfig(run=Path(), resamples=10)
    return python_figures(config, "a", ["x", "y"], *sides, np.ones(8, bool), chosen, documents)


def test_found_labels() -> None:
    first, second, mean, half, surely = (each.value for each in label_figures())
    assert (first, half, surely) == (0.5, 0.5, 0.0)
    said(f"with 2·2 ÷ (3 + 2) = 0.8, and has that {second:.2f}: `found` at 0.5 is 1/2, since 0.5 is not above it, and at 0.9 0; `f1` over both is {mean:.3f}.")  # fmt: skip


def absorption_figures() -> list[Figure]:
    """Of a concept that the first of two latents is of, and a child."""
    holds = np.arange(40)[:, None] < 20
    x = torch.from_numpy(np.where(holds, [[1.0, 0.2]], [[0.0, 1.0]])).float()
    side = Examples(x, x, holds, holds, np.arange(40))
    ends = Ends(("a",), ("a",))
    asked = Asked(AbsorptionConfig(run=Path(), resamples=10, device="cpu"), _Rows(x), ends)
    asked.concepts = Concepts(["x"], [(0, "y")], side, side)
    return asked.figures(an_sae([[1, 0], [0, 1]]), "a")


BENCH_SECTIONS = {
    "synthetic": "Known features",
    "python": "F1 of the best latent",
    "probes": "AUC of k-sparse probes",
    "absorption": "Absorption",
    "stability": "Stability",
}


def figure_names(bench: str, folder: Path) -> set[str]:
    """What a bench calls its figures: those its source names, and, where some have names that it makes, those of a small case."""
    made = {
        "synthetic": lambda: {*SHOWN, *recovered()},
        "stability": lambda: {each.figure for each in stability_figures(folder)},
        "python": lambda: {each.figure for each in half(10, 0)},
        "absorption": lambda: {each.figure for each in absorption_figures()},
    }
    source = ast.parse(inspect.getsource(inspect.getmodule(BENCHES[bench].run)))  # type: ignore[arg-type]
    calls = [node for node in ast.walk(source) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Figure"]  # fmt: skip
    given = [call.args[2] for call in calls]
    named = {str(name.value) for name in given if isinstance(name, ast.Constant)}
    assert given
    assert bench in made or all(isinstance(name, ast.Constant) for name in given)
    return named | (made[bench]() if bench in made else set())


def test_every_figure_of_a_bench_is_on_the_page(tmp_path: Path) -> None:
    assert BENCH_SECTIONS.keys() == BENCHES.keys()
    assert "left_out" in figure_names("absorption", tmp_path)
    assert figure_names("probes", tmp_path) == {"auc"}
    lacks = {
        bench: [name for name in sorted(figure_names(bench, tmp_path)) if f"`{name}`" not in section(heading)]
        for bench, heading in BENCH_SECTIONS.items()
    }
    assert not any(lacks.values()), lacks


def test_every_column_and_stored_figure_is_on_the_page() -> None:
    text = section("Columns of a report")
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    columns = {heading for row in cells for heading in row[0].split("; ")}
    shown = [
        (name, heading) for part in (COLUMNS, SET_COLUMNS) for name, (heading, _) in part.items() if name != "name"
    ]
    assert sorted({heading for _, heading in shown} - columns) == []
    _, found = evaluated()
    names = {*dict(shown), *found["metrics"], *found["baselines"]}
    assert sorted(names - set(re.findall(r"`(\w+)`", text))) == []


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
    said(f"{half_of(1.0, 24):.2f} times of 24")
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

import json
import math
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import CONTEXT, HOOK, WIDE, WIDTH, sentences
from plotly.offline import get_plotlyjs
from safetensors.numpy import load_file
from test_harvest import config as harvest_config
from test_harvest import text
from test_sae import write_saelens
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from saebench.cli import main
from saebench.evaluate import EvalConfig, ReportConfig, evaluate, report, table, write_report
from saebench.evaluate.baselines import PCA, Untrained, untrained_fvus
from saebench.evaluate.compare import FIGURES
from saebench.evaluate.measure import (
    Batch,
    Dictionary,
    Measurement,
    Subject,
    silent_latents,
    splice,
    validation_batches,
)
from saebench.files import read_json, write_json
from saebench.harvest import harvest
from saebench.metrics import total
from saebench.models import load_model
from saebench.sae import SAE, Ends, GatedSAE, ReLUSAE, initialise, new_sae, save_sae
from saebench.store import Store, open_store
from saebench.train import TrainConfig, train
from saebench.train.recipes import RECIPES

ENDS = Ends((HOOK,), (HOOK,))


def save(sae: SAE, run: Path, name: str, store: Store) -> Path:
    folder = run / "saes" / name
    metadata = {"model_name": "m", "hook_name": HOOK, "context_size": CONTEXT, "saebench": {"store": str(store.folder)}}
    save_sae(sae, folder, metadata)
    return folder


def scaled_identity(factor: float) -> ReLUSAE:
    """x̂ = factor · x, exactly: one latent for the positive and one for the negative part of each dimension."""
    sae = ReLUSAE(WIDTH, 2 * WIDTH)
    eye = torch.eye(WIDTH)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], 1))
        sae.W_dec.copy_(torch.cat([eye, -eye]) * factor)
    return sae


def metrics_of(folder: Path) -> dict:
    return read_json(folder / "evaluation.json")["metrics"]


def validation(store: Store) -> dict[str, np.ndarray]:
    """The store's validation columns, by h5py alone."""
    columns: dict[str, list[np.ndarray]] = {}
    for entry in json.loads((store.folder / "manifest.json").read_text())["shards"]:
        if entry["split"] == "validation":
            with h5py.File(store.folder / entry["file"]) as file:
                for name in ("tokens", "keep", "doc_id"):
                    columns.setdefault(name, []).append(file[name][:].reshape(-1, CONTEXT))
    return {name: np.concatenate(parts) for name, parts in columns.items()}


@pytest.fixture(scope="module")
def trained(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three small SAEs, evaluated."""
    out = tmp_path_factory.mktemp("run")
    train(
        TrainConfig(
            store=store.folder, hook=(HOOK,), out=out, arch=("relu", "topk", "gated"), target_l0=(6.0,), d_sae=(64,), tokens=40_000,
            batch=100, lr=(3e-3,),
        )
    )  # fmt: skip
    evaluate(EvalConfig(run=out))
    return out


# ---------------------------------------------------------------------------------- exact anchors


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_identity_and_zero_saes_reproduce_clean_and_ablated_losses_exactly(
    store: Store, tmp_path: Path, batch: int
) -> None:
    folders = [save(scaled_identity(factor), tmp_path, name, store) for name, factor in (("one", 1.0), ("zero", 0.0))]
    evaluate(EvalConfig(run=tmp_path, batch=batch, tokens=480, dead_rows=480))
    one, zero = map(metrics_of, folders)
    assert one["ce_spliced"] == one["ce_clean"]
    assert one["kl"] == 0.0
    assert one["fvu"] == 0.0
    assert (one["loss_recovered_zero"], one["loss_recovered_mean"], one["gamma"], one["cosine"]) == (
        1.0,
        1.0,
        1.0,
        pytest.approx(1.0),
    )
    assert zero["ce_spliced"] == zero["ce_zero"]
    assert zero["loss_recovered_zero"] == 0.0
    assert zero["kl"] == zero["kl_zero"]
    assert zero["kl_score"] == 0.0


def test_an_oracle_of_known_fvu_l0_and_shrinkage_is_scored_exactly(store: Store, tmp_path: Path) -> None:
    folder = save(scaled_identity(0.5), tmp_path, "half", store)
    evaluate(EvalConfig(run=tmp_path))
    got = metrics_of(folder)
    rows = torch.cat(list(store.usual_rows(HOOK, "validation"))).double()
    residual = 0.25 * rows.pow(2).sum()
    assert got["l0"] == WIDTH  # every dimension is positive or negative
    assert got["gamma"] == pytest.approx(0.5)
    assert got["l2_ratio"] == pytest.approx(0.5)
    assert got["mse"] == pytest.approx(float(residual) / len(rows), rel=1e-5)
    assert got["fvu"] == pytest.approx(float(residual / (rows - rows.mean(0)).pow(2).sum()), rel=1e-5)
    assert got["l1"] == pytest.approx(float(rows.abs().sum()) / len(rows) * 0.5, rel=1e-5)
    assert got["n_tokens_eval"] == len(rows) == store.rows("validation", kept=True)


def test_no_figure_depends_on_the_batch_size(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "saes", tmp_path / "saes")
    evaluate(EvalConfig(run=tmp_path, batch=5, force=True))
    for folder in (trained / "saes").glob("*-*"):
        assert metrics_of(tmp_path / "saes" / folder.name) == pytest.approx(metrics_of(folder), rel=1e-4, abs=1e-6)


def test_special_tokens_keep_their_vectors() -> None:
    x = torch.randn(2, 3, 4)
    keep = torch.tensor([[False, True, True], [False, False, True]])
    out = splice(x, keep, torch.zeros(3, 4))
    assert torch.equal(out[~keep], x[~keep])
    assert out[keep].abs().sum() == 0


# ---------------------------------------------------------------------- an independent recomputation


@pytest.mark.parametrize("name", ["relu-l0-6", "topk-k6", "gated-l0-6"])
def test_reported_figures_follow_from_the_weights_and_hugging_face_alone(
    name: str, trained: Path, store: Store, checkpoints: dict[str, Path]
) -> None:
    """Plain arithmetic on the saved weights and a Hugging Face model: no code of the project."""
    folder = trained / "saes" / name
    w = {key: torch.tensor(value) for key, value in load_file(folder / "sae_weights.safetensors").items()}
    cfg = json.loads((folder / "cfg.json").read_text())
    columns = validation(store)
    tokens, keep = torch.tensor(columns["tokens"]).long(), torch.tensor(columns["keep"])
    model = AutoModelForCausalLM.from_pretrained(checkpoints["llama"], dtype=torch.float32).eval()
    train_rows = torch.cat(list(store.usual_rows(HOOK, "train")))

    def encode(x: torch.Tensor) -> torch.Tensor:
        h = (x - w["b_dec"]) @ w["W_enc"]
        if cfg["architecture"] == "gated":
            return (h + w["b_gate"] > 0) * (h * w["r_mag"].exp() + w["b_mag"]).clamp(min=0)
        h = h + w["b_enc"]
        if cfg["architecture"] == "topk":
            threshold = h.sort(dim=-1, descending=True).values[..., cfg["k"] - 1 : cfg["k"]]
            h = h * (h >= threshold)
        return h.clamp(min=0)

    def ce_with(replace: object) -> float:
        def hook(module: object, args: object, output: torch.Tensor) -> torch.Tensor:
            hidden = output[0] if isinstance(output, tuple) else output
            new = torch.where(keep[..., None], replace(hidden), hidden)  # type: ignore[operator]
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handle = model.model.layers[1].register_forward_hook(hook)
        with torch.no_grad():
            log_p = model(tokens).logits[:, :-1].log_softmax(-1)
        handle.remove()
        losses = -log_p.gather(-1, tokens[:, 1:, None])[..., 0]
        return losses[keep[:, :-1] & keep[:, 1:]].double().mean().item()

    with torch.no_grad():
        x = model(tokens, output_hidden_states=True).hidden_states[2][keep]
    acts = encode(x)
    x_hat = acts @ w["W_dec"] + w["b_dec"]
    clean = ce_with(lambda h: h)
    zero = ce_with(torch.zeros_like)
    mean = ce_with(lambda h: train_rows.mean(0).expand_as(h))
    spliced = ce_with(lambda h: encode(h) @ w["W_dec"] + w["b_dec"])
    got = metrics_of(folder)
    want = {
        "l0": (acts != 0).sum(1).double().mean().item(),
        "fvu": (((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()).item(),
        "mse": ((x - x_hat) ** 2).sum(1).mean().item(),
        "gamma": ((x_hat**2).sum() / (x * x_hat).sum()).item(),
        "ce_clean": clean, "ce_zero": zero, "ce_mean": mean, "ce_spliced": spliced,
        "loss_recovered_zero": (zero - spliced) / (zero - clean),
        "loss_recovered_mean": (mean - spliced) / (mean - clean),
    }  # fmt: skip
    assert {key: got[key] for key in want} == pytest.approx(want, rel=0.002)


# ------------------------------------------------------------------------------ baselines and intervals


def test_pca_fvu_is_that_of_the_projection(store: Store) -> None:
    pca = PCA.fit(store, (HOOK,), "cpu")
    rows = torch.cat(list(store.usual_rows(HOOK, "validation")))
    pca.observe(rows, rows)
    variance = float((rows - rows.mean(0)).double().pow(2).sum())
    basis = pca.components_DD[:, :5]
    projected = (rows - pca.mean_D) @ basis @ basis.T + pca.mean_D
    assert pca.errors(5.0) == pytest.approx([float((rows - projected).double().pow(2).sum())], rel=1e-4)
    assert pca.errors(4.5)[0] == pytest.approx((pca.errors(4.0)[0] + pca.errors(5.0)[0]) / 2)
    assert pca.errors(float(WIDTH)) == pytest.approx([0], abs=1e-6 * variance)


def test_a_target_l0_is_met_on_held_out_documents(trained: Path) -> None:
    for name in ("relu-l0-6", "gated-l0-6", "topk-k6"):
        assert metrics_of(trained / "saes" / name)["l0"] == pytest.approx(6.0, rel=0.1), name


def test_training_beats_no_training(trained: Path) -> None:
    for folder in (trained / "saes").glob("*-*"):
        evaluation = read_json(folder / "evaluation.json")
        assert evaluation["metrics"]["fvu"] < evaluation["baselines"]["untrained_fvu"]


def test_an_untrained_sae_improves_with_more_latents_active(store: Store) -> None:
    found = untrained_fvus(store, ENDS, 64, [1.0, 3.4, 4.4, 3.6, 20.0], 0, 10**6)
    one, three, four, same, twenty = (fvu for (fvu,) in found)
    assert 1 > one > three > four == same > twenty
    assert untrained_fvus(store, ENDS, 64, [4.0], 0, 10**6) == [[pytest.approx(four, rel=1e-6)]]


def test_the_untrained_sae_is_a_topk_one_with_the_best_factor(store: Store) -> None:
    statistics = store.statistics(HOOK)
    scale = math.sqrt(WIDTH / statistics["mean_squared_norm"])
    sae = new_sae("topk", WIDTH, 64, k=5)
    initialise(sae, torch.tensor(statistics["mean"]) * scale, torch.Generator().manual_seed(3))
    first = torch.cat(list(store.usual_rows(HOOK, "train", spread=8192))) * scale
    rows = torch.cat(list(store.usual_rows(HOOK, "validation", first=300))) * scale
    with torch.no_grad():
        decoded, target = sae(first).x_hat - sae.b_dec, first - sae.b_dec
        factor = (decoded * target).sum() / decoded.pow(2).sum()
        error = rows - sae.b_dec - factor * (sae(rows).x_hat - sae.b_dec)
    want = float(error.pow(2).sum() / (rows - rows.mean(0)).pow(2).sum())
    assert untrained_fvus(store, ENDS, 64, [9.0, 5.0], 3, 300)[1] == pytest.approx([want], rel=1e-5)


def test_baselines_are_spliced_in_on_request(store: Store, tmp_path: Path) -> None:
    """An SAE with as many active latents as there are dimensions: PCA of that rank is exact, and costs nothing."""
    folder = save(scaled_identity(0.9), tmp_path, "most", store)
    settings = {"run": tmp_path, "tokens": 480, "dead_rows": 480}
    assert "spliced_baselines" not in write_report(tmp_path, evaluate(EvalConfig(**settings)))["saes"][0]
    evaluate(EvalConfig(**settings, splice_baselines=True))
    evaluation = read_json(folder / "evaluation.json")
    spliced, metrics = evaluation["spliced_baselines"], evaluation["metrics"]
    assert spliced["pca"]["delta_ce"] == pytest.approx(0, abs=1e-5)
    assert spliced["pca"]["loss_recovered_mean"] == pytest.approx(1, abs=1e-3)
    ce = {arm: metrics[f"ce_{arm}"] for arm in ("clean", "zero")}
    recovered = 1 - spliced["untrained"]["delta_ce"] / (ce["zero"] - ce["clean"])
    assert spliced["untrained"]["loss_recovered_zero"] == pytest.approx(recovered)
    assert spliced["untrained"]["kl"] > metrics["kl"] > 0
    written = (folder / "evaluation.json").stat().st_mtime_ns
    summary = write_report(tmp_path, evaluate(EvalConfig(**settings)))  # without: nothing is thrown away
    assert (folder / "evaluation.json").stat().st_mtime_ns == written
    heading, row, *_ = table(summary["saes"])
    assert heading[-3:] == ["ΔCE of PCA", "ΔCE untrained", "ΔCE beyond these"]
    assert row[-1] == f"{min(one['delta_ce'] for one in spliced.values()) - metrics['delta_ce']:.4f}"


def test_what_baselines_write_has_their_fvu(store: Store) -> None:
    rows = torch.cat(list(store.usual_rows(HOOK, "validation")))
    variance = float((rows - rows.mean(0)).double().pow(2).sum())
    pca, untrained = PCA.fit(store, ENDS.reads, "cpu"), Untrained(store, ENDS, 64, [3, 5], 0, "cpu")
    pca.observe(rows, rows)
    with torch.no_grad():
        errors = [
            float((rows - made).double().pow(2).sum())
            for made in (pca.reconstruct(rows, 5), untrained.reconstruct({HOOK: rows}, 5))
        ]
    assert errors[0] == pytest.approx(pca.errors(5.0)[0], rel=1e-4)
    assert errors[1] / variance == pytest.approx(
        untrained_fvus(store, ENDS, 64, [3.0, 5.0], 0, len(rows))[1][0], rel=1e-4
    )


def test_intervals_contain_the_figures_and_sums_give_them_back(trained: Path) -> None:
    evaluation = read_json(trained / "saes" / "topk-k6" / "evaluation.json")
    metrics, sums = evaluation["metrics"], evaluation["sums"]
    for name, (low, high) in evaluation["intervals"].items():
        assert low - 1e-9 <= metrics[name] <= high + 1e-9, name
        assert name in ("l0", "massive_share") or low < high, name
    assert metrics["fvu"] == sums["squared_error"] / sums["total_variance"]
    assert metrics["delta_ce"] == pytest.approx((sums["ce_spliced"] - sums["ce_clean"]) / sums["positions"])
    assert "special tokens" in evaluation["mask"]


def test_dead_latents_are_those_silent_on_every_row_looked_at(store: Store, tmp_path: Path) -> None:
    sae = scaled_identity(1.0)
    with torch.no_grad():
        sae.b_enc[:3] = -1e6
    folder = save(sae, tmp_path, "dead", store)
    evaluate(EvalConfig(run=tmp_path))
    everything = store.rows("train", kept=True) + store.rows("validation", kept=True)
    assert metrics_of(folder)["dead_fraction"] == 3 / (2 * WIDTH)
    assert metrics_of(folder)["dead_window"] == everything
    evaluate(EvalConfig(run=tmp_path, dead_rows=5000))
    assert metrics_of(folder)["dead_window"] == 5000


@torch.inference_mode()
def test_a_batch_in_which_nothing_is_scored_adds_nothing(store: Store, tmp_path: Path) -> None:
    """A context that holds one token, filled up with BOS: nothing that follows is a fair thing to predict."""
    model = load_model(store.manifest["identity"]["model"]["id"], device="cpu")
    subject = Subject(tmp_path, [Dictionary(tmp_path, scaled_identity(1.0), ENDS)], ENDS)
    measurement = Measurement(model, ENDS, {HOOK: torch.zeros(WIDTH)}, None, [subject], {HOOK: math.inf})
    whole = next(validation_batches(store, 4 * CONTEXT, 4))
    measurement.add(whole)
    positions = float(total(measurement.shared[HOOK].table())["positions"])
    keep = torch.zeros_like(whole.keep)
    keep[:, 1] = True
    measurement.add(Batch(whole.tokens, whole.doc_id, keep))
    totals = total(measurement.shared[HOOK].table())
    assert positions > 0
    assert float(totals["positions"]) == positions
    assert float(totals["rows"]) == int(whole.keep.sum()) + 4


def test_long_contexts_go_in_smaller_batches(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saebench.evaluate.measure._POSITIONS", 3 * CONTEXT)
    batches = list(validation_batches(store, 20 * CONTEXT, 8))
    assert {len(batch.tokens) for batch in batches} <= {1, 2, 3}
    assert sum(len(batch.tokens) for batch in batches) == 20


@pytest.mark.parametrize("architecture", ["relu", "topk", "gated", "jumprelu"])
def test_latents_watched_alone_are_found_silent_like_all_together(store: Store, architecture: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sae = new_sae(architecture, WIDTH, 64, k=3)
    initialise(sae, torch.tensor(store.statistics(HOOK)["mean"]), generator, RECIPES[architecture].gains)
    rows = torch.cat(list(store.usual_rows(HOOK, "train")))
    rare = torch.zeros(64)
    with torch.no_grad():  # latents that hardly ever win, from never to now and then
        rare[:24] = (rows - sae.b_dec).norm(dim=1).mean() * torch.linspace(4, 0.1, 24)
        (sae.b_gate if isinstance(sae, GatedSAE) else sae.b_enc).sub_(rare)
        fires = (sae.encode(rows) != 0).sum(0)
    dictionary = Dictionary(store.folder, sae, ENDS)
    dictionary.fires_F += torch.where(rare > 0, 0, 5)
    (silent,), seen = silent_latents(store, ENDS, [dictionary], 10**9)
    assert seen == len(rows)
    assert torch.equal(silent, (fires == 0) & (rare > 0))
    assert 0 < int(silent.sum()) < 24


# ------------------------------------------------------------------------------------ files, reuse


def test_what_was_evaluated_is_not_evaluated_again(trained: Path) -> None:
    path = trained / "saes" / "topk-k6" / "evaluation.json"
    before = path.stat().st_mtime_ns
    evaluate(EvalConfig(run=trained))
    assert path.stat().st_mtime_ns == before
    evaluate(EvalConfig(run=trained, resamples=100))
    assert path.stat().st_mtime_ns > before


def test_summary_and_report(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained.parent)
    summary = write_report(Path(trained.name), evaluate(EvalConfig(run=Path(trained.name))))
    assert summary == read_json(trained / "summary.json")
    fields = """name path architecture hook d_in d_sae l0 fvu mse ce_clean ce_spliced ce_zero ce_mean loss_recovered_zero
        loss_recovered_mean kl gamma dead_fraction dense_fraction kl_score dead_window n_tokens_eval tokens_trained seconds baselines"""
    for sae in summary["saes"]:
        assert set(fields.split()) <= set(sae)
        assert (trained.parent / sae["path"] / "sae_weights.safetensors").exists()
    assert [sae["architecture"] for sae in summary["saes"]] == ["gated", "relu", "topk"]
    page = (trained / "report.html").read_text()
    for sae in summary["saes"]:
        assert sae["name"] in page
    assert page.count("plotly-graph-div") >= 7
    assert not re.search(r'src="https?:', page)  # opens without a network
    rows = table(summary["saes"])
    assert rows[0][:3] == ["SAE", "L0", "FVU"]
    assert len(rows) == 4


def test_a_run_that_was_evaluated_before_differences_were_kept_is_reported_on(trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "old"
    shutil.copytree(trained, copy)
    for file in copy.glob("saes/*/bootstrap.safetensors"):
        file.unlink()
    summary, _ = report(ReportConfig(run=(copy,)))
    assert summary["least_differences"] == {}
    assert [sae["undecided"] for sae in summary["saes"]] == [[], [], []]
    before = (copy / "saes/topk-k6/evaluation.json").stat().st_mtime_ns
    evaluate(EvalConfig(run=copy))  # once more, for its samples
    assert (copy / "saes/topk-k6/evaluation.json").stat().st_mtime_ns > before
    least = report(ReportConfig(run=(copy,)))[0]["least_differences"]
    assert set(least) == {"l0", *FIGURES, "gamma", "fvu_all"}


def test_several_runs_are_reported_on_as_one(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    assert main(["report", str(trained), str(other), "--out", str(tmp_path / "both")]) == 0
    summary = read_json(tmp_path / "both/summary.json")
    assert [sae["name"] for sae in summary["saes"]] == [
        f"{run}/{name}" for run in (trained.name, "other") for name in ("gated-l0-6", "relu-l0-6", "topk-k6")
    ]
    # One SAE twice is no difference at all, and is a recipe of two members whose spread is 0.
    assert [entry["fvu"][1] for entry in summary["over_seeds"]] == [0.0, 0.0, 0.0]
    assert "other/topk-k6" in (tmp_path / "both/report.html").read_text()
    assert "least difference" in capsys.readouterr().out
    for file in other.glob("saes/*/evaluation.json"):  # as if fewer rows were looked at
        found = read_json(file)
        found["metrics"]["dead_window"] = 17
        write_json(file, found)
    _, both = report(ReportConfig(run=(trained, other), out=tmp_path / "both"))
    window = read_json(trained / "saes/topk-k6/evaluation.json")["metrics"]["dead_window"]
    assert f"no firing in 17 to {window:,} rows" in (both / "report.html").read_text()
    more, _ = report(ReportConfig(run=(trained,), out=tmp_path / "one"), [[["heading", "x"], ["row", "1"]], []])
    assert more["more"] == [[["heading", "x"], ["row", "1"]]]
    assert "<td>row</td><td>1</td>" in (tmp_path / "one/report.html").read_text()
    with pytest.raises(ValueError, match="has no evaluated SAEs; expected a run after `saebench eval --run"):
        report(ReportConfig(run=(trained, tmp_path / "none")))


def test_saes_of_one_name_keep_their_own_figures(trained: Path, tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere/saes/topk-k6"
    shutil.copytree(trained, run)
    shutil.copytree(trained / "saes/gated-l0-6", elsewhere)
    written = write_report(run, [run / "saes/topk-k6", elsewhere])
    want = write_report(tmp_path, [run / "saes/topk-k6", run / "saes/gated-l0-6"])
    assert [sae["name"] for sae in written["saes"]] == ["run/topk-k6", "elsewhere/topk-k6"]
    assert written["least_differences"] == want["least_differences"]
    again, _ = report(ReportConfig(run=(run,)))  # which finds it by what the summary said
    assert {sae["name"] for sae in again["saes"]} == {"gated-l0-6", "relu-l0-6", "run/topk-k6", "elsewhere/topk-k6"}


def test_figures_name_the_store_that_they_are_of(trained: Path, store: Store, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(trained, run)
    shutil.copytree(store.folder, other)
    assert {sae["store"] for sae in report(ReportConfig(run=(run,)))[0]["saes"]} == {str(store.folder)}
    evaluate(EvalConfig(run=run, store=other, tokens=640, resamples=20, device="cpu"))
    assert {sae["store"] for sae in report(ReportConfig(run=(run,)))[0]["saes"]} == {str(other)}


def test_saes_that_others_made_can_be_evaluated(store: Store, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    cfg, weights = write_saelens(theirs, "relu")
    rng = np.random.default_rng(0)
    cfg |= {"d_in": WIDTH, "d_sae": 8}
    cfg["metadata"]["hook_name"] = HOOK
    weights = {
        "W_enc": rng.normal(size=(WIDTH, 8)),
        "W_dec": rng.normal(size=(8, WIDTH)),
        "b_enc": np.zeros(8),
        "b_dec": np.zeros(WIDTH),
    }
    (theirs / "cfg.json").write_text(json.dumps(cfg))
    from safetensors.numpy import save_file

    save_file({name: value.astype(np.float32) for name, value in weights.items()}, theirs / "sae_weights.safetensors")
    with pytest.raises(
        ValueError, match="does not say what it was trained on; give the store to evaluate it on with --store"
    ):
        evaluate(EvalConfig(run=tmp_path, sae=(theirs,)))
    folders = evaluate(EvalConfig(run=tmp_path, sae=(theirs,), store=store.folder))
    summary = write_report(tmp_path, folders, store.folder)
    assert math.isfinite(summary["saes"][0]["fvu"])
    assert summary["saes"][0]["tokens_trained"] is None


# --------------------------------------------------------------------------------------- bad input


def test_an_sae_without_a_hook_is_named(tmp_path: Path, store: Store) -> None:
    folder = save(scaled_identity(1.0), tmp_path, "one", store)
    settings = read_json(folder / "cfg.json")
    del settings["metadata"]["hook_name"]
    write_json(folder / "cfg.json", settings)
    with pytest.raises(
        ValueError, match=r"one does not say which hook it reads: give it with --hook, or add metadata.hook_name"
    ):
        evaluate(EvalConfig(run=tmp_path))


@pytest.mark.parametrize("value", [None, 2.0])
def test_of_activations_that_are_all_the_same_nothing_is_explained_or_not(
    value: float | None, tokenizer: PreTrainedTokenizerFast, corpus: Path, tmp_path: Path
) -> None:
    """Exactly, and as far as float32 knows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**WIDE, max_position_embeddings=64))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name and "norm" not in name:
                parameter.zero_()
        embedding = model.get_input_embeddings().weight
        embedding.copy_(torch.randn(WIDTH).expand_as(embedding) if value is None else torch.full_like(embedding, value))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    store = harvest(harvest_config(tmp_path / "model", tmp_path / "store", tokens=1280), text(corpus))
    assert store is not None
    save(scaled_identity(0.5), tmp_path, "half", store)
    folders = evaluate(EvalConfig(run=tmp_path, resamples=20))
    found = metrics_of(folders[0])
    assert (found["fvu"], found["explained_variance"], found["fvu_all"]) == (None, None, None)
    assert found["gamma"] == pytest.approx(0.5)
    evaluation = read_json(folders[0] / "evaluation.json")
    assert set(evaluation["baselines"].values()) == {None}
    assert evaluation["intervals"]["fvu"] == [None, None]
    (_, row) = table(write_report(tmp_path, folders)["saes"])
    assert row[2] == "—"
    with pytest.raises(ValueError, match=rf"{HOOK} in .*store is the same in every row; expected vectors that vary"):
        train(TrainConfig(store=store.folder, hook=(HOOK,), out=tmp_path / "run", k=(2,), d_sae=(16,), device="cpu"))


def test_of_few_documents_there_are_no_intervals(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, factor in (("half", 0.5), ("most", 0.9)):
        save(scaled_identity(factor), tmp_path, name, store)
    folders = evaluate(EvalConfig(run=tmp_path, tokens=320, resamples=20))
    few = metrics_of(folders[0])["n_documents_eval"]
    assert few < 10
    assert f"{few} held-out documents: no intervals and least differences, which need 10" in caplog.text
    assert set(map(tuple, read_json(folders[0] / "evaluation.json")["intervals"].values())) == {(None, None)}
    assert write_report(tmp_path, folders)["least_differences"] == {}
    assert f"over {few} documents; none of fewer than 10" in (tmp_path / "report.html").read_text()


def test_a_run_without_saes_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no SAEs in saes/; train some with `saebench train"):
        evaluate(EvalConfig(run=tmp_path))


def test_an_sae_of_another_width_is_named(store: Store, tmp_path: Path) -> None:
    save(ReLUSAE(WIDTH + 1, 4), tmp_path, "wide", store)
    with pytest.raises(ValueError, match=f"takes vectors of {WIDTH + 1}, {HOOK} in .* has {WIDTH}"):
        evaluate(EvalConfig(run=tmp_path))


def test_a_model_that_changed_since_the_harvest_is_refused(store: Store, tmp_path: Path) -> None:
    shutil.copytree(store.folder, tmp_path / "store")
    manifest = read_json(tmp_path / "store" / "manifest.json")
    manifest["identity"]["model"]["weights"] = "0" * 32
    write_json(tmp_path / "store" / "manifest.json", manifest)
    save(scaled_identity(1.0), tmp_path, "one", open_store(tmp_path / "store"))
    with pytest.raises(
        ValueError, match=r"has weights \w+, store .* was made with 0{32}: use the model it was made with"
    ):
        evaluate(EvalConfig(run=tmp_path))


def test_small_denominators_are_flagged(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """In a model whose layers hardly matter, ablation costs almost nothing."""
    dull = AutoModelForCausalLM.from_pretrained(checkpoints["llama"], dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in dull.named_parameters():
            if "embed" in name:
                parameter.mul_(1e-3)
    dull.save_pretrained(tmp_path / "model")
    for file in checkpoints["llama"].glob("tokenizer*"):
        shutil.copy(file, tmp_path / "model")
    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / "text" / f"{number}.txt").write_text(sentences(number, 60))
    store = harvest(harvest_config(tmp_path / "model", tmp_path / "store", tokens=2000), text(tmp_path / "text"))
    assert store is not None
    folder = save(scaled_identity(0.9), tmp_path, "<i>one", store)
    write_report(tmp_path, evaluate(EvalConfig(run=tmp_path)))
    evaluation = read_json(folder / "evaluation.json")
    flagged = evaluation["small_denominators"]
    small = [
        arm for arm in ("zero", "mean") if evaluation["metrics"][f"ce_{arm}"] - evaluation["metrics"]["ce_clean"] < 0.05
    ]
    assert flagged == small != []
    report = (tmp_path / "report.html").read_text()
    assert "over a denominator under 0.05 nats for &lt;i&gt;one:" in report
    assert "<i>" not in report.replace(get_plotlyjs(), "")

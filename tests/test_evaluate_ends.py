"""Evaluation of what reads here and writes there, on a model whose MLPs are linear maps, which a skip transcoder can be."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONTEXT, SHAPES, WIDTH, sentences
from test_evaluate import metrics_of, scaled_identity
from test_harvest import config as harvest_config
from test_harvest import text
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, PreTrainedTokenizerFast

from saebench.evaluate import EvalConfig, ReportConfig, evaluate, report, set_table, write_report
from saebench.evaluate.baselines import PCA, joined
from saebench.evaluate.measure import Batch, Places
from saebench.evaluate.neurons import neuron_fvus
from saebench.files import read_json, write_json
from saebench.harvest import harvest
from saebench.models import hook_name, load_model
from saebench.sae import SAE, Ends, ReLUSAE, Writes, save_sae
from saebench.store import Store

LINEAR_LAYERS = (0, 1)
IN = [hook_name(layer, "mlp_in") for layer in LINEAR_LAYERS]
NORMALIZED = [hook_name(layer, "ln2_normalized") for layer in LINEAR_LAYERS]
OUT = [hook_name(layer, "mlp_out") for layer in LINEAR_LAYERS]


@pytest.fixture(scope="module")
def linear(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> tuple[Store, GPT2LMHeadModel]:
    """A GPT-2 without the bend in its MLPs, and what they read and write."""
    root = tmp_path_factory.mktemp("linear")
    config = SHAPES["gpt2"].__class__(**{**SHAPES["gpt2"].to_dict(), "activation_function": "linear"})
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    (root / "text").mkdir()
    for number in range(60):
        (root / "text" / f"{number}.txt").write_text(sentences(number, 40))
    settings = harvest_config(
        root / "model", root / "store", tokens=2000, layers=LINEAR_LAYERS, kinds=("ln2_normalized", "mlp")
    )
    store = harvest(settings, text(root / "text"))
    assert store is not None
    return store, model


def save(sae: SAE, run: Path, name: str, store: Store, reads: list[str], writes: list[str], **metadata: Any) -> Path:
    folder = run / "saes" / name
    facts = {"model_name": "m", "hook_name": reads[0], "hook_name_out": writes[0], "reads": reads, "writes": writes}
    save_sae(sae, folder, {**facts, "context_size": CONTEXT, "saebench": {"store": str(store.folder)}, **metadata})
    return folder


@torch.no_grad()
def stand_in(model: GPT2LMHeadModel, layer: int, factor: float = 1.0, parts: int = 1) -> ReLUSAE:
    """W_skip and b_dec are a layer's MLP times a factor, in the first of `parts` hooks, and no latent ever fires."""
    mlp: Any = model.transformer.h[layer].mlp
    sae = ReLUSAE(WIDTH, 4, writes=Writes(d_out=WIDTH * parts, skip=True, parts=(WIDTH,) * parts))
    assert sae.W_skip is not None
    sae.b_enc.fill_(-1.0)
    sae.W_skip[:, :WIDTH] = mlp.c_fc.weight @ mlp.c_proj.weight * factor
    sae.b_dec[:WIDTH] = (mlp.c_fc.bias @ mlp.c_proj.weight + mlp.c_proj.bias) * factor
    return sae


@torch.no_grad()
def half_of_the_first() -> ReLUSAE:
    """A crosscoder that writes half of the first hook's vectors, and zero at the second."""
    sae, eye = ReLUSAE(2 * WIDTH, 2 * WIDTH, writes=Writes(parts=(WIDTH, WIDTH))), torch.eye(WIDTH)
    sae.W_enc[:WIDTH] = torch.cat([eye, -eye], dim=1)
    sae.W_dec[:, :WIDTH] = torch.cat([eye, -eye]) / 2
    return sae


def test_an_exact_transcoder_costs_nothing(linear: tuple[Store, GPT2LMHeadModel], tmp_path: Path) -> None:
    store, model = linear
    for name, factor in (("one", 1.0), ("half", 0.5), ("none", 0.0)):
        save(stand_in(model, 1, factor), tmp_path, name, store, IN[1:], OUT[1:])
    folders = evaluate(EvalConfig(run=tmp_path, resamples=50))
    half, none, one = map(metrics_of, folders)
    rows = torch.cat(list(store.usual_rows(OUT[1], "validation"))).double()
    variance = float((rows - rows.mean(0)).pow(2).sum())
    assert one["fvu"] < 1e-9
    assert half["fvu"] == pytest.approx(0.25 * float(rows.pow(2).sum()) / variance, rel=1e-5)
    assert one["delta_ce"] == pytest.approx(0, abs=1e-6)
    assert one["kl"] == pytest.approx(0, abs=1e-6)
    assert one["l0"] == 0
    assert one["dead_fraction"] == 1
    assert none["ce_spliced"] == none["ce_zero"] != none["ce_clean"]
    evaluation = read_json(folders[2] / "evaluation.json")
    assert set(evaluation["baselines"]) == {"linear_fvu", "untrained_fvu", "neurons_fvu"}
    assert evaluation["baselines"]["linear_fvu"] < 1e-6
    assert evaluation["baselines"]["untrained_fvu"] > 0.5


def test_the_neurons_of_an_mlp_are_a_baseline_of_what_it_writes(linear: tuple[Store, GPT2LMHeadModel]) -> None:
    store, reference = linear
    model = load_model(str(store.folder.parent / "model"), dtype="float32", device="cpu")
    ends, n_neurons = Ends((OUT[1],), (OUT[1],)), 4 * WIDTH
    found = neuron_fvus(store, model, ends, [1.0, 3.2, float(n_neurons)], {OUT[1]: float("inf")})
    assert found is not None
    assert found[2] < 1e-6  # all of them are the MLP
    mlp: Any = reference.transformer.h[1].mlp
    rows = {
        hook: torch.cat([some[hook] for some in store.joint_rows([IN[1], OUT[1]], "validation")])
        for hook in (IN[1], OUT[1])
    }
    with torch.no_grad():
        neurons = mlp.c_fc(rows[IN[1]])  # of the rows as the store has them: in half precision
        strength = neurons.abs() * mlp.c_proj.weight.norm(dim=1)
        for k, fvu in ((1, found[0]), (3, found[1])):
            kept = torch.where(strength >= strength.topk(k, dim=1).values[:, -1:], neurons, 0.0)
            error = (mlp.c_proj(kept) - rows[OUT[1]]).double().pow(2).sum()
            variance = (rows[OUT[1]] - rows[OUT[1]].mean(0)).double().pow(2).sum()
            assert fvu == pytest.approx(float(error / variance), rel=1e-3)
    assert found[0] > found[1]
    assert neuron_fvus(store, model, Ends((IN[1],), (IN[1],)), [1.0], {IN[1]: 1e9}) is None


def test_a_set_of_exact_transcoders_is_the_model_and_is_measured_once(
    linear: tuple[Store, GPT2LMHeadModel], tmp_path: Path
) -> None:
    store, model = linear
    for name, factor in (("exact", 1.0), ("none", 0.0)):
        for layer in LINEAR_LAYERS:
            sae = stand_in(model, layer, factor)
            save(sae, tmp_path, f"{name}-{layer}", store, [IN[layer]], [OUT[layer]], set=name)
    config = EvalConfig(run=tmp_path, resamples=50)
    folders = evaluate(config)
    exact, none = (read_json(tmp_path / "sets" / name / "evaluation.json") for name in ("exact", "none"))
    assert exact["metrics"]["ce_spliced"] == pytest.approx(exact["metrics"]["ce_clean"], abs=1e-6)
    assert exact["metrics"]["error_share"] < 1e-9
    assert none["metrics"]["ce_spliced"] == none["metrics"]["ce_zero"]
    assert none["metrics"]["error_share"] == none["hooks"][OUT[0]]["metrics"]["error_share"] == 1
    alone = metrics_of(folders[2])
    assert abs(alone["ce_spliced"] - none["metrics"]["ce_spliced"]) > 1e-3  # of one MLP, and of both
    summary = write_report(tmp_path, folders)
    assert [entry["members"] for entry in summary["sets"]] == [["exact-0", "exact-1"], ["none-0", "none-1"]]
    assert set_table(summary["sets"])[1][:2] == ["exact", "2"]
    assert "share of error" in (tmp_path / "report.html").read_text()
    runs = [
        Path(shutil.copytree(tmp_path, tmp_path / of / "run", ignore=shutil.ignore_patterns("one")))
        for of in ("one", "other")
    ]
    together, _ = report(ReportConfig(run=tuple(runs), out=tmp_path / "both"))
    assert [entry["name"] for entry in together["sets"]] == [
        f"{run}/{name}" for run in runs for name in ("exact", "none")
    ]
    written = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("s*/*/evaluation.json"))]
    evaluate(config)
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("s*/*/evaluation.json"))] == written


@torch.no_grad()
def test_transcoders_of_gemma_scope_stand_in_together(linear: tuple[Store, GPT2LMHeadModel], tmp_path: Path) -> None:
    """They read rows before the norm's gain, which is in their weights; x and -x, cut at 0, write what a linear MLP does."""
    store, model = linear
    given = []
    for layer in LINEAR_LAYERS:
        exact, norm = stand_in(model, layer), model.transformer.h[layer].ln_2
        assert exact.W_skip is not None
        eye, to_in = torch.eye(WIDTH), torch.diag(norm.weight)
        held = {"W_enc": torch.cat([to_in, -to_in], 1), "b_enc": torch.zeros(2 * WIDTH), "threshold": torch.zeros(2 * WIDTH),
                "W_dec": torch.cat([eye, -eye]) @ exact.W_skip, "b_dec": exact.b_dec}  # fmt: skip
        folder = tmp_path / f"gemma-scope-2b-pt-transcoders/layer_{layer}/width_16k/average_l0_5"
        folder.mkdir(parents=True)
        np.savez(folder / "params.npz", **{name: value.numpy() for name, value in held.items()})
        given.append(folder)
    run = tmp_path / "run"
    evaluate(EvalConfig(run=run, sae=tuple(given), store=store.folder, set="scope", resamples=50))
    found = read_json(run / "sets/scope/evaluation.json")
    assert found["metrics"]["ce_spliced"] == pytest.approx(found["metrics"]["ce_clean"], abs=1e-5)
    assert found["metrics"]["error_share"] < 1e-9
    assert list(found["hooks"]) == OUT


def test_what_a_joint_set_writes_is_a_sum(linear: tuple[Store, GPT2LMHeadModel], tmp_path: Path) -> None:
    store, model = linear
    first, second = stand_in(model, 0, parts=2), stand_in(model, 1)
    other = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # what the first writes to the second layer, the second takes off
        first.b_dec[WIDTH:] = other
        second.b_dec -= other
    of_set: dict[str, Any] = {"set": "both", "joint": True, "set_reads": IN}
    save(first, tmp_path, "a", store, IN[:1], OUT, **of_set)
    folder = save(second, tmp_path, "b", store, IN[1:], OUT[1:], **of_set)
    folders = evaluate(EvalConfig(run=tmp_path, resamples=50))
    assert not list((tmp_path / "saes").glob("*/evaluation.json"))  # a part of a sum has no figures
    found = read_json(tmp_path / "sets" / "both" / "evaluation.json")
    assert [of["metrics"]["fvu"] for of in found["hooks"].values()] == pytest.approx([0, 0], abs=1e-9)
    assert found["metrics"]["delta_ce"] == pytest.approx(0, abs=1e-6)
    summary = write_report(tmp_path, folders)
    assert (summary["saes"], summary["sets"][0]["joint"]) == ([], True)
    for missing, hook in ((tmp_path / "saes" / "a", IN[0]), (folder, IN[1])):
        shutil.move(missing, tmp_path / "kept")
        with pytest.raises(ValueError, match=rf"set 'both' is joint, and its member that reads {hook} is missing"):
            evaluate(EvalConfig(run=tmp_path))
        shutil.move(tmp_path / "kept", missing)


def test_a_crosscoder_has_figures_by_hook_and_their_mean(linear: tuple[Store, GPT2LMHeadModel], tmp_path: Path) -> None:
    store, _ = linear
    folder = save(half_of_the_first(), tmp_path, "half", store, OUT, OUT)
    evaluate(EvalConfig(run=tmp_path, resamples=50))
    found = read_json(folder / "evaluation.json")
    first, second = (found["hooks"][hook]["metrics"] for hook in OUT)
    rows = {hook: torch.cat(list(store.usual_rows(hook, "validation"))).double() for hook in OUT}
    energy = {hook: float(of.pow(2).sum()) for hook, of in rows.items()}
    variance = {hook: float((of - of.mean(0)).pow(2).sum()) for hook, of in rows.items()}
    assert first["fvu"] == pytest.approx(0.25 * energy[OUT[0]] / variance[OUT[0]], rel=1e-5)
    assert second["fvu"] == pytest.approx(energy[OUT[1]] / variance[OUT[1]], rel=1e-5)
    assert second["ce_spliced"] == second["ce_zero"] != first["ce_zero"]
    for name in ("fvu", "delta_ce", "kl"):
        assert found["metrics"][name] == pytest.approx((first[name] + second[name]) / 2)
        assert found["intervals"][name][0] <= found["metrics"][name] <= found["intervals"][name][1]
    assert found["metrics"]["l0"] == WIDTH
    assert set(found["baselines"]) == {"pca_fvu", "untrained_fvu"}


def test_pca_of_several_hooks_is_that_of_the_projection_at_each(linear: tuple[Store, GPT2LMHeadModel]) -> None:
    store, _ = linear
    pca = PCA.fit(store, OUT, "cpu")
    x_ND = torch.cat([joined(rows, OUT) for rows in store.joint_rows(OUT, "validation")])
    pca.observe(x_ND, x_ND)
    first, second = x_ND.double().pow(2).mean(0).split(WIDTH)
    scaled = pca.scale_D.double().pow(2)
    assert scaled[0] == 1  # as in training, E‖x‖² is the same at both, on training rows
    assert float(scaled[-1] * second.sum() / first.sum()) == pytest.approx(1, rel=0.05)

    def by_hand(rank: int) -> list[float]:
        basis = pca.components_DD[:, :rank]
        projected = (x_ND * pca.scale_D - pca.mean_D) @ basis @ basis.T + pca.mean_D
        return [float(of.pow(2).sum()) for of in (x_ND - projected / pca.scale_D).double().split(WIDTH, dim=1)]

    assert pca.errors(5.0) == pytest.approx(by_hand(5), rel=1e-4)
    halfway = [(a + b) / 2 for a, b in zip(by_hand(5), by_hand(6), strict=True)]
    assert pca.errors(5.5) == pytest.approx(halfway, rel=1e-4)
    assert pca.errors(2.0 * WIDTH + 9) == [0, 0]


def test_a_position_that_is_massive_at_one_hook_is_left_alone_at_all() -> None:
    keep = torch.tensor([[False, True, True, True, True]])
    batch = Batch(torch.zeros_like(keep).long(), torch.zeros_like(keep).long(), keep)
    values = {"a": torch.tensor([[9.0, 1, 9, 1, 1]])[..., None], "b": torch.tensor([[1.0, 1, 1, 8, 1]])[..., None]}
    places = Places.of(batch, values, {"a": 5.0, "b": 7.0})
    assert places.usual_BL.tolist() == [[False, True, False, False, True]]
    assert places.massive_BL.tolist() == [[False, False, True, True, False]]
    assert places.scored_BL.tolist() == [[False, True, False, False, False]]  # the last has nothing that follows


# --------------------------------------------------------------------------------------- bad input


def test_what_does_not_fit_its_hooks_is_named(linear: tuple[Store, GPT2LMHeadModel], tmp_path: Path) -> None:
    store, model = linear
    run = tmp_path / "wide"
    save(ReLUSAE(WIDTH, 4, writes=Writes(d_out=WIDTH + 1)), run, "wide", store, IN[:1], OUT[:1])
    with pytest.raises(ValueError, match=rf"wide writes vectors, {WIDTH + 1} wide; {OUT[0]} in .* has {WIDTH}"):
        evaluate(EvalConfig(run=run))
    run = tmp_path / "tied"
    save(ReLUSAE(WIDTH, 4), run, "tied", store, IN[:1], OUT[:1])
    with pytest.raises(ValueError, match=rf"tied writes what it reads, {WIDTH} wide; {OUT[0]} in"):
        evaluate(EvalConfig(run=run))
    run, elsewhere = tmp_path / "lacks", hook_name(2, "mlp_out")
    save(stand_in(model, 1), run, "lacks", store, IN[1:], [elsewhere])
    with pytest.raises(ValueError, match=rf"hook '{elsewhere}' is not in .*A store that has both: `saebench harvest"):
        evaluate(EvalConfig(run=run))


def test_sets_that_cannot_stand_in_for_mlps_are_named(linear: tuple[Store, GPT2LMHeadModel], tmp_path: Path) -> None:
    store, model = linear
    one = save(stand_in(model, 1), tmp_path, "one", store, IN[1:], OUT[1:], set="s")
    save(stand_in(model, 1), tmp_path, "two", store, IN[1:], OUT[1:], set="s")
    with pytest.raises(
        ValueError, match=rf"set 's': .*one and .*two both write {OUT[1]}; expected one, or metadata.joint"
    ):
        evaluate(EvalConfig(run=tmp_path))
    save(stand_in(model, 0), tmp_path, "two", store, IN[:1], OUT[:1], set="s", joint=True)
    with pytest.raises(ValueError, match=r"set 's' has members with and without metadata\.joint; expected all"):
        evaluate(EvalConfig(run=tmp_path))
    shutil.rmtree(tmp_path / "saes" / "two")
    for reads, writes, message in (
        (NORMALIZED[1:], OUT[1:], f"set 's' reads {NORMALIZED[1]} and {IN[1]}; expected one hook of each layer"),
        (IN[:1], OUT[1:], f"set 's' reads {IN[0]} and does not write {OUT[0]}; expected both of each layer read"),
    ):
        for name, joint_reads in (("one", IN[1:]), ("two", reads)):
            save(stand_in(model, 1), tmp_path, name, store, joint_reads, writes, set="s", joint=True)
        with pytest.raises(ValueError, match=message):
            evaluate(EvalConfig(run=tmp_path))
    shutil.rmtree(tmp_path / "saes" / "two")
    save(stand_in(model, 1), tmp_path, "one", store, IN[1:], OUT[1:], set="s")
    for facts, message in (
        ({"reads": OUT[:1]}, f"one of set 's' reads {OUT[0]} and writes {OUT[1]}; expected what a set replaces"),
        ({"writes": OUT[:1]}, f"one of set 's' writes {OUT[0]}, which comes before {IN[1]} that it reads"),
        ({"set": "../s"}, "one belongs to set '../s'; expected a name without slashes"),
        ({"set": "", "joint": True}, "one writes a part of a sum and does not say of which set: add metadata.set"),
    ):
        settings = read_json(one / "cfg.json")
        write_json(one / "cfg.json", {**settings, "metadata": {**settings["metadata"], **facts}})
        with pytest.raises(ValueError, match=message):
            evaluate(EvalConfig(run=tmp_path))
        write_json(one / "cfg.json", settings)


def test_a_crosscoder_is_refitted_over_all_of_its_hooks(linear: tuple[Store, GPT2LMHeadModel], tmp_path: Path) -> None:
    """Half of the first hook's vectors are made whole; at the second no coefficient mends anything."""
    store, _ = linear
    folder = save(half_of_the_first(), tmp_path, "half", store, OUT, OUT)
    evaluate(EvalConfig(run=tmp_path, resamples=50, refit=True))
    found = read_json(folder / "evaluation.json")
    refitted, second = found["refitted"], found["hooks"][OUT[1]]
    assert refitted["sums"][OUT[0]]["squared_error"] < 1e-6 * refitted["sums"][OUT[0]]["squared_norm"]
    assert refitted["sums"][OUT[1]]["squared_error"] == second["sums"]["squared_error"]
    assert refitted["metrics"]["fvu"] == pytest.approx(second["metrics"]["fvu"] / 2)


def test_what_is_no_autoencoder_has_its_own_figures_alone(
    linear: tuple[Store, GPT2LMHeadModel], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, model = linear
    transcoder = save(stand_in(model, 1), tmp_path, "transcoder", store, [IN[1]], [OUT[1]])
    with pytest.raises(
        ValueError, match="transcoder: not an autoencoder, .* expected an SAE or a crosscoder: leave out"
    ):
        evaluate(EvalConfig(run=tmp_path, resamples=50, refit=True))
    sae = save(scaled_identity(0.5), tmp_path, "sae", store, [OUT[1]], [OUT[1]])
    for _ in range(2):
        evaluate(EvalConfig(run=tmp_path, resamples=50, refit=True))
    assert "transcoder: not an autoencoder" in caplog.text
    assert "refitted" not in read_json(transcoder / "evaluation.json")
    assert "refitted" in read_json(sae / "evaluation.json")

"""Massive activations at a token that is not BOS, as most Llama-like models have them: defined once, respected everywhere."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONTEXT, HOOK, WIDTH
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from saebench.evaluate import EvalConfig, evaluate, massive_note, table, write_report
from saebench.files import read_json, write_json
from saebench.harvest import HarvestConfig, harvest
from saebench.index import IndexConfig, build_index, open_feature_index
from saebench.index.examples import show
from saebench.index.search import activations_on, features_for_text
from saebench.sae import ReLUSAE, load_sae, read_config, save_sae
from saebench.steer import open_bench
from saebench.store import Store
from saebench.store.schema import MASSIVE
from saebench.text import TextConfig
from saebench.train import TrainConfig, train

WORD = " None"


@pytest.fixture(scope="module")
def word(tokenizer: PreTrainedTokenizerFast) -> int:
    (token,) = tokenizer(WORD, add_special_tokens=False)["input_ids"]
    return token


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path], word: int) -> Path:
    """A Llama of which one word's vectors are hundreds of times as long as the others'."""
    path = tmp_path_factory.mktemp("massive") / "model"
    shutil.copytree(checkpoints["llama"], path)
    weights = load_file(path / "model.safetensors")
    weights["model.embed_tokens.weight"][word] *= 3000.0
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, model: Path, corpus: Path) -> Store:
    made = harvest(
        HarvestConfig(model=str(model), layers=(1,), tokens=8_000, context=CONTEXT, batch=8, shard_contexts=64, dtype="float32", out=tmp_path_factory.mktemp("store")),
        TextConfig(dataset=str(corpus), validation_fraction=0.2),
    )  # fmt: skip
    assert made
    return made


def columns(store: Store, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, keep) of all rows."""
    return tuple(np.concatenate([shard.column(name) for shard in store.of_split(split)]) for name in ("tokens", "keep"))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, store: Store) -> Path:
    out = tmp_path_factory.mktemp("run")
    train(config(store, out))
    evaluate(EvalConfig(run=out, resamples=50))
    return out


def config(store: Store, out: Path, **options: object) -> TrainConfig:
    usual = {"arch": ("topk", "batchtopk"), "k": (4,), "d_sae": (64,), "tokens": 30_000, "batch": 128, "device": "cpu"}
    return TrainConfig(store=store.folder, out=out, **usual | options)  # type: ignore[arg-type]


def test_rows_are_massive_beyond_ten_medians(store: Store, word: int) -> None:
    tokens, keep = columns(store, "train")
    norms = store.norms(HOOK)
    assert norms.bound == MASSIVE * store.statistics(HOOK)["median_norm"]
    assert (norms.rows, norms.massive) == (keep.sum(), (tokens == word).sum())
    rows = torch.cat([shard.rows(HOOK) for shard in store.of_split("train")])[torch.from_numpy(keep & (tokens != word))]
    assert norms.median == pytest.approx(float(rows.norm(dim=1).median()), rel=0.02)


def test_training_leaves_them_out_and_says_what_it_did(
    run: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("topk-k4", "batchtopk-k4"):
        metadata = read_config(run / "saes" / name)["metadata"]["saebench"]
        assert metadata["identity"]["exclude_outliers"] == MASSIVE
        assert metadata["longest_row"] == store.norms(HOOK).bound
        # BatchTopK trained on such rows spends its whole budget on them.
        assert read_json(run / "saes" / name / "evaluation.json")["metrics"]["fvu"] < 0.5
    caplog.set_level("INFO")
    assert train(config(store, run))
    assert "trained already" in caplog.text


def test_a_run_begun_without_goes_on_without(store: Store, tmp_path: Path) -> None:
    (folder,) = train(config(store, tmp_path, arch=("topk",), exclude_outliers=math.inf, tokens=2_000)) or []
    metadata = read_config(folder)["metadata"]["saebench"]
    assert "exclude_outliers" not in metadata["identity"]  # as before there was a default
    assert metadata["longest_row"] is None
    assert train(config(store, tmp_path, arch=("topk",), tokens=2_000)) == [folder]
    # What is trained beside it later is, too: the two are to be compared.
    more = train(config(store, tmp_path, k=(4, 8), arch=("topk",), tokens=2_000)) or []
    assert "exclude_outliers" not in read_config(more[1])["metadata"]["saebench"]["identity"]
    with pytest.raises(ValueError, match=r"exclude_outliers: None -> 10\.0"):
        train(config(store, tmp_path, arch=("topk",), exclude_outliers=10.0, tokens=2_000))


def halving(width: int) -> ReLUSAE:
    """x̂ = x / 2."""
    sae = ReLUSAE(width, 2 * width)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([torch.eye(width), -torch.eye(width)], 1))
        sae.W_dec.copy_(torch.cat([torch.eye(width), -torch.eye(width)]) / 2)
    return sae


def test_evaluation_treats_them_as_special_tokens(store: Store, model: Path, tmp_path: Path, word: int) -> None:
    """Against plain arithmetic and a Hugging Face model: not scored, not replaced; counted, with their share, beside the figures."""
    folder = tmp_path / "saes" / "half"
    save_sae(
        halving(WIDTH), folder, {"model_name": str(model), "hook_name": HOOK, "saebench": {"store": str(store.folder)}}
    )
    evaluate(EvalConfig(run=tmp_path, resamples=20, device="cpu"))
    got = read_json(folder / "evaluation.json")["metrics"]
    tokens, keep = (torch.from_numpy(column).view(-1, CONTEXT) for column in columns(store, "validation"))
    tokens = tokens.long()
    usual = keep & (tokens != word)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        x = reference(tokens, output_hidden_states=True).hidden_states[2]
    rows, every = x[usual].double(), x[keep].double()
    spread, spread_all = ((part - part.mean(0)).pow(2).sum(1) for part in (rows, every))
    assert got["fvu"] == pytest.approx(float((rows / 2).pow(2).sum() / spread.sum()), rel=1e-4)
    assert got["fvu_all"] == pytest.approx(float((every / 2).pow(2).sum() / spread_all.sum()), rel=1e-4)
    assert got["n_tokens_eval"] == int(usual.sum())
    assert got["massive_rows"] == int((tokens == word).sum())
    assert got["massive_share"] == pytest.approx(
        float(spread_all[tokens[keep] == word].sum() / spread_all.sum()), rel=1e-4
    )
    assert got["massive_share"] > 0.9

    def halved(module: object, args: object, output: object) -> torch.Tensor:
        hidden = output[0] if isinstance(output, tuple) else output
        return torch.where(usual[..., None], hidden / 2, hidden)  # type: ignore[operator]

    handle = reference.model.layers[1].register_forward_hook(halved)
    with torch.no_grad():
        losses = -reference(tokens).logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    handle.remove()
    # Nor does a bench edit them while there is no index: the store says where they begin, or else what training noted.
    assert open_bench(folder, device="cpu").intervention(0, "2").longest == store.norms(HOOK).bound
    noted = read_json(folder / "cfg.json")
    noted["metadata"]["saebench"] = {"longest_row": 7.0}
    write_json(folder / "cfg.json", noted)
    assert open_bench(folder, device="cpu").intervention(0, "2").longest == 7.0
    scored = usual[:, :-1] & keep[:, 1:]  # a special token is no fair thing to predict
    assert got["ce_spliced"] == pytest.approx(float(losses[scored].double().mean()), rel=1e-4)


def test_baselines_and_figures_are_of_the_other_rows(run: Path) -> None:
    summary = write_report(run, [run / "saes" / "topk-k4", run / "saes" / "batchtopk-k4"])
    topk, batchtopk = summary["saes"]
    assert topk["fvu"] < topk["baselines"]["pca_fvu"] < 1
    assert batchtopk["fvu"] < batchtopk["baselines"]["pca_fvu"]
    assert 0.9 < topk["gamma"] < 1.1
    assert "all rows" in table(summary["saes"])[0]
    assert "massive rows, longer than 10 times the median norm, which hold" in massive_note(summary["saes"])
    assert "massive rows" in (run / "report.html").read_text()


def test_the_index_counts_no_firing_on_them(run: Path, store: Store, word: int) -> None:
    folder = run / "saes" / "topk-k4"
    build_index(IndexConfig(sae=folder, sample=1_000, device="cpu"))
    sae = load_sae(folder)
    tokens, keep = columns(store, "train")
    with torch.no_grad():
        acts = sae.encode(torch.cat([shard.rows(HOOK) for shard in store.of_split("train")])).numpy()
    with open_feature_index(run / "index" / "topk-k4.h5") as index:
        assert index.n_rows == (keep & (tokens != word)).sum()
        assert np.array_equal(index.columns["fires"], (acts[keep & (tokens != word)] > 0).sum(0))
        assert np.array_equal(index.columns["massive"], (acts[tokens == word] > 0).sum(0))
        assert index.columns["massive"].sum() > 0
        assert index.longest == store.norms(HOOK).bound
        latent = int(index.columns["massive"].argmax())
        assert all(index.context_of(example.row, 0).tokens[0] != word for example in index[latent].top)
        # Nor is their activation shown beside an example, where it would dwarf the others.
        lines = [line for one in range(index.d_sae) for line in show(index, sae, one, index[one].top[:4])]
        beside = np.concatenate([line.values[line.context.tokens == word] for line in lines])
        assert len(beside) > 0
        assert not beside.any()
        assert max(line.values.max() for line in lines) <= index.columns["max"].max() * 1.001


def test_a_prompt_marks_them_and_the_bench_leaves_them_alone(run: Path, word: int) -> None:
    build_index(IndexConfig(sae=run / "saes" / "topk-k4", sample=1_000, device="cpu"))
    bench = open_bench(run / "saes" / "topk-k4", device="cpu")
    assert bench.index
    found = features_for_text(bench.model, bench.sae, bench.index, f"the cat{WORD} runs", limit=None)
    assert np.array_equal(found.massive, found.tokens == word)
    assert found.massive.sum() == 1
    place = int(found.massive.argmax())
    assert all(place not in firing.positions for firing in found.firings)
    latent = int(bench.index.columns["massive"].argmax())
    _, values = activations_on(bench.model, bench.sae, bench.index, f"the cat{WORD} runs", latent)
    assert values[place] == 0
    assert bench.intervention(latent, "1n").longest == bench.index.longest
    # A strength in n is of the other rows' median, not of one that such rows lift.
    median = bench.index.store.norms(HOOK).median
    assert bench.intervention(latent, "1n").strength == pytest.approx(median / float(bench.sae.W_dec[latent].norm()))

"""All stages in one command, stopped and continued; and what it says before and after."""

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from conftest import CONTEXT, WIDTH, sentences
from datasets import Dataset
from families import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM

from saebench.cli import main
from saebench.evaluate import EvalConfig, evaluate
from saebench.files import read_json
from saebench.harvest import HarvestConfig, harvest
from saebench.index import IndexConfig, build_index, open_feature_index
from saebench.models import load_model
from saebench.pipeline import RunConfig, run, stages_of
from saebench.plan import Stages, memory_of, plan
from saebench.sae import initialise, new_sae, read_config, save_sae
from saebench.store import open_store
from saebench.text import TextConfig
from saebench.train import TrainConfig, train


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": sentences(number, 400)}) + "\n" for number in range(60)))
    return path


def test_a_model_from_its_name_to_the_browser(
    checkpoints: dict[str, Path], lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    command = [
        "run",
        str(checkpoints["llama"]),
        "--dataset",
        str(lines),
        "--tokens",
        "4k",
        "--arch",
        "topk,relu",
        "--k",
        "4",
    ]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert "layer 1 of 3, 32 dimensions" in err  # the middle one, and the plan before anything is done
    for what in ("rows    4,000 for training", "SAEs    2 of 256 latents", "disk ", "memory ", "time    about"):
        assert what in err
    shown = out.splitlines()
    assert shown[-1] == "next: saebench app runs/llama"
    assert re.fullmatch(r"took evaluate \d+ s, harvest \d+ s, index \d+ s, train \d+ s, total \d+ s", shown[-2])
    assert [line.split()[0] for line in shown[2:4]] == ["relu-l0-4", "topk-k4"]
    assert sorted(path.stem for path in Path("runs/llama/index").glob("*.h5")) == ["relu-l0-4", "topk-k4"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert "time    about" not in err  # nothing is left to plan
    assert out.splitlines()[-1] == shown[-1]


def test_stopped_at_any_moment_it_goes_on(checkpoints: dict[str, Path], lines: Path, tmp_path: Path) -> None:
    """Ctrl-C and kill -9 within each stage; the same command then does what is left."""
    argv = (
        "run", str(checkpoints["llama"]), "--dataset", str(lines), "--layers", "1", "--tokens", "20k", "--d-sae", "64", "--k", "4",
        "--out", str(tmp_path / "runs" / "one"),
    )  # fmt: skip
    out, store = tmp_path / "runs" / "one", tmp_path / "activations" / "one"
    moments = (
        (lambda: (store / "manifest.json").exists(), signal.SIGINT),
        (lambda: (store / "shard-00000.h5").exists(), signal.SIGKILL),
        (lambda: (out / "saes" / "topk-k4" / "metrics.jsonl").exists(), signal.SIGINT),
        (lambda: (out / "saes" / "topk-k4" / "cfg.json").exists(), signal.SIGKILL),
    )
    for moment, number in moments:
        status, printed = processes.signal_when(processes.start(*argv, folder=tmp_path, slow=0.02), moment, number)
        assert status in (-number, 130, 0), printed  # or it was quicker
    status, printed = processes.run(*argv, folder=tmp_path)
    assert status == 0, printed
    assert printed.splitlines()[-1] == f"next: saebench app {out}"
    summary = read_json(out / "summary.json")
    assert [sae["name"] for sae in summary["saes"]] == ["topk-k4"]
    assert set(summary["seconds"]) == {"harvest", "train", "evaluate", "index", "total"}


def test_what_a_run_cannot_do_is_one_line(
    checkpoints: dict[str, Path], lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for options, message in (
        ([str(checkpoints["llama"])], "no text was named for model '.*': give --dataset with a file or folder"),
        (["./none", "--dataset", str(lines)], "model './none' is not a directory"),
        (
            [str(checkpoints["llama"]), "--dataset", str(lines), "--layers", "9"],
            "hook 'blocks.9.hook_resid_post' is beyond model",
        ),
        ([str(checkpoints["llama"]), "--dataset", "./none.txt"], "dataset './none.txt' does not exist"),
        (
            [str(checkpoints["llama"]), "--dataset", str(lines), "--k", "999"],
            "k is 999; expected more than 0 and at most d_sae = 256",
        ),
    ):
        assert main(["run", *options]) == 2
        err = capsys.readouterr().err
        assert re.search(rf"saebench: error: {message}", err), err
        assert "Traceback" not in err
    assert not (tmp_path / "activations").exists() or not list((tmp_path / "activations").rglob("shard-*"))


def test_a_store_made_by_hand_serves_a_run(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `run` has no option for is one of the harvest's; and a run of `.` has the folder's name."""
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"words": sentences(number, 400)}) + "\n" for number in range(60)))
    shutil.copytree(checkpoints["llama"], tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    command = ["run", ".", "--dataset", str(path), "--tokens", "4k", "--k", "4", "--d-sae", "64"]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert "column 'text' of dataset" in err
    assert "`saebench harvest … --out activations/mine`; then run this again" in err
    assert not Path("activations").exists()
    made = ["harvest", "--model", ".", "--dataset", str(path), "--column", "words", "--layers", "1", "--tokens", "4k"]
    assert main([*made, "--context", "64", "--dtype", "int8", "--out", "activations/mine"]) == 0
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "next: saebench app runs/mine"
    assert main([*command[:-4], "--tokens", "5k"]) == 2
    assert "tokens: 4000 -> 5000" in capsys.readouterr().err


def test_the_python_of_it(
    lines: Path, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    summary = run(
        RunConfig(model=str(checkpoints["llama"]), dataset=str(lines), layers=(0, 2), tokens=2_000, k=(4,), d_sae=(64,))
    )
    assert summary
    assert [sae["hook"] for sae in summary["saes"]] == ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]


def test_token_ids_without_a_tokenizer_go_through_all_stages(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Without texts: tokens are shown as their numbers, and there are no rules. No context opens with BOS, and that is said."""
    path = tmp_path / "model"
    shutil.copytree(checkpoints["llama"], path)
    for file in path.glob("*token*"):
        file.unlink()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(5, 300, (300, CONTEXT), generator=generator).tolist()
    Dataset.from_list([{"input_ids": row} for row in rows]).to_parquet(tmp_path / "ids.parquet")
    store = harvest(
        HarvestConfig(model=str(path), layers=(1,), tokens=3_000, context=CONTEXT, shard_contexts=64, dtype="float32", out=tmp_path / "store"),
        TextConfig(dataset=str(tmp_path / "ids.parquet"), validation_fraction=0.2),
    )  # fmt: skip
    assert store
    assert store.tokenizer() is None
    assert not store.shards[0].column("keep").reshape(-1, CONTEXT)[:, 0].any()  # attention sinks, BOS or not
    assert store.shards[0].column("keep").reshape(-1, CONTEXT)[:, 1:].all()
    assert store.verify() == []
    (sae,) = (
        train(
            TrainConfig(
                store=store.folder, out=tmp_path / "run", k=(4,), d_sae=(64,), tokens=4_000, batch=128, device="cpu"
            )
        )
        or []
    )
    assert read_config(sae)["metadata"]["prepend_bos"] is False
    evaluate(EvalConfig(run=tmp_path / "run", resamples=20, device="cpu"))
    build_index(IndexConfig(sae=sae, sample=500, device="cpu"))
    with open_feature_index(tmp_path / "run" / "index" / "topk-k4.h5") as index:
        latent = index[int(index.columns["fires"].argmax())]
        context = index.context_of(latent.top[0].row, 2)
        assert "".join(context.pieces) == "".join(f" {token}" for token in context.tokens)
        assert latent.rule is None
        assert index.top_logits is not None
    assert main(["store", "info", str(store.folder)]) == 0


def test_saes_that_exist_already_go_from_text_to_the_browser(
    checkpoints: dict[str, Path], lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of another place than the stream behind a layer; layer and place follow from them, and each is looked at first."""
    monkeypatch.chdir(tmp_path)
    sae = new_sae("topk", WIDTH, 64, k=4)
    initialise(sae, torch.zeros(WIDTH), torch.Generator().manual_seed(0))
    told = {"hook_name": "blocks.2.hook_mlp_out", "context_size": 32}
    save_sae(sae, Path("elsewhere/one"), told | {"model_name": "llama"})
    command = ["run", str(checkpoints["llama"]), "--dataset", str(lines), "--tokens", "3k", "--sae", "elsewhere/one"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert "SAEs    1 of 64 latents (one), there already" in err
    assert (
        len(re.findall(r"one on \d,\d{3} rows: L0 \d\.\d \(it states 4\), FVU", err)) == 1
    )  # the index need not look again
    assert out.splitlines()[-1] == "next: saebench app runs/llama"
    assert read_json(Path("activations/llama/manifest.json"))["identity"]["context"] == 32
    assert open_store("activations/llama").hooks == ["blocks.2.hook_mlp_out"]
    with open_feature_index("runs/llama/index/one.h5") as index:
        assert index.ends.reads == ("blocks.2.hook_mlp_out",)
    assert main(command) == 0
    assert "is complete already" in capsys.readouterr().err
    for options, message in (
        (["--layers", "1"], r"layers is \(1,\) and kinds \(\) beside --sae; expected neither"),
        (["--k", "4"], r"k is \(4,\) beside --sae, which trains nothing"),
        (["--sae", "elsewhere/none"], "elsewhere/none is not there"),
    ):
        assert main([*command, *options]) == 2
        assert re.search(f"saebench: error: {message}", capsys.readouterr().err)
    save_sae(sae, Path("elsewhere/two"), told | {"model_name": "gpt2"})
    assert main(["run", "maker/other", "--sae", "elsewhere/two"]) == 2
    assert "is of model 'gpt2', not of 'maker/other'" in capsys.readouterr().err


def test_a_plan_goes_by_the_widths_of_hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 heads of 12 are wider than the stream."""
    torch.manual_seed(1)
    wide = AutoConfig.for_model("qwen3", **FAMILIES["qwen3"].config | {"head_dim": 12})
    AutoModelForCausalLM.from_config(wide).save_pretrained(tmp_path / "model")
    model = load_model(str(tmp_path / "model"), device="cpu")
    told = HarvestConfig(
        model=model.id, layers=(1,), kinds=("attn_z", "resid_post"), tokens=1_000, context=CONTEXT, dtype="float32", out=tmp_path / "store"
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)

    def stages(**more: Any) -> Stages:
        return stages_of(RunConfig(model=model.id, out=tmp_path / "run", tokens=1_000, **more), told, TextConfig())

    # Weights, gradients and two moments of encoder and decoder, and two buffers of all of the rows, all of it in float32.
    many = 2**22
    assert memory_of(model, stages(d_sae=(many,))) == 8 * many * (48 + WIDTH) * 4 + 2 * 1_000 * (48 + WIDTH) * 4
    assert "SAEs    2 of 384 latents" in plan(model, stages())[2]  # 8 times the width of the first hook
    sae = new_sae("topk", 48, 64, k=4)
    save_sae(sae, tmp_path / "run/saes/one", {"hook_name": "blocks.1.attn.hook_z"})
    weights = sum(parameter.numel() * 4 for parameter in model.module.parameters())
    assert memory_of(model, stages(sae=("one",))) == weights + 2**29 + 2 * 48 * 64 * 4


def test_saes_are_trained_where_kinds_say(
    lines: Path, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = RunConfig(
        model=str(checkpoints["llama"]),
        dataset=str(lines),
        layers=(1,),
        kinds=("mlp_out",),
        tokens=2_000,
        k=(4,),
        d_sae=(64,),
    )
    summary = run(told)
    assert summary
    assert [sae["hook"] for sae in summary["saes"]] == ["blocks.1.hook_mlp_out"]

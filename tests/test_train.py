import json
import math
import random
import re
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import torch
from conftest import HOOK, WIDTH
from safetensors.torch import load_file
from test_sae import write_saelens
from test_store import CONTEXT as STORE_CONTEXT
from test_store import make, random_rows

from saebench.files import read_json, write_json
from saebench.index import IndexConfig, build_index, open_feature_index
from saebench.sae import SAE, load_sae, read_config, save_sae
from saebench.sae.sparse import forget_scratch
from saebench.store import Store, shuffled_batches
from saebench.train import Member, Spec, TrainConfig, grid, train
from saebench.train.checkpoint import Checkpoint, begun_as
from saebench.train.clock import Clock
from saebench.train.identity import Run
from saebench.train.memory import check_memory, need_of
from saebench.train.muon import step_by_muon
from saebench.train.recipes import EDITIONS, RECIPES
from saebench.train.schedules import Sparsity, default_learning_rate, learning_rate, pace
from saebench.train.shares import Share

COMMON = {"d_sae": (64,), "tokens": 20_000, "batch": 100, "lr": (3e-3,)}


def config(store: Store, out: Path, **options: object) -> TrainConfig:
    defaults = {"arch": ("relu", "topk", "gated"), "target_l0": (6.0,), "hook": (HOOK,), **COMMON}
    return TrainConfig(store=store.folder, out=out, **{**defaults, **options})  # type: ignore[arg-type]


def arguments(store: Store, out: Path) -> list[str]:
    return [
        "train", "--store", str(store.folder), "--hook", HOOK, "--out", str(out), "--arch", "relu,topk,gated", "--target-l0", "6",
        "--d-sae", "64", "--tokens", "20000", "--batch", "100", "--lr", "0.003", "--device", "cpu",
    ]  # fmt: skip


# -------------------------------------------------------------------------------------- schedules


def test_learning_rate_warms_up_holds_and_decays_to_zero() -> None:
    rates = [learning_rate(step, 1000, 2.0) for step in range(1000)]
    assert rates[0] == pytest.approx(2.0 / 10)
    assert rates[9] == rates[500] == rates[800] == 2.0
    assert rates[900] == pytest.approx(1.0)
    assert rates[999] == pytest.approx(2.0 / 200)
    assert all(a <= b for a, b in pairwise(rates[:10]))
    assert all(a >= b for a, b in pairwise(rates[800:]))


def follow(lag: float, pace: float, n_steps: int) -> list[float]:
    """L0 at each step of an SAE where it is 100/λ, reached over about `lag` steps; the target is 8."""
    sparsity = Sparsity(None, 8.0, "cpu", pace)
    l0, course = 300.0, []
    for step in range(n_steps):
        settled = min(300.0, 100.0 / float(sparsity.coefficient(step, n_steps)))
        l0 += (settled - l0) / lag
        sparsity.observe(torch.tensor(l0), step, n_steps)
        course.append(l0)
    return course


@pytest.mark.parametrize("lag", [1.0, 33.0])
def test_the_controller_brings_l0_to_its_target(lag: float) -> None:
    assert follow(lag, 1.0, 4000)[-1] == pytest.approx(8.0, rel=0.03)


def test_at_a_lower_learning_rate_the_controller_takes_its_time() -> None:
    """An eighth of the rate, and eight times the lag: at the gains of a short run L0 goes up and down."""
    wide, near = (max(abs(l0 / 8.0 - 1) for l0 in follow(264.0, pace, 6000)[2400:]) for pace in (1.0, 0.125))
    assert near < 0.1 < 0.2 < wide


def test_the_pace_is_the_learning_rates(store: Store, tmp_path: Path) -> None:
    own = default_learning_rate(WIDTH, 4000)
    options = {"arch": ("relu", "topk"), "lr": (own, own / 4, 2 * own), "l1": (1.0,), "k": (6,), "target_l0": (6.0,)}
    specs = grid(config(store, tmp_path, **options), WIDTH)
    assert [(spec.name, spec.pace) for spec in specs if spec.pace != 1.0] == [(f"relu-l0-6-lr{own / 4:g}", 0.25)]
    assert [spec.name for spec in specs if "pace" in spec.to_json()] == [f"relu-l0-6-lr{own / 4:g}"]
    assert grid(config(store, tmp_path, arch=("relu",), lr=()), WIDTH)[0].pace == 1.0  # 200 steps


def test_a_fixed_coefficient_warms_up_and_stays() -> None:
    sparsity = Sparsity(3.0, None, "cpu")
    sparsity.observe(torch.tensor(500.0), 0, 100)
    assert [round(float(sparsity.coefficient(step, 100)), 4) for step in (0, 4, 50, 99)] == [0.6, 3.0, 3.0, 3.0]


# ------------------------------------------------------------------------------------------ grids


def test_a_grid_has_every_architecture_at_every_sparsity(store: Store, tmp_path: Path) -> None:
    specs = grid(config(store, tmp_path, k=(4, 8), target_l0=(8.0, 16.0), l1=(2.0,), lr=()), WIDTH)
    assert [spec.name for spec in specs] == [
        "relu-l0-8", "relu-l0-16", "relu-l1-2", "topk-k4", "topk-k8", "topk-k16", "gated-l0-8", "gated-l0-16", "gated-l1-2",
    ]  # fmt: skip
    assert specs[0].lr == pytest.approx(6e-3 * math.sqrt(256 / WIDTH))
    long = config(store, tmp_path, tokens=1_600_000, lr=())
    assert grid(long, WIDTH)[0].lr == pytest.approx(3e-3 * math.sqrt(256 / WIDTH))  # 16,000 steps
    assert grid(config(store, tmp_path, d_sae=()), WIDTH)[0].d_sae == 8 * WIDTH


def test_names_say_what_differs_within_a_grid(store: Store, tmp_path: Path) -> None:
    many = config(store, tmp_path, arch=("matryoshka",), target_l0=(), k=(4,), d_sae=(32, 64), seed=(0, 1))
    rates = config(store, tmp_path, arch=("topk",), target_l0=(), k=(4,), lr=(1e-3, 2e-3), warmup=0.1, decay=0.5)
    assert [(spec.name, spec.lr, spec.warmup, spec.decay) for spec in grid(rates, WIDTH)] == [
        ("topk-k4-lr0.001", 1e-3, 0.1, 0.5), ("topk-k4-lr0.002", 2e-3, 0.1, 0.5),
    ]  # fmt: skip
    assert [spec.name for spec in grid(many, WIDTH, ("a", "b"))] == [
        "matryoshka-k4-f32-seed0-a", "matryoshka-k4-f32-seed1-a", "matryoshka-k4-f64-seed0-a", "matryoshka-k4-f64-seed1-a",
        "matryoshka-k4-f32-seed0-b", "matryoshka-k4-f32-seed1-b", "matryoshka-k4-f64-seed0-b", "matryoshka-k4-f64-seed1-b",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": ("topk",), "k": (65,)}, "k is 65; expected more than 0 and at most d_sae = 64"),
        ({"arch": ("topk",), "k": (0,)}, "k is 0; expected more than 0"),
        (
            {"arch": ("relu",), "target_l0": (), "k": (3,)},
            "architecture relu has no sparsity; expected --target-l0 or --l1",
        ),
        ({"arch": ("topk",), "target_l0": (), "l1": (3.0,)}, "architecture topk has no sparsity; expected --k"),
        ({"target_l0": ()}, "no sparsity given"),
        ({"tokens": 0}, "tokens is 0; expected more than 0"),
        ({"lr": (1e-3, 0.0)}, "lr is 0.0; expected more than 0"),
        (
            {"exclude_outliers": 1.0},
            "exclude_outliers is 1.0; expected more than 1: it is a multiple of the median norm",
        ),
        ({"warmup": -0.1}, "warmup is -0.1; expected a share of the steps"),
        ({"decay": 1.5}, "decay is 1.5; expected a share of the steps"),
        (
            {"hook": ("blocks.9.hook_resid_post",)},
            "is not in .*; it has blocks.0.hook_resid_post, blocks.1.hook_resid_post",
        ),
        ({"hook": ()}, "has several hooks; choose one with --hook"),
        ({"batch": 10**6}, "fewer than a batch of 1000000"),
    ],
)
def test_impossible_settings_are_named(options: dict[str, object], message: str, store: Store, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train(config(store, tmp_path / "run", **options))


# --------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def run(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid of three, trained by the command line without interruption."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    status, printed = processes.run(*arguments(store, out))
    assert status == 0, printed
    return out


def log_of(folder: Path) -> list[dict]:
    """The training log without what a clock decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s")} for line in lines]


def same_saes(one: Path, two: Path) -> bool:
    names = sorted(path.name for path in (one / "saes").iterdir() if path.is_dir())
    assert names == sorted(path.name for path in (two / "saes").iterdir() if path.is_dir())
    weights = "sae_weights.safetensors"
    return all(
        (one / "saes" / name / weights).read_bytes() == (two / "saes" / name / weights).read_bytes()
        and log_of(one / "saes" / name) == log_of(two / "saes" / name)
        for name in names
    )


def test_training_learns_and_saves_unit_rows(run: Path, store: Store) -> None:
    rows, _ = next(shuffled_batches(store, HOOK, 4000, seed=9))
    for folder in (run / "saes").glob("*-*"):
        sae, log = load_sae(folder), log_of(folder)
        # ReLU and Gated begin dense, and so with a low FVU; 1 is the mean's.
        assert log[-1]["fvu"] < (0.7 * log[0]["fvu"] if folder.name.startswith("topk") else 0.7)
        assert log[-1]["step"] == 200
        assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(64), atol=1e-5)
        out = sae(rows.float())
        fvu = ((rows - out.x_hat) ** 2).sum() / ((rows - rows.mean(0)) ** 2).sum()
        assert fvu.item() == pytest.approx(log[-1]["fvu"], rel=0.15)
        assert not (folder / "checkpoint").exists()
    assert not (run / "saes" / "checkpoint.json").exists()
    assert log_of(run / "saes" / "topk-k6")[-1]["l0"] == pytest.approx(6.0, abs=0.01)


def test_a_grid_over_layers_widths_and_seeds_is_one_run(store: Store, tmp_path: Path) -> None:
    """Six architectures' worth of points, interrupted in the middle, and each what it is without the interruption."""
    options = {
        "hook": ("blocks.0.hook_resid_post", HOOK), "arch": ("batchtopk", "jumprelu", "matryoshka"),
        "target_l0": (6.0,), "d_sae": (48, 64), "seed": (0, 3), "tokens": 8000, "device": "cpu",
    }  # fmt: skip
    folders = train(config(store, tmp_path / "whole", **options))
    assert folders is not None
    assert len(folders) == 24
    assert {read_config(folder)["metadata"]["hook_name"] for folder in folders} == set(options["hook"])
    assert {load_sae(folder).d_sae for folder in folders} == {48, 64}
    assert len({load_sae(folder).W_dec.sum().item() for folder in folders}) == 24
    train(config(store, tmp_path / "one", **{**options, "arch": ("jumprelu",)}))
    for folder in (tmp_path / "one" / "saes").glob("jump*"):
        name = f"saes/{folder.name}/sae_weights.safetensors"
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_batchtopk_meets_its_k_on_other_rows_through_its_threshold(store: Store, tmp_path: Path) -> None:
    made = train(config(store, tmp_path, arch=("batchtopk", "matryoshka"), target_l0=(6.0,), tokens=40_000))
    rows, _ = next(shuffled_batches(store, HOOK, 4000, seed=9))
    for folder in made or []:
        sae = load_sae(folder)
        assert sae.architecture == "jumprelu"
        assert read_config(folder)["metadata"]["training_architecture"] == folder.name.split("-")[0]
        assert (sae(rows.float()).acts > 0).sum(1).float().mean().item() == pytest.approx(6.0, rel=0.1)


def test_bfloat16_products_change_little(run: Path, store: Store, tmp_path: Path) -> None:
    train(config(store, tmp_path, arch=("topk",), dtype="bfloat16"))
    one, other = (log_of(path / "saes" / "topk-k6")[-1]["fvu"] for path in (run, tmp_path))
    assert one != other
    assert one == pytest.approx(other, rel=0.05)


def test_outliers_are_left_out_said_and_part_of_the_identity(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    options = {"arch": ("topk",), "tokens": 2000}
    (folder,) = train(config(store, tmp_path, exclude_outliers=1.2, **options)) or []
    norms = torch.cat(list(store.usual_rows(HOOK, "train"))).norm(dim=1)
    said = re.search(r"([\d,]+) of ([\d,]+) rows are left out, longer than 1\.2 × the median norm", caplog.text)
    assert said is not None
    out, all_rows = (int(number.replace(",", "")) for number in said.groups())
    assert all_rows == len(norms)
    assert 0 < out < len(norms) / 2
    assert out == pytest.approx(int((norms > 1.2 * norms.median()).sum()), rel=0.2)
    assert read_config(folder)["metadata"]["saebench"]["identity"]["exclude_outliers"] == 1.2
    with pytest.raises(ValueError, match=r"trained with other settings: exclude_outliers: 1\.2 -> None"):
        train(config(store, tmp_path, exclude_outliers=math.inf, **options))
    assert train(config(store, tmp_path, **options)) == [folder]  # what is not said is as it was begun


def test_metadata_says_how_an_sae_came_about(run: Path, store: Store) -> None:
    metadata = read_config(run / "saes" / "relu-l0-6")["metadata"]
    assert metadata["hook_name"] == HOOK
    assert metadata["context_size"] == store.context
    assert metadata["saebench"]["tokens_trained"] == 20_000
    assert metadata["saebench"]["lambda"] > 0
    assert metadata["saebench"]["identity"]["target_l0"] == 6.0
    assert metadata["saebench"]["store"] == str(store.folder)


def test_the_same_settings_give_the_same_bits(run: Path, store: Store, tmp_path: Path) -> None:
    processes.run(*arguments(store, tmp_path))
    assert same_saes(run, tmp_path)


def test_each_sae_is_what_it_would_be_alone(run: Path, store: Store, tmp_path: Path) -> None:
    status, printed = processes.run(*[{"relu,topk,gated": "gated"}.get(a, a) for a in arguments(store, tmp_path)])
    assert status == 0, printed
    name = "saes/gated-l0-6/sae_weights.safetensors"
    assert (tmp_path / name).read_bytes() == (run / name).read_bytes()


def test_vectors_of_ones_own_can_be_trained_on_and_indexed(tmp_path: Path) -> None:
    """What a user of a model that is refused is told to do: no tokenizer, and nothing said of where they are from."""
    keep = np.ones(480, bool)
    shards = [("train", random_rows(480, 0), keep), ("validation", random_rows(480, 1), keep)]
    store = make(tmp_path / "store", shards, identity={"context": STORE_CONTEXT})
    folders = train(
        TrainConfig(store=store.folder, out=tmp_path / "run", k=(2,), d_sae=(16,), tokens=2_000, batch=64, device="cpu")
    )
    assert folders
    assert read_config(folders[0])["metadata"]["model_name"] is None
    path = build_index(IndexConfig(sae=folders[0], logits=False, device="cpu"))
    assert path
    with open_feature_index(path) as index:
        assert index[0].top


def test_an_sae_from_elsewhere_beside_the_others_is_no_matter(run: Path, store: Store, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    write_saelens(tmp_path / "run" / "saes" / "theirs", "relu")
    status, printed = processes.run(*arguments(store, tmp_path / "run"))
    assert status == 0, printed
    assert "trained already" in printed


@pytest.mark.parametrize("seed", range(2))
def test_killed_and_resumed_equals_uninterrupted(
    seed: int, run: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = processes.start(*arguments(store, tmp_path), slow=0.003, checkpoint_seconds=0.2)
    steps = random.Random(seed).randrange(20, 120)

    def reached() -> bool:
        pointer = tmp_path / "saes" / "checkpoint.json"
        return pointer.exists() and read_json(pointer)["step"] >= steps

    processes.signal_when(child, reached, signal.SIGKILL)
    assert not (tmp_path / "saes" / "topk-k6" / "cfg.json").exists()
    status, printed = processes.run(*arguments(store, tmp_path))
    assert status == 0, printed
    assert same_saes(run, tmp_path)


def test_ctrl_c_saves_and_the_same_command_continues(run: Path, store: Store, tmp_path: Path) -> None:
    child = processes.start(*arguments(store, tmp_path), slow=0.01)
    log = tmp_path / "saes" / "relu-l0-6" / "metrics.jsonl"
    status, printed = processes.signal_when(child, lambda: log.exists() and log.stat().st_size > 0, signal.SIGINT)
    assert status == 130
    assert "the same command continues" in printed
    assert 50 <= read_json(tmp_path / "saes" / "checkpoint.json")["step"] < 200
    status, printed = processes.run(*arguments(store, tmp_path))
    assert status == 0, printed
    assert same_saes(run, tmp_path)


@pytest.mark.parametrize("lr", [(), (3e-3,)])
def test_runs_go_on_with_the_defaults_they_were_begun_with(
    lr: tuple[float, ...], store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, whether done or in a checkpoint: rate, decay, edition, and the pace, which was 1 once. A run begun now says its own."""
    whole, cut, now = tmp_path / "whole", tmp_path / "cut", tmp_path / "now"
    options = {"arch": ("relu",), "tokens": 4_000, "device": "cpu", "lr": lr}
    save = Checkpoint.save

    def save_and_cut(self: Checkpoint, *args: Any) -> None:
        save(self, *args)
        raise InterruptedError("cut")

    monkeypatch.setattr("saebench.train.settings.pace", lambda *_: 1.0)
    monkeypatch.setitem(RECIPES, "relu", RECIPES["relu"]._replace(edition=1))
    train(config(store, whole, **options))
    monkeypatch.setattr("saebench.train.clock.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(Checkpoint, "save", save_and_cut)
    with pytest.raises(InterruptedError, match="cut"):
        train(config(store, cut, **options))
    monkeypatch.undo()
    assert read_json(cut / "saes" / "checkpoint.json")["step"] < 40
    for out in (whole, cut, now):
        train(config(store, out, **options))
    said = [begun_as(out / "saes")["relu-l0-6"] for out in (whole, cut, now)]
    once = default_learning_rate(WIDTH, 40)
    rates = (lr or (once,))[0], (lr or (2 * once,))[0]
    assert [(one["lr"], one["decay"]) for one in said] == [(rates[0], 0.2), (rates[0], 0.2), (rates[1], 0.8)]
    assert [one.get("edition") for one in said] == [None, None, 2]
    assert [one.get("pace", 1.0) for one in said] == [1.0, 1.0, pace(rates[1], WIDTH)]
    assert same_saes(whole, cut)
    assert not same_saes(whole, now)


def test_a_full_disk_while_checkpointing_keeps_the_last_checkpoint(run: Path, store: Store, tmp_path: Path) -> None:
    child = processes.start(*arguments(store, tmp_path), slow=0.01)
    log = tmp_path / "saes" / "relu-l0-6" / "metrics.jsonl"
    processes.signal_when(child, lambda: log.exists() and log.stat().st_size > 0, signal.SIGINT)
    before = read_json(tmp_path / "saes" / "checkpoint.json")["step"]
    status, printed = processes.run(*arguments(store, tmp_path), file_limit=20_000)
    assert status == 2
    assert f"writing the checkpoint of step 200 in {tmp_path / 'saes'} failed" in printed
    assert "The one before it is whole; free some space and run the same command again" in printed
    assert "Traceback" not in printed
    assert read_json(tmp_path / "saes" / "checkpoint.json")["step"] == before
    status, printed = processes.run(*arguments(store, tmp_path))
    assert status == 0, printed
    assert same_saes(run, tmp_path)


def test_finished_saes_are_not_trained_again(run: Path, store: Store, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    before = (run / "saes" / "relu-l0-6" / "cfg.json").stat().st_mtime_ns
    assert len(train(config(store, run)) or []) == 3
    assert "all 3 SAEs are trained already" in caplog.text
    assert (run / "saes" / "relu-l0-6" / "cfg.json").stat().st_mtime_ns == before
    with pytest.raises(
        ValueError,
        match=r"relu-l0-6 holds an SAE trained with other settings: lr: 0.003 -> 0.001; order: 0 -> 1; seed: 0 -> 1",
    ):
        train(config(store, run, lr=(1e-3,), seed=(1,)))


def half_trained(store: Store, out: Path) -> None:
    child = processes.start(*arguments(store, out), slow=0.01)
    log = out / "saes" / "relu-l0-6" / "metrics.jsonl"
    processes.signal_when(child, lambda: log.exists() and log.stat().st_size > 0, signal.SIGINT)


def test_checkpoints_of_another_run_are_refused(store: Store, tmp_path: Path) -> None:
    half_trained(store, tmp_path)
    with pytest.raises(
        ValueError,
        match=r"holds a checkpoint of other settings: gated-l0-6: dead_steps: 10 -> 15; tokens: 20000 -> 30000",
    ):
        train(config(store, tmp_path, tokens=30_000))
    # the same pointer over weights of another width: a store whose d_in differs
    pointer = read_json(tmp_path / "saes" / "checkpoint.json")
    file = tmp_path / "saes" / "gated-l0-6" / "checkpoint" / f"step-{pointer['step']:09d}.safetensors"
    state = load_file(file)
    spec = Spec(
        **{
            k: pointer["identity"]["gated-l0-6"][k]
            for k in ("name", "hook", "architecture", "d_sae", "k", "target_l0", "l1", "lr", "seed")
        }
    )
    wider = Member(spec, torch.zeros(WIDTH + 1), 10, 200, "cpu")
    with pytest.raises(
        ValueError,
        match=r"the checkpoint of gated-l0-6 holds weights .*, expected .*: use the store and sizes it began with",
    ):
        wider.restore(state)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"checkpoint .*step-.*safetensors cannot be read"):
        train(config(store, tmp_path))
    write_json(tmp_path / "saes" / "checkpoint.json", {**pointer, "identity": {}})
    with pytest.raises(ValueError, match="holds a checkpoint of other settings"):
        train(config(store, tmp_path))


def diverging(monkeypatch: pytest.MonkeyPatch, name: str, step: int) -> None:
    """From `step` on, the SAE of this name sees an infinite input."""
    honest = Member.step

    def step_with_infinity(self: Member, x: torch.Tensor, now: int, y: None) -> None:
        if self.spec.name == name and now >= step:
            x = x.clone()
            x[0, 0] = torch.inf
        honest(self, x, now, y)

    monkeypatch.setattr(Member, "step", step_with_infinity)


def test_one_diverging_sae_is_named_and_does_not_stop_the_others(
    run: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    diverging(monkeypatch, "topk-k6", 120)
    with pytest.raises(ValueError, match=r"topk-k6 stopped at step 121, when its loss was no longer finite") as error:
        train(config(store, tmp_path, device="cpu"))
    assert "the loss of topk-k6 is no longer finite at step 121; the others go on" in caplog.text
    file = Path(str(error.value).split("of before are in ")[1].split(". The other")[0])
    assert file.parent.parent.name == "topk-k6"
    assert all(value.isfinite().all() for key, value in load_file(file).items() if key.startswith("sae."))
    assert [line["step"] for line in log_of(tmp_path / "saes" / "topk-k6")] == [50, 100]
    for name in ("relu-l0-6", "gated-l0-6"):
        weights = f"saes/{name}/sae_weights.safetensors"
        assert (tmp_path / weights).read_bytes() == (run / weights).read_bytes()
    with pytest.raises(ValueError, match="topk-k6 stopped at step 121"):  # and says so again
        train(config(store, tmp_path, device="cpu"))


def test_when_all_diverge_the_run_stops(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"relu-l0-6 stopped at step \d+, when its loss was no longer finite"):
        train(config(store, tmp_path, arch=("relu",), lr=(1e30,)))
    assert read_json(tmp_path / "saes" / "checkpoint.json")["step"] < 200


def test_a_checkpoint_never_holds_weights_that_are_not_finite(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saebench.train.clock.CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(ValueError, match="no longer finite"):
        train(config(store, tmp_path, lr=(1e30,)))
    for file in (tmp_path / "saes").glob("*/checkpoint/*.safetensors"):
        assert all(bool(value.isfinite().all()) for key, value in load_file(file).items() if key.startswith("sae."))


def test_a_stop_between_the_last_saves_loses_nothing(
    run: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Path] = []

    def save_one(sae: SAE, folder: Path, facts: dict) -> None:
        if saved:
            raise OSError("no space left")
        saved.append(folder)
        save_sae(sae, folder, facts)

    monkeypatch.setattr("saebench.train.loop.save_sae", save_one)
    with pytest.raises(ValueError, match=r"its checkpoint is safe\) failed: no space left"):
        train(config(store, tmp_path, device="cpu"))
    monkeypatch.undo()
    assert train(config(store, tmp_path, device="cpu"))
    assert same_saes(run, tmp_path)
    assert not list((tmp_path / "saes").rglob("checkpoint*"))


def test_a_target_that_was_missed_is_said(store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(config(store, tmp_path, arch=("relu",), tokens=2000))
    assert "relu-l0-6 ended at L0 " in caplog.text


def test_a_step_moves_the_decoder_twice_as_far_and_shrinks_the_encoder(store: Store) -> None:
    """Adam's first step moves each weight by its rate; the encoder has shrunk by 2 × the rate before, less and less over the run."""
    x = next(shuffled_batches(store, HOOK, 400, seed=1))[0].float()
    spec = Spec(name="s", architecture="relu", d_sae=32, l1=0.1, lr=1e-3, decay=0.2, seed=0, edition=2)
    for first, rate, shrink in ((0, 1e-3, 2e-3), (50, 1e-3, 1e-3), (90, 5e-4, 1e-4)):
        member = Member(spec, x.mean(0), 10**6, 100, "cpu")
        before = {name: value.detach().clone() for name, value in member.parameters.items()}
        member.step(x, first)
        moved = {name: value.detach() - before[name] for name, value in member.parameters.items()}
        moved["W_enc"] += shrink * before["W_enc"]
        for name, value in moved.items():  # a gradient near 0 moves its weight less
            assert float(value.abs().median()) == pytest.approx(2 * rate if name == "W_dec" else rate, rel=1e-3), name


def muon(gradients: Sequence[torch.Tensor], lr: float = 1.0, shrink: float = 0.0) -> list[torch.Tensor]:
    """How far each of the steps moves a matrix of zeros, over 0.37·√F of the rate."""
    weight = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = torch.optim.SGD([weight])
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    moved = []
    for gradient in gradients:
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        step_by_muon(weight, optimizer, Share(), lr, shrink)
        moved.append((weight.detach() - before) / (lr * 0.37 * len(weight) ** 0.5))
    return moved


def test_muon_moves_as_far_along_each_large_direction_and_the_others_together() -> None:
    """Of 64 directions 16 are large, and once they have been found those have singular values near 1; of the others what these are over their root
    mean square. From the first step on it is as long, whatever the gradient's length."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 64, generator=generator, dtype=torch.float64)).Q for n in (300, 64))
    values = torch.cat([torch.logspace(0, -1.5, 16), torch.linspace(0.02, 0.005, 48)]).double()
    steps = muon([1e-4 * (left * values) @ right.T] * 40)
    along = -((left.T @ steps[-1]) * right.T).sum(1)
    assert along[:16].min() > 0.65
    assert along[:16].max() < 1.25
    assert torch.allclose(along[16:], values[16:] / values[16:].square().mean().sqrt(), rtol=1e-6)
    assert float((steps[-1] + (left * along) @ right.T).norm()) < 1e-6  # and along no others
    for moved in steps:
        assert float(moved.norm()) == pytest.approx(8.0, rel=0.1)


@pytest.mark.parametrize("directions", [0, 3])
def test_muon_takes_a_gradient_of_few_directions_or_none(directions: int) -> None:
    left, right = torch.randn(2, 100, 64, generator=torch.Generator().manual_seed(0))
    for moved in muon([left[:, :directions] @ right[:64, :directions].T] * 5):
        assert moved.isfinite().all()
        assert float(moved.norm()) <= 1.2 * 8
        assert bool(moved.any()) is (directions > 0)


def test_muon_by_blocks_of_latents_is_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a large matrix is gone through on a CPU; the last block is smaller."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(96, 64, generator=generator, dtype=torch.float64) for _ in range(4)]
    whole = muon(gradients, shrink=0.1)
    monkeypatch.setattr("saebench.train.muon._BLOCK", 7 * 64)
    for moved, by_blocks in zip(whole, muon(gradients, shrink=0.1), strict=True):
        assert torch.allclose(by_blocks, moved, rtol=0, atol=1e-12)


def test_an_edition_moves_the_encoder_by_muon_and_all_else_by_adam(store: Store) -> None:
    x = next(shuffled_batches(store, HOOK, 400, seed=1))[0].float()
    spec = Spec(name="s", architecture="topk", d_sae=64, k=8, lr=1e-3, decay=0.2, seed=0, edition=3)
    member, adam = (Member(one, x.mean(0), 10**6, 100, "cpu") for one in (spec, replace(spec, edition=2)))
    before = member.parameters["W_enc"].detach().clone()
    member.step(x, 0)
    adam.step(x, 0)
    moved = member.parameters["W_enc"].detach() - (1 - EDITIONS[3].shrink * 1e-3) * before
    assert float(moved.square().mean().sqrt()) == pytest.approx(0.37e-3, rel=0.1)
    for name in {*member.parameters} - {"W_enc"}:
        assert torch.equal(member.parameters[name], adam.parameters[name]), name
    assert not torch.equal(member.parameters["W_enc"], adam.parameters["W_enc"])


def test_muon_resumes_to_the_bit_and_takes_no_bad_step(store: Store) -> None:
    batches = shuffled_batches(store, HOOK, 200, seed=1)
    xs = [next(batches)[0].float() for _ in range(6)]
    spec = Spec(name="s", architecture="relu", d_sae=32, target_l0=4.0, lr=1e-3, seed=0, edition=3)
    one, other = (Member(spec, xs[0].mean(0), 3, 10, "cpu") for _ in range(2))
    for step, x in enumerate(xs[:4]):
        one.step(x, step)
    other.restore({name: value.clone() for name, value in one.state().items()})
    for step, x in enumerate(xs[4:], 4):
        one.step(x, step)
        other.step(x, step)
    assert torch.equal(one.sae.W_enc, other.sae.W_enc)
    state = {name: value.clone() for name, value in one.state().items() if name.startswith(("sae.", "adam.W_enc"))}
    one.step(torch.full_like(xs[0], torch.nan), 6)
    assert one.diverged == 6
    assert all(torch.equal(one.state()[name], value) for name, value in state.items())


# ------------------------------------------------------------------------------------- dead latents


def test_resampling_points_dead_latents_at_what_is_badly_reconstructed(store: Store) -> None:
    rows, _ = next(shuffled_batches(store, HOOK, 400, seed=1))
    x = rows.float()
    spec = Spec(name="s", architecture="relu", d_sae=32, l1=0.1, lr=1e-3, seed=0)
    member = Member(spec, x.mean(0), 5, 100, "cpu")
    for step in range(3):
        member.step(x, step)
    member.silent_steps[[4, 9]] = 7
    x[[18, 200]] = x[17].clone()  # a token after BOS has the same vector in every context
    error = torch.zeros(len(x))
    error[[17, 18, 33, 200]] = torch.tensor([1.0, 1.0, 0.5, 1.0])  # the badly reconstructed rows
    with torch.no_grad():
        for step, part in enumerate((slice(0, 100), slice(100, 400))):
            member._pool(x[part], error[part], 50 + step)
        member._resample()
    directions = torch.nn.functional.normalize(x[[17, 33]] - member.sae.b_dec, dim=1)
    found = torch.nn.functional.normalize(member.sae.W_dec[[4, 9]], dim=1)
    assert torch.allclose((found @ directions.T).sort().values[:, -1], torch.ones(2), atol=1e-5)
    assert (found @ directions.T).argmax(1).unique().numel() == 2  # each its own: no twins
    for latent in (4, 9):
        acts = member.sae.encode(x)[:, latent]
        assert acts[[17, 33]].max() > 0
        assert (acts > 0).float().mean() < 0.4  # its kind alone, not half of all
        assert member.optimizer.state[member.parameters["W_enc"]]["exp_avg"][latent].abs().sum() == 0
        second = member.optimizer.state[member.sae.W_dec]["exp_avg_sq"]
        assert torch.allclose(second[latent], second[10:].mean(), rtol=0.5)  # that of the living
        assert member.silent_steps[latent] == 0
    assert member.optimizer.state[member.sae.W_dec]["exp_avg"][5].abs().sum() > 0


@pytest.mark.parametrize("architecture", ["relu", "gated"])
def test_a_resampled_latent_keeps_its_direction_in_the_next_step(architecture: str, store: Store) -> None:
    rows, _ = next(shuffled_batches(store, HOOK, 400, seed=1))
    x = rows.float()
    member = Member(
        Spec(name="s", architecture=architecture, d_sae=32, l1=0.1, lr=1e-3, seed=0), x.mean(0), 10**6, 1000, "cpu"
    )
    for step in range(100):
        member.step(x, step)
    member.silent_steps[4] = 10**6
    with torch.no_grad():
        member._pool(x, torch.ones(len(x)), 100)
        member._resample()
    before = member.sae.W_enc[:, 4].detach().clone()
    member.step(x, 101)
    assert torch.cosine_similarity(before, member.sae.W_enc[:, 4].detach(), dim=0) > 0.9


def test_dead_latents_for_which_there_is_no_input_stay_dead(store: Store) -> None:
    rows, _ = next(shuffled_batches(store, HOOK, 40, seed=1))
    x = rows.float()
    member = Member(Spec(name="s", architecture="relu", d_sae=32, l1=0.1, lr=1e-3, seed=0), x.mean(0), 5, 100, "cpu")
    for step in range(3):
        member.step(x, step)
    member.silent_steps[[4, 9]] = 7
    before = member.sae.W_dec[9].detach().clone()
    with torch.no_grad():
        member._pool(x[:1].repeat(8, 1), torch.ones(8), 50)
        member._resample()
    assert member.silent_steps[[4, 9]].tolist() == [0, 7]
    assert torch.equal(member.sae.W_dec[9], before)
    assert len(member.pool) == 0


def test_drawn_without_replacement_by_their_squared_loss(store: Store) -> None:
    """Against the draw one by one: the first is a row with probability w / Σw, the second among those left."""
    member = Member(
        Spec(name="s", architecture="relu", d_sae=32, l1=0.1, lr=1e-3, seed=0), torch.zeros(WIDTH), 5, 10**6, "cpu"
    )
    x, error = torch.eye(3, WIDTH), torch.tensor([1.0, 2.0, 3.0]).sqrt().sqrt()  # weights 1, √2, √3
    weight = error.double().pow(2)
    n, first, pairs = 4000, torch.zeros(3), torch.zeros(3, 3)
    for draw in range(n):
        member.pool, member.pool_keys = member.pool[:0], member.pool_keys[:0]
        member._pool(x, error, draw)
        order = member.pool.argmax(1)
        first[order[0]] += 1
        pairs[order[0], order[1]] += 1
    share = weight / weight.sum()
    assert torch.allclose(first.double() / n, share, atol=0.03)
    expected = share[:, None] * share[None] / (1 - share[:, None])
    assert torch.allclose(pairs.double() / n, expected.fill_diagonal_(0.0), atol=0.03)


def test_after_a_bad_step_there_is_no_other(store: Store) -> None:
    rows, _ = next(shuffled_batches(store, HOOK, 200, seed=1))
    x = rows.float()
    for architecture in ("relu", "topk", "batchtopk", "gated", "jumprelu"):
        spec = Spec(
            name="s",
            architecture=architecture,
            d_sae=32,
            k=4 if "topk" in architecture else None,
            l1=0.1,
            lr=1e-2,
            seed=0,
        )
        member = Member(spec, torch.zeros(WIDTH), 5, 100, "cpu")
        for step in range(5):
            member.step(x, step)
        before = {name: value.detach().clone() for name, value in member.sae.state_dict().items()}
        member.step(torch.full_like(x, torch.nan), 5)
        for step in range(6, 12):
            member.step(x, step)
        assert member.diverged == 5
        assert all(torch.equal(value, before[name]) for name, value in member.sae.state_dict().items())


def test_checkpoints_take_a_twentieth_of_the_time_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("saebench.train.clock.time.monotonic", lambda: now[0])
    clock = Clock(0.0, 0)
    saves = []
    for _ in range(10_000):
        now[0] += 1.0  # a step
        if clock.save_is_due:
            with clock.saving():
                now[0] += 30.0
            saves.append(now[0])
    assert 0.03 < 30 * len(saves) / now[0] < 0.05
    assert saves[0] < 100  # the first is not known to be slow


def test_tf32_ends_with_the_training(store: Store, tmp_path: Path) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    assert train(config(store, tmp_path, arch=("topk",), tokens=1_000, dtype="tf32"))
    assert matmul.allow_tf32 == before


@pytest.mark.parametrize("architecture", ["topk", "gated"])
def test_unit_rows_stay_unit_rows(architecture: str, store: Store) -> None:
    rows, _ = next(shuffled_batches(store, HOOK, 200, seed=1))
    spec = Spec(
        name="s", architecture=architecture, d_sae=32, k=4 if architecture == "topk" else None, l1=0.1, lr=1e-2, seed=0
    )
    member = Member(spec, torch.zeros(WIDTH), 5, 100, "cpu")
    for step in range(20):
        member.step(rows.float(), step)
    assert torch.allclose(member.sae.W_dec.norm(dim=1), torch.ones(32), atol=1e-6)


# ------------------------------------------------------------------------- the buffer, and the plan


def test_a_buffer_is_asked_for_in_rows_or_memory(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saebench.train.settings.total_memory", lambda: 2**38)
    told = config(store, tmp_path)
    assert told.rows_of_a_buffer(256 * 2) == 2**31 // (2 * 256 * 2)  # 2 GB hold more than 500,000
    assert told.rows_of_a_buffer(4 * 4096 * 2) == 500_000
    assert config(store, tmp_path, memory_gb=1.0).rows_of_a_buffer(1024) == 2**19
    assert config(store, tmp_path, buffer_rows=777).rows_of_a_buffer(10**6) == 777
    monkeypatch.setattr("saebench.train.settings.total_memory", lambda: 2**34)
    assert told.rows_of_a_buffer(32 * 4096 * 2) == 2**33 // (2 * 32 * 4096 * 2)  # half of the memory
    with pytest.raises(ValueError, match="memory_gb is 1 and buffer_rows 777; expected one of them"):
        config(store, tmp_path, memory_gb=1.0, buffer_rows=777)
    with pytest.raises(ValueError, match="buffer_rows is 0; expected more than 0"):
        config(store, tmp_path, buffer_rows=0)


def test_a_run_says_how_well_it_shuffles(store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for rows, level in ((None, "INFO"), (300, "WARNING")):
        told = config(store, tmp_path / level, arch=("topk",), k=(6,), target_l0=(), tokens=1000, buffer_rows=rows)
        train(told)
        (said,) = (line for line in caplog.records if "of a perfect shuffle" in line.getMessage())
        assert said.levelname == level
        assert ("larger --buffer-rows" in said.getMessage()) == (level == "WARNING")
        caplog.clear()


def test_a_run_goes_on_with_the_buffer_it_was_begun_with(store: Store, tmp_path: Path) -> None:
    """Where that was bytes for each hook, and where a machine of other memory would choose another."""
    told = config(store, tmp_path, arch=("topk",), k=(6,), target_l0=())
    specs, pointer = grid(told, WIDTH, (HOOK,)), tmp_path / "saes" / "checkpoint.json"
    (now,) = Run.of(told, store).identity.values()
    assert now["buffer_rows"] == Run.of(told, store).buffers[HOOK]
    former = {name: value for name, value in now.items() if name != "buffer_rows"}
    for begun, rows in (
        ({**former, "memory_gb": 0.001}, int(0.001 * 2**30) / (WIDTH * 4) / 2),
        ({**now, "buffer_rows": 12_345}, 12_345),
    ):
        write_json(pointer, {"step": 1, "cursors": {}, "seconds": 1.0, "identity": {specs[0].name: begun}})
        run = Run.of(told, store)
        assert run.identity[specs[0].name] == begun
        assert run.buffers[HOOK] == rows
    asked = config(store, tmp_path, arch=("topk",), k=(6,), target_l0=(), buffer_rows=99)
    with pytest.raises(ValueError, match="buffer_rows: 12345 -> 99"):
        train(asked)


def test_a_run_begun_with_an_option_that_is_gone_is_refused(store: Store, tmp_path: Path) -> None:
    told = config(store, tmp_path, arch=("topk",), k=(6,), target_l0=(), tokens=1000)
    train(told)
    (folder,) = (tmp_path / "saes").glob("*/cfg.json")
    saved = json.loads(folder.read_text())
    saved["metadata"]["saebench"]["identity"]["optimizer"] = "muon"
    write_json(folder, saved)
    with pytest.raises(ValueError, match="optimizer: 'muon' -> None.* Choose another --out"):
        train(told)


def test_a_grid_that_does_not_fit_is_refused_with_what_would(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    told = config(store, tmp_path, arch=("relu", "topk"), target_l0=(4.0, 6.0))
    specs, cpu = grid(told, WIDTH, (HOOK,)), torch.device("cpu")
    needs = [need_of(spec, WIDTH, 100, cpu) for spec in specs]
    room = sum(need.held for need in needs[:3]) + max(need.passing for need in needs)
    monkeypatch.setattr("saebench.train.memory.free_memory", lambda device: room)  # of a CPU buffers take a part
    check_memory(specs[:3], [WIDTH] * 3, 100, "cpu", 0)
    assert "relu of 64 latents: weights" in caplog.text
    assert "3 SAEs take at most" in caplog.text
    room += 2 * store.rows("train") * WIDTH * 4
    with pytest.raises(ValueError, match="4 SAEs take about .* the first 3 would fit: train the grid in parts"):
        train(told)
    assert not (tmp_path / "saes" / "checkpoint.json").exists()
    monkeypatch.setattr("saebench.train.memory.free_memory", lambda device: 1000)
    with pytest.raises(ValueError, match="one of 64 latents alone is too large: use a smaller --d-sae than 64"):
        train(told)


@pytest.mark.parametrize("active", [None, 0.14])
@pytest.mark.parametrize("architecture", list(RECIPES))
def test_a_step_takes_what_was_planned_for_it(architecture: str, active: float | None) -> None:
    """Of memory beside the weights and moments: at most that, and not ten times less; all latents active, or as many as sparse products are for."""
    level: dict[str, Any] = {"k": 32} if RECIPES[architecture].takes_k else {"l1": 1.0}
    spec = Spec(
        name="m", architecture=architecture, d_sae=4096, lr=1e-3, seed=0, edition=RECIPES[architecture].edition, **level
    )
    member = Member(spec, torch.zeros(64), 10**6, 100, "cpu")
    x = torch.randn(1024, 64, generator=torch.Generator().manual_seed(0))
    member.step(x, 0)
    if active is not None and not RECIPES[architecture].takes_k:
        with torch.no_grad():
            least = member.sae.project(x).flatten().topk(int(active * x.shape[0] * 4096)).values.min()
            name = {"jumprelu": "threshold", "gated": "b_gate", "relu": "b_enc"}[architecture]
            member.sae.get_parameter(name).fill_(least if name == "threshold" else -least)
        member.sparsity.l0.fill_(active * 4096)
    forget_scratch()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        member.step(x, 1)
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    most = int(np.cumsum(changes).max())
    planned = need_of(spec, 64, 1024, torch.device("cpu"))
    assert most <= planned.passing <= 10 * most
    moments = sum(
        value.nbytes for state in member.optimizer.state.values() for value in state.values() if value.numel() > 1
    )
    assert moments <= planned.moments <= 1.1 * moments

"""Models that lie on several devices: what accelerate lays out gives what one device gives. Here a CPU, with the weights of half the layers on disk."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import an_sae
from test_evaluate import save
from test_harvest import config as harvest_config
from test_harvest import text
from torch import Tensor

from saebench.evaluate import EvalConfig, evaluate
from saebench.evaluate.neurons import _norms
from saebench.files import read_json
from saebench.harvest import harvest
from saebench.harvest.ranks import World
from saebench.models import (
    LanguageModel,
    capture,
    check_hook,
    check_padding,
    choose_device,
    clean_pass,
    hook_name,
    load_model,
    logit_lens,
    logits,
    mlps_replaced,
    next_logits,
    resumed_states,
    resumes,
    spliced_logits,
    spliced_states,
    unembedding,
)
from saebench.models.checks import probe_tokens
from saebench.models.devices import placed
from saebench.models.places import place_of
from saebench.pipeline import RunConfig, run
from saebench.store import Store
from saebench.train import TrainConfig, train

Pair = tuple[LanguageModel, LanguageModel]


def half_on_disk(name: str, **options: Any) -> LanguageModel:
    """A CPU, which is said to have room for six tenths of the weights."""
    size = sum(file.stat().st_size for file in Path(name).glob("*.safetensors"))
    return load_model(name, **options | {"device": "all", "max_memory": {"cpu": int(0.6 * size)}})


@pytest.fixture(scope="module")
def pair(checkpoints: dict[str, Path]) -> Pair:
    """(a model on one device, the same one laid out)."""
    path = str(checkpoints["llama"])
    return load_model(path, device="cpu", dtype="float32"), half_on_disk(path, dtype="float32")


def test_a_model_in_two_places_is_the_model(pair: Pair) -> None:
    plain, split = pair
    assert set(split.module.hf_device_map.values()) == {"cpu", "disk"}
    assert any(weight.is_meta for weight in split.module.parameters())
    assert split.device == plain.device
    tokens = probe_tokens(plain)
    assert torch.equal(logits(split, tokens), logits(plain, tokens))
    hooks = [
        hook_name(layer, kind) for layer in range(plain.n_layers) for kind in ("resid_pre", "mlp_out", "resid_post")
    ]
    found, expected = capture(split, tokens, hooks), capture(plain, tokens, hooks)
    assert all(torch.equal(found[hook], expected[hook]) for hook in hooks)
    for ours, theirs in zip(next_logits(split, tokens), next_logits(plain, tokens), strict=True):
        assert not isinstance(ours, Tensor) or torch.equal(ours, theirs)
    check_padding(split)


@pytest.mark.parametrize("kind", ["mlp_out", "resid_post", "ln2_normalized"])
def test_what_is_put_in_it_arrives(pair: Pair, kind: Any) -> None:
    """And passes that begin in the middle leave the model as it was: its weights still come to their layers."""
    plain, split = pair
    hook, tokens = hook_name(plain.n_layers - 1, kind), probe_tokens(plain)
    check_hook(split, hook)
    expected = spliced_logits(plain, tokens, hook, lambda x: x * 0.5)
    assert torch.equal(spliced_logits(split, tokens, hook, lambda x: x * 0.5), expected)
    clean = clean_pass(split, tokens, hook)
    half = clean.value * 0.5
    assert resumes(split, hook)
    assert torch.equal(resumed_states(split, clean, half), spliced_states(split, clean, half))
    assert torch.equal(logits(split, tokens), logits(plain, tokens))


def test_what_is_read_off_its_weights(pair: Pair) -> None:
    plain, split = pair
    for ours, theirs in zip(unembedding(split), unembedding(plain), strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs
    for layer in range(plain.n_layers):
        a_NF = torch.zeros(1, place_of(plain, hook_name(layer, "mlp_post")).module.weight.numel() // plain.d_model)
        ours, theirs = (_norms(place_of(of, hook_name(layer, "mlp_post")).module, a_NF) for of in (split, plain))
        assert isinstance(ours, Tensor)
        assert isinstance(theirs, Tensor)
        assert torch.equal(ours, theirs)
    ours, theirs = (logit_lens(of, [1, 2, 3]) for of in (split, plain))
    assert all((ours[hook].ids == theirs[hook].ids).all() for hook in theirs)


def test_its_mlps_can_be_replaced(pair: Pair) -> None:
    plain, _ = pair
    tokens, found = probe_tokens(plain), []
    for model in pair:
        with mlps_replaced(model, {layer: lambda x: x.roll(1, 1) for layer in range(model.n_layers)}, tokens > 0):
            found.append(logits(model, tokens))
    assert torch.equal(*found)
    assert not torch.equal(found[0], logits(plain, tokens))


def test_a_harvest_and_an_evaluation_of_it(
    checkpoints: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same store, to the last bit, and the same figures."""
    stores, figures = [], []
    for name in ("plain", "split"):
        if name == "split":
            monkeypatch.setattr("saebench.harvest.run.load_model", half_on_disk)
            monkeypatch.setattr("saebench.store.source.load_model", half_on_disk)
        device = "all" if name == "split" else "cpu"
        made = harvest(harvest_config(checkpoints["llama"], tmp_path / name, device=device, tokens=1500), text(corpus))
        assert made is not None
        stores.append(made)
        save(an_sae("topk", made), tmp_path / f"run-{name}", "topk", made)
        (folder,) = evaluate(
            EvalConfig(run=tmp_path / f"run-{name}", device=device, tokens=300, dead_rows=300, resamples=5)
        )
        figures.append(read_json(folder / "evaluation.json"))
        assert figures[-1].pop("store") == str(made.folder)
    assert stores[0].hash == stores[1].hash
    assert figures[0] == figures[1]


def test_all_is_for_models_alone(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = pytest.raises(
        ValueError, match="device 'all' is for the model of harvest, eval and explain alone; expected .*cpu"
    )
    with refused:
        choose_device("all")
    with refused:
        train(TrainConfig(store=store.folder, k=(4,), device="all", out=tmp_path / "run"))
    with refused:
        run(RunConfig(device="all", out=tmp_path / "run"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="device is 'all' in 2 processes of one machine.*torchrun --nproc-per-node 1"):
        World(0, 2).device("all")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert World(0, 2).device("all") == "all"


def test_a_model_that_is_too_large_is_told_so() -> None:
    class Large(torch.nn.Linear):
        def to(self, *args: Any, **kwargs: Any) -> Any:
            raise torch.OutOfMemoryError

    with pytest.raises(ValueError, match="model 'm' takes 0.0 GB and cuda has less: use --device all"):
        placed(Large(8, 8), "m", "cuda")


def test_all_that_a_pass_gives_is_on_one_device() -> None:
    """Of a model over two that differ, where torch says what would be where."""
    script = Path(__file__).with_name("two_devices.py")
    made = subprocess.run([sys.executable, "-W", "ignore", str(script)], capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    lines = made.stdout.splitlines()
    assert len(lines) == 7 + 2 * 6 * 3
    assert [line for line in lines if not line.endswith(" two:0")] == []

"""Every family of docs/models.md on a tiny checkpoint: loading, and what is tried of a loaded model. All stages, for some or for all.

SAEBENCH_FAMILIES=all runs all stages for all of them (`make families`).
"""

import os
import socket
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from families import BESIDE, FAMILIES, NO_NORM, PAGE, REFUSED, VOCABULARY, WIDTH, make, page
from transformers import PreTrainedTokenizerFast

from saebench.evaluate import EvalConfig, evaluate
from saebench.files import read_json
from saebench.harvest import HarvestConfig, harvest
from saebench.index import IndexConfig, build_index, open_feature_index
from saebench.index.search import features_for_text
from saebench.models import (
    LanguageModel,
    capture,
    check_hook,
    check_padding,
    edits,
    head,
    hook_name,
    last_states,
    load_model,
    logit_lens,
    logits,
    mlps_replaced,
    next_logits,
    next_tokens,
    repeated,
    spliced_logits,
    unembedding,
    widths_of,
)
from saebench.steer import Sampling, arms_of, generate, open_bench
from saebench.text import TextConfig
from saebench.train import TrainConfig, train

TOKENS = torch.randint(1, 300, (2, 10), generator=torch.Generator().manual_seed(0))
SOME = ("gpt2", "gemma3", "qwen3_next", "opt", "granite", "mamba")
STAGED = tuple(FAMILIES) if os.environ.get("SAEBENCH_FAMILIES") == "all" else SOME
AFTER = ("mamba", "mamba2", "falcon_mamba", "rwkv")
"""whose hidden states in transformers are those behind each layer"""
SLOPPY = ("bamba",)
"""whose cached passes differ from whole ones by more than rounding, in transformers itself"""


def test_the_documentation_lists_what_is_tested() -> None:
    assert PAGE.read_text() == page()  # python tests/families.py
    assert len(FAMILIES) >= 30


@pytest.fixture(scope="module", params=FAMILIES)
def named(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> tuple[str, LanguageModel]:
    path = make(request.param, tmp_path_factory.mktemp("family"), tokenizer)
    return request.param, load_model(str(path), device="cpu", dtype="float32")


def test_what_is_tried_of_a_loaded_model(named: tuple[str, LanguageModel]) -> None:
    name, model = named
    family = FAMILIES[name]
    assert (model.d_model, model.n_vocab) == (WIDTH, VOCABULARY)
    post = [hook_name(layer) for layer in range(model.n_layers)]
    pre = [hook_name(layer, "resid_pre") for layer in range(model.n_layers)]
    got = capture(model, TOKENS, [*post, *pre])
    with torch.inference_mode():
        want = model.module(TOKENS, use_cache=False, output_hidden_states=True)
    # The streams of Hugging Face, but for the last one, which comes after the final norm.
    for layer, hook in enumerate(post[:-1] if name in AFTER else pre):
        torch.testing.assert_close(got[hook], want.hidden_states[layer], rtol=1e-5, atol=1e-5)
    for layer in range(1, model.n_layers):
        assert torch.equal(got[pre[layer]], got[post[layer - 1]])
    made = head(model, last_states(model, TOKENS).flatten(0, 1)).view_as(want.logits)
    torch.testing.assert_close(made, want.logits, rtol=1e-3, atol=1e-3)
    tokens = torch.from_numpy(model.pieces.known(VOCABULARY)).nonzero()[:, 0]
    told, said = next_tokens(model, TOKENS[0].tolist(), 4), want.logits[0, 4, tokens].softmax(-1).topk(10)
    np.testing.assert_allclose(told.probabilities, said.values.numpy(), rtol=1e-3)
    lens = logit_lens(model, TOKENS[0].tolist(), 4, top=10)
    assert list(lens) == [pre[0], *post]
    np.testing.assert_allclose(lens[post[-1]].probabilities, told.probabilities, rtol=1e-3)
    for hook in (*post, *pre):
        check_hook(model, hook)
    if family.logits:
        found = unembedding(model)
        assert found.scale == {"cohere": 0.25, "cohere2": 0.25, "granite": 0.25, "granitemoe": 0.25}.get(name, 1.0)
    else:
        with pytest.raises(
            ValueError, match=r"the logit effects of model .* are not known: .*; index with --no-logits"
        ):
            unembedding(model)


MISSING = {"attn_out": ("none", "attention", "attention alone"), "mlp_out": ("none", "attention alone")}


def fault(model: LanguageModel, hook: str) -> str:
    try:
        check_hook(model, hook)
    except ValueError as error:
        return str(error)
    return ""


def test_attention_and_mlp_are_what_they_add_to_the_stream(named: tuple[str, LanguageModel]) -> None:
    """Where they can be had; elsewhere they are refused by name, and never silently something else."""
    name, model = named
    parts = FAMILIES[name].parts
    taken = 0
    for layer in range(model.n_layers):
        for kind in ("attn_out", "mlp_out"):
            if refused := fault(model, hook_name(layer, kind)):
                assert hook_name(layer, kind) in refused
                assert "\n" not in refused
                assert parts in MISSING[kind]
                assert kind != "mlp_out" or fault(model, hook_name(layer, "mlp_in"))
                continue
            taken += 1
            if kind == "mlp_out":
                check_mlp(model, layer)
            value = capture(model, TOKENS, [hook_name(layer, kind)])[hook_name(layer, kind)]
            assert value.shape == (*TOKENS.shape, WIDTH)
            before, after = (hook_name(layer, "resid_pre"), hook_name(layer))
            zero = spliced_logits(model, TOKENS, hook_name(layer, kind), torch.zeros_like)
            with torch.inference_mode():
                assert not torch.allclose(zero, logits(model, TOKENS))
            if kind == "mlp_out" and parts == "all" and name != "falcon_h1":  # which has a mixer beside its attention
                names = [before, hook_name(layer, "attn_out"), hook_name(layer, kind), after]
                streams = capture(model, TOKENS, names)
                total = sum(streams[part] for part in names[:3])
                torch.testing.assert_close(total, streams[after], rtol=1e-3, atol=1e-3)
    assert (taken == 0) == (parts == "none")
    if parts == "all":
        assert taken == 2 * model.n_layers


def check_mlp(model: LanguageModel, layer: int) -> None:
    """What a layer's MLP writes follows from what it reads: given another context's, it writes what it wrote there."""
    read, written = hook_name(layer, "mlp_in"), hook_name(layer, "mlp_out")
    check_hook(model, read)
    clean = capture(model, TOKENS, [read, written])
    other = clean[read].flip(0)
    with edits(model, {read: lambda value: other})():
        found = capture(model, TOKENS, [written])[written]
    torch.testing.assert_close(found, clean[written].flip(0), rtol=1e-4, atol=1e-4)
    neurons = hook_name(layer, "mlp_post")
    if fault(model, neurons):
        return  # a mixture of experts, or no one last map
    values = capture(model, TOKENS, [neurons])[neurons]
    with edits(model, {neurons: lambda value: values.flip(0)})():
        found = capture(model, TOKENS, [written])[written]
    torch.testing.assert_close(found, clean[written].flip(0), rtol=1e-4, atol=1e-4)


def test_what_lies_between_attention_and_mlp_is_had_or_refused_by_name(named: tuple[str, LanguageModel]) -> None:
    """In layer 1, where hybrids have their attention."""
    name, model = named
    none = FAMILIES[name].parts == "none"
    z, middle, normalized = (hook_name(1, kind) for kind in ("attn_z", "resid_mid", "ln2_normalized"))
    for hook, missing in ((z, none), (middle, none or name in BESIDE), (normalized, none or name in NO_NORM)):
        refused = fault(model, hook)
        assert bool(refused) == missing, refused
        assert "\n" not in refused
    if none:
        return
    pre, attention, mlp, post = (hook_name(1, kind) for kind in ("resid_pre", "attn_out", "mlp_out", "resid_post"))
    got = capture(model, TOKENS, [z, pre, attention, post])
    assert got[z].shape == (*TOKENS.shape, widths_of(model, [z])[z])
    # Attention writes what it makes of z, at each position.
    with edits(model, {z: lambda value: value.flip(0)})():
        made = capture(model, TOKENS, [attention])[attention]
    torch.testing.assert_close(made, got[attention].flip(0), rtol=1e-4, atol=1e-4)
    if name not in BESIDE:
        seen = capture(model, TOKENS, [middle])[middle]
        torch.testing.assert_close(seen, got[pre] + got[attention], rtol=1e-5, atol=1e-5)
        if FAMILIES[name].parts != "attention alone":
            torch.testing.assert_close(seen + capture(model, TOKENS, [mlp])[mlp], got[post], rtol=1e-3, atol=1e-3)
    if name not in NO_NORM:
        squares = capture(model, TOKENS, [normalized])[normalized].square().mean(2)
        torch.testing.assert_close(squares, torch.ones_like(squares), rtol=2e-2, atol=0)


MLPS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "opt": lambda block, x_ND: block.fc2.forward(block.activation_fn(block.fc1.forward(x_ND))),
    "bloom": lambda block, x_ND: block.mlp.dense_4h_to_h.forward(block.mlp.gelu_impl(block.mlp.dense_h_to_4h(x_ND))),
    "granite": lambda block, x_ND: 0.5 * block.mlp.forward(x_ND),
    "mixtral": lambda block, x_ND: block.mlp.forward(x_ND[None])[0],
    "glm4": lambda block, x_ND: block.post_mlp_layernorm.forward(block.mlp.forward(x_ND)),
}
"""From what an MLP reads to what it adds to the stream, where that takes more than calling it."""


@pytest.mark.parametrize("name", MLPS)
def test_mlps_that_are_replaced_by_themselves_change_nothing(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = load_model(str(make(name, tmp_path, tokenizer)), device="cpu", dtype="float32")
    functions = {layer: partial(MLPS[name], block) for layer, block in enumerate(model.blocks)}
    with torch.inference_mode():
        want = logits(model, TOKENS)
        with mlps_replaced(model, functions, TOKENS % 3 != 0):
            found = logits(model, TOKENS)
        with mlps_replaced(model, {1: torch.zeros_like}, TOKENS % 3 != 0):
            other = logits(model, TOKENS)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(other, want, rtol=1e-2)


def test_texts_go_on_from_a_cache(named: tuple[str, LanguageModel]) -> None:
    name, model = named
    _, cache = next_logits(model, TOKENS)
    with torch.inference_mode():
        whole = logits(model, TOKENS)
    torch.testing.assert_close(next_logits(model, TOKENS, keep=3)[0], whole[:, -3:], rtol=1e-3, atol=1e-3)
    if cache is not None and name not in SLOPPY:
        cache = repeated(cache, 2)
        tokens = TOKENS.repeat_interleave(2, 0)
        if cache is None:  # recurrent states are made again
            _, cache = next_logits(model, tokens)
        more = torch.cat([tokens, torch.arange(7, 11)[:, None]], 1)
        got, _ = next_logits(model, more[:, -1:], cache=cache, seen=TOKENS.shape[1])
        with torch.inference_mode():
            torch.testing.assert_close(got, logits(model, more)[:, -1:], rtol=1e-3, atol=1e-3)
    if FAMILIES[name].lengths:
        check_padding(model)
    else:
        with pytest.raises(ValueError, match="cannot be given texts of different lengths at once"):
            check_padding(model)


@pytest.mark.parametrize("name", REFUSED)
def test_what_reads_from_both_sides_is_refused_in_one_line(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match=r"is no decoder of text from left to right") as error:
        load_model(str(make(name, tmp_path, tokenizer)))
    assert "\n" not in str(error.value)
    assert "StoreWriter" in str(error.value)  # what can be done instead


def test_loading_from_a_folder_starts_and_fetches_nothing(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Of a multimodal checkpoint, for which a library would like to install another one; and it says nothing either."""
    path = make("gemma3", tmp_path, tokenizer)
    capfd.readouterr()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a process or a connection was begun")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    monkeypatch.setattr(os, "posix_spawn", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    model = load_model(str(path), device="cpu")
    check_hook(model, hook_name(1, "mlp_out"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", STAGED)
def test_all_stages(name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, corpus: Path) -> None:
    path, run = make(name, tmp_path, tokenizer), tmp_path / "run"
    kinds = ("resid_post", "mlp_out") if FAMILIES[name].parts == "all" else ("resid_post",)
    store = harvest(
        HarvestConfig(
            model=str(path), layers=(1,), kinds=kinds, tokens=2_000, context=16, shard_contexts=64, batch=16,
            dtype="float32", device="cpu", out=tmp_path / "store",
        ),
        TextConfig(dataset=str(corpus), validation_fraction=0.3),
    )  # fmt: skip
    assert store
    folders = train(
        TrainConfig(
            store=store.folder,
            hook=tuple(store.hooks),
            out=run,
            k=(4,),
            d_sae=(64,),
            tokens=8_000,
            batch=256,
            device="cpu",
        )
    )
    assert folders
    assert len(folders) == len(kinds)
    evaluate(EvalConfig(run=run, tokens=400, dead_rows=1_000, resamples=20, device="cpu"))
    for folder in folders:
        metrics = read_json(folder / "evaluation.json")["metrics"]
        assert 0 < metrics["fvu"] < 1.5
        assert np.isfinite(metrics["delta_ce"])
    sae = next(folder for folder in folders if "mlp_out" not in folder.name)
    index = build_index(IndexConfig(sae=sae, tokens=2_000, sample=500, logits=FAMILIES[name].logits, device="cpu"))
    assert index
    bench = open_bench(sae, device="cpu")
    assert bench.index
    found = features_for_text(bench.model, bench.sae, bench.index, "the red cat runs", rank="attribution")
    assert found.firings
    latent = found.firings[0].latent
    made = generate(
        bench.model, "the cat", arms_of([bench.intervention(latent, "2n")]), Sampling(max_new_tokens=4, n_samples=2)
    )
    assert len(made.texts) == 8
    assert all(np.isfinite(text.kl).all() for text in made.texts)
    assert any(text.kl.max() > 0 for text in made.of("steered"))
    with open_feature_index(index) as opened:
        assert (opened.top_logits is not None) == FAMILIES[name].logits

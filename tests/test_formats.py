"""Dictionaries of others: each format's fixture was saved, and its outputs recorded, by its own package or as its code has it.

scripts/make_foreign_fixtures.py made them, and says which is which.
"""

import json
import re
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import HOOK, an_sae
from safetensors.torch import load_file, save_file

from saebench.evaluate import EvalConfig, evaluate
from saebench.files import read_json
from saebench.index import IndexConfig, build_index, open_feature_index
from saebench.sae import (
    SAE,
    TopKSAE,
    ends_of,
    load_sae,
    read_config,
    save_sae,
    take_in,
    update_metadata,
    weights_of,
    written_here,
)
from saebench.sae.formats import FORMATS, found
from saebench.steer import open_bench
from saebench.store import Store

FOREIGN = Path(__file__).parent / "fixtures" / "foreign"
EXPECTED = load_file(FOREIGN / "expected.safetensors") | load_file(FOREIGN / "circuit-tracer/expected.safetensors")
X = EXPECTED["x"]
NAMES = sorted(name.removesuffix(" acts") for name in EXPECTED if name.endswith(" acts"))
COMBINATIONS = list(
    product(
        ("standard", "gated", "topk", "jumprelu", "batchtopk"),
        (True, False),
        ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm"),
        (True, False),
    )
)

GPT2, LLAMA = "gpt2", "meta-llama/Llama-3.1-8B"
GEMMA, GEMMA_2 = "google/gemma-2-2b", "google/gemma-3-1b-pt"
PYTHIA, SMOLLM = "EleutherAI/pythia-70m-deduped", "HuggingFaceTB/SmolLM2-135M"
# What each says of itself: format, model, hook read, hook written where that is another, context, L0 stated.
SAID: dict[str, tuple[Any, ...]] = {
    **{f"saelens/{kind}transcoder": ("SAELens", GPT2, "blocks.5.mlp.hook_in", "blocks.5.hook_mlp_out", 128, None)
       for kind in ("", "skip_", "jumprelu_", "jumprelu_skip_")},
    "saelens/hook_z": ("SAELens", GPT2, "blocks.5.attn.hook_z", None, None, None),
    "saelens/before_6_relu": ("SAELens", GPT2, "blocks.5.hook_resid_pre", None, 128, None),
    "saelens/before_6_topk": ("SAELens", GPT2, "blocks.5.hook_resid_pre", None, 128, None),
    **{f"dictionary_learning/{name}": ("dictionary_learning", PYTHIA, "blocks.3.hook_resid_post", None, 64, l0)
       for name, l0 in (("AutoEncoder", None), ("AutoEncoderNew", None), ("GatedAutoEncoder", None), ("AutoEncoderTopK", 3),
                        ("BatchTopKSAE", 3), ("MatryoshkaBatchTopKSAE", 3), ("JumpReluAutoEncoder", 4.0))},
    "sparsify/layers.5": ("sparsify", SMOLLM, "blocks.5.hook_resid_post", None, 2048, 3),
    "sparsify/layers.6.mlp": ("sparsify", SMOLLM, "blocks.6.mlp.hook_in", "blocks.6.hook_mlp_out", 2048, 3),
    "sparsify/layers.7.mlp": ("sparsify", SMOLLM, "blocks.7.mlp.hook_in", "blocks.7.hook_mlp_out", 2048, 3),
    "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82": ("Gemma Scope", GEMMA, "blocks.12.hook_resid_post", None, None, 82),
    "gemma-scope-2b-pt-transcoders/layer_7/width_16k/average_l0_5": (
        "Gemma Scope", GEMMA, "blocks.7.ln2.hook_normalized", "blocks.7.hook_mlp_out", None, 5),
    "gemma-scope-2-1b-pt/resid_post_all/layer_13_width_16k_l0_small": (
        "Gemma Scope 2", GEMMA_2, "blocks.13.hook_resid_post", None, None, 20),
    "gemma-scope-2-1b-pt/transcoder_all/layer_5_width_16k_l0_big_affine": (
        "Gemma Scope 2", GEMMA_2, "blocks.5.mlp.hook_in", "blocks.5.hook_mlp_out", None, None),
    "Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L19R-8x": ("Llama Scope", LLAMA, "blocks.19.hook_resid_post", None, None, None),
    "Llama3_1-8B-Base-LXTC-8x/Llama3_1-8B-Base-L8TC-8x": (
        "Llama Scope", LLAMA, "blocks.8.ln2.hook_normalized", "blocks.8.hook_mlp_out", None, None),
    **{f"llamascopium/{name}": ("Llamascopium", None, "blocks.4.hook_resid_post", None, None, None)
       for name in ("jumprelu", "jumprelu_pre", "token_wise")},
    "llamascopium/topk_transcoder": ("Llamascopium", None, "blocks.4.ln2.hook_normalized", "blocks.4.hook_mlp_out", None, 3),
    "gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt": ("OpenAI", GPT2, "blocks.8.hook_resid_post", None, None, 3),
    "gpt2-small/resid_delta_mlp/autoencoders/2.pt": ("OpenAI", GPT2, "blocks.2.hook_mlp_out", None, None, None),
    "Llama-3.1-8B-Instruct-SAE-l19.pth": ("Goodfire", f"{LLAMA}-Instruct", "blocks.19.hook_resid_post", None, None, None),
    "SAE-Res-Qwen3-1.7B-Base-W32K-L0_3/layer11.sae.pt": (
        "Qwen-Scope", "Qwen/Qwen3-1.7B-Base", "blocks.11.hook_resid_post", None, None, 3),
    **{f"circuit-tracer/{name}_{layer}.safetensors": (
        "circuit-tracer", model, f"blocks.{layer}.{read}", tuple(f"blocks.{at}.hook_mlp_out" for at in (layer, last)[: last - layer + 1]), None, None)
       for name, model, read in (("relu/layer", "Qwen/Qwen3-1.7B", "mlp.hook_in"), ("jumprelu_skip/layer", GEMMA, "ln2.hook_normalized"),
                                 ("clt/W_enc", "meta-llama/Llama-3.2-1B", "hook_resid_mid"))
       for layer in (0, 1) for last in ([1] if "clt" in name else [layer])},
}  # fmt: skip


def copied(name: str, tmp_path: Path) -> Path:
    source, copy = FOREIGN / name, tmp_path / name
    if name.startswith("circuit-tracer/"):  # what a layer's file is, the set says
        return Path(shutil.copytree(source.parent, copy.parent), source.name)
    copy.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy))


def changed(folder: Path, file: str = "cfg.json", **change: Any) -> Path:
    """With other fields in a configuration; of those called `of__field`, in the part `of`."""
    said = json.loads((folder / file).read_text())
    for name, value in change.items():
        part, _, field = name.rpartition("__")
        (said[part] if part else said)[field] = value
    (folder / file).write_text(json.dumps(said))
    return folder


def assert_as_recorded(sae: SAE, acts: torch.Tensor, written: torch.Tensor) -> None:
    out = sae(X)
    assert torch.allclose(out.acts, acts, atol=1e-5, rtol=1e-5)
    assert torch.allclose(out.x_hat, written, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_activations_and_what_is_written_are_those_of_its_own_package(name: str) -> None:
    assert_as_recorded(load_sae(FOREIGN / name), EXPECTED[f"{name} acts"], EXPECTED[f"{name} written"])


@pytest.mark.parametrize("name", NAMES)
def test_format_model_hooks_and_k_are_read_from_fields_and_paths(name: str) -> None:
    config = read_config(FOREIGN / name)
    metadata = config["metadata"]
    ends = ends_of(FOREIGN / name, config)
    format, model, read, written, context, l0 = SAID[name]
    assert found(FOREIGN / name)[0].name == format
    assert (metadata.get("model_name"), metadata.get("context_size"), metadata.get("stated_l0")) == (model, context, l0)
    assert ends == ((read,), written if isinstance(written, tuple) else (written or read,))
    assert ("k" in config) == (
        ("TopK" in name and "Batch" not in name) or any(part in name for part in ("topk", "layers", "8.pt", "L0_3"))
    )


@pytest.mark.parametrize(("place", "combination"), list(enumerate(COMBINATIONS)))
def test_every_combination_of_saelens_flags_is_as_in_saelens_or_refused(
    place: int, combination: tuple[str, bool, str, bool], tmp_path: Path
) -> None:
    kind, pre_bias, normalize, rescale = combination
    folder = changed(
        copied(f"saelens/{kind}", tmp_path),
        apply_b_dec_to_input=pre_bias, normalize_activations=normalize, rescale_acts_by_decoder_norm=rescale,
    )  # fmt: skip
    if rescale and kind != "topk":
        with pytest.raises(ValueError, match=r"rescale_acts_by_decoder_norm: True of '(standard|gated|jumprelu)'"):
            load_sae(folder)
        return
    recorded = load_file(FOREIGN / "saelens" / "combinations.safetensors")
    assert_as_recorded(load_sae(folder), recorded["acts"][place], recorded["written"][place])


# What SAELens says of an SAE


def older(tmp_path: Path, **change: Any) -> Path:
    return changed(copied("saelens/before_6_relu", tmp_path), **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_fn_str": "tanh-relu"}, "says activation_fn: 'tanh-relu'; an SAE can be read where it is 'relu' or 'topk'"),
        ({"activation_fn_str": "topk"}, "cfg.json lacks k; it is not the configuration of an SAE"),
        ({"activation_fn_str": "topk", "architecture": "gated"}, "says activation_fn: 'topk' of 'gated'; expected it of standard"),
        ({"activation_fn_kwargs": {"temperature": 2}}, "says temperature: 2, which is not known here and may change what the SAE is"),
        ({"finetuning_scaling_factor": True}, "says finetuning_scaling_factor: True"),
        ({"hook_head_index": 3}, "says hook_head_index: 3"),
        ({"is_transcoder": True}, "says is_transcoder: True"),
        ({"model_kwargs": {"layer_norm": 0}}, "says model_kwargs: {'layer_norm': 0}, which is not known here"),
        ({"reshape_activations": "hook_z"}, "says reshape_activations: 'hook_z', and reads blocks.5.hook_resid_pre"),
        ({"normalize_activations": "covariance_whitening"}, "normalises its inputs by 'covariance_whitening'"),
        ({"model_from_pretrained_kwargs": {"checkpoint_index": 7}}, "model_from_pretrained_kwargs.checkpoint_index: 7, of which the model has other"),
        ({"hook_name": "blocks.5.attn.hook_z", "model_from_pretrained_kwargs": {"fold_value_biases": True}}, "kwargs.fold_value_biases: True"),
        ({"hook_name": "blocks.5.mlp.hook_in", "model_from_pretrained_kwargs": {"fold_ln": True}}, "kwargs.fold_ln: True"),
        ({"model_name": "mine", "model_from_pretrained_kwargs": {"center_writing_weights": True}}, "center_writing_weights of 'mine'"),
        (
            {"normalize_activations": "constant_norm_rescale", "model_from_pretrained_kwargs": {"center_writing_weights": True}},
            "says normalize_activations: 'constant_norm_rescale'",
        ),
    ],
)  # fmt: skip
def test_what_an_old_configuration_says_is_used_or_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = older(tmp_path, **change)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_sae(folder)


def test_an_unknown_field_that_says_something_is_refused_by_name(tmp_path: Path) -> None:
    folder = copied("saelens/standard", tmp_path)
    for change, message in (
        ({"bias_scale": 0.5}, "says bias_scale: 0.5, which is not known here"),
        ({"metadata__mixing": "half"}, "says mixing: 'half', which is not known here"),
        ({"metadata__hook_head_index": 0}, "says hook_head_index: 0"),
    ):
        with pytest.raises(ValueError, match=message):
            load_sae(changed(Path(shutil.copytree(folder, tmp_path / next(iter(change)))), **change))
    load_sae(changed(folder, noise=None, metadata__mixing={}))  # says nothing


def test_what_changes_nothing_of_the_stream_is_taken(tmp_path: Path) -> None:
    recorded = EXPECTED["saelens/before_6_relu acts"], EXPECTED["saelens/before_6_relu written"]
    folder = older(tmp_path, model_from_pretrained_kwargs={"fold_ln": True, "n_devices": 2, "center_unembed": True})
    assert_as_recorded(load_sae(folder), *recorded)
    # TransformerLens centres nothing where norms are RMSNorm.
    folder = changed(folder, model_name="gemma-2b", model_from_pretrained_kwargs={"center_writing_weights": True})
    assert_as_recorded(load_sae(folder), *recorded)


def test_an_sae_exact_on_a_centred_stream_is_exact_on_the_plain_one(tmp_path: Path) -> None:
    folder = older(tmp_path, d_sae=12, model_from_pretrained_kwargs={"center_writing_weights": True})
    both = torch.cat([torch.eye(6), -torch.eye(6)], dim=1)  # x = ReLU(x) - ReLU(-x)
    tensors = {"W_enc": both, "W_dec": both.T, "b_enc": torch.zeros(12), "b_dec": torch.ones(6)}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "sae_weights.safetensors")
    sae = load_sae(folder)
    assert torch.allclose(sae(X).x_hat, X, atol=1e-6)
    centred = X - X.mean(1, keepdim=True)
    assert torch.allclose(sae(X).acts, sae(centred).acts, atol=1e-6)
    assert torch.allclose(sae.encode(X), torch.relu((centred - 1) @ both), atol=1e-6)
    save_sae(sae, tmp_path / "ours", read_config(folder)["metadata"] | {"model_from_pretrained_kwargs": None})
    assert torch.equal(load_sae(tmp_path / "ours")(X).x_hat, sae(X).x_hat)


def test_what_a_list_of_releases_says_takes_the_place_of_a_configurations_own() -> None:
    folder, scale = FOREIGN / "saelens" / "standard", 0.25
    plain = load_sae(folder)
    told = load_sae(folder, said={"normalize_activations": "expected_average_only_in", "norm_scaling_factor": scale})
    out, of_scaled = told(X), plain(X * scale)
    assert torch.allclose(out.acts, of_scaled.acts, atol=1e-6)
    assert torch.allclose(out.x_hat * scale, of_scaled.x_hat, atol=1e-6)
    centred = load_sae(folder, said={"model_from_pretrained_kwargs": {"center_writing_weights": True}})
    assert torch.allclose(centred(X).acts, plain(X - X.mean(1, keepdim=True)).acts, atol=1e-6)


# Of the other formats


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        ("dictionary_learning/BatchTopKSAE", "config.json", {"trainer__dict_class": "CrossCoder"}, "has dict_class 'CrossCoder'; expected one of AutoEncoder, "),
        ("dictionary_learning/BatchTopKSAE", "config.json", {"trainer__k": 7}, "holds k 3, and config.json beside it says 7"),
        ("dictionary_learning/BatchTopKSAE", "config.json", {"trainer__dict_class": "AutoEncoder"}, "lacks bias; it does not hold the weights"),
        ("dictionary_learning/AutoEncoder", "config.json", {"trainer__scale": 2}, "says scale: 2, which is not known here"),
        ("dictionary_learning/AutoEncoder", "config.json", {"buffer__io": "in_and_out"}, "says io: 'in_and_out'"),
        ("dictionary_learning/AutoEncoder", "config.json", {"trainer__dict_size": 11}, "does not hold the weights of this SAE"),
        ("sparsify/layers.5", "cfg.json", {"activation": "groupmax"}, "says activation: 'groupmax'; an SAE can be read where it is 'topk'"),
        ("sparsify/layers.5", "cfg.json", {"signed": True}, "says signed: True"),
        ("sparsify/layers.5", "cfg.json", {"skip_connection": True}, "says skip_connection: True of what writes what it reads"),
        ("sparsify/layers.5", "cfg.json", {"jumprelu": True}, "says jumprelu: True, which is not known here"),
        ("sparsify/layers.5", "cfg.json", {"k": 11}, "k is 11; expected 1 to d_sae = 10"),
        ("gemma-scope-2-1b-pt/resid_post_all/layer_13_width_16k_l0_small", "config.json", {"type": "crosscoder"}, "says type: 'crosscoder'"),
        ("gemma-scope-2-1b-pt/resid_post_all/layer_13_width_16k_l0_small", "config.json", {"architecture": "topk"}, "says architecture: 'topk'"),
        ("Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L19R-8x", "hyperparams.json", {"act_fn": "topk"}, "says act_fn: 'topk'"),
        ("Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L19R-8x", "hyperparams.json", {"apply_decoder_bias_to_pre_encoder": True}, "pre_encoder: True"),
        ("Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L19R-8x", "hyperparams.json", {"norm_activation": "token-wise"}, "norm_activation: 'token-wise'"),
        ("llamascopium/jumprelu", "config.json", {"act_fn": "batchtopk"}, "says act_fn: 'batchtopk'"),
        ("llamascopium/jumprelu", "config.json", {"norm_activation": "batch-wise"}, "says norm_activation: 'batch-wise'"),
        ("llamascopium/jumprelu", "config.json", {"use_glu_encoder": True}, "says use_glu_encoder: True"),
        ("llamascopium/jumprelu", "config.json", {"sae_type": "clt"}, "says sae_type: 'clt'"),
        ("llamascopium/token_wise", "config.json", {"act_fn": "jumprelu"}, "lacks activation_function.log_jumprelu_threshold"),
    ],
)  # fmt: skip
def test_what_makes_another_sae_of_it_is_refused_by_name(
    name: str, file: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = changed(copied(name, tmp_path), file, **change)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_sae(folder)


def test_the_threshold_that_was_never_set_is_plain_relu(tmp_path: Path) -> None:
    folder = copied("dictionary_learning/BatchTopKSAE", tmp_path)
    held = torch.load(folder / "ae.pt", weights_only=True)
    torch.save(held | {"threshold": torch.tensor(-1.0)}, folder / "ae.pt")
    sae = load_sae(folder)
    assert torch.equal(sae(X).acts, torch.relu(sae(X).pre))


def test_decoder_rows_of_a_topk_keep_their_norms() -> None:
    for name in (
        "dictionary_learning/AutoEncoderTopK",
        "sparsify/layers.5",
        "gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt",
    ):
        assert load_sae(FOREIGN / name).W_dec.norm(dim=1).std() > 0.1


def test_what_a_module_puts_out_is_no_hooks_where_another_norm_follows(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(FOREIGN / "sparsify" / "layers.5", run / "layers.5.mlp")
    (run / "config.json").write_text(json.dumps({"model": "google/gemma-2-2b"}))
    assert "hook_name" not in read_config(run / "layers.5.mlp")["metadata"]
    (run / "config.json").write_text(json.dumps({"model": "Qwen/Qwen3-0.6B"}))
    assert read_config(run / "layers.5.mlp")["metadata"]["hook_name"] == "blocks.5.hook_mlp_out"


def test_the_repository_is_found_in_a_hubs_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--google--gemma-scope-9b-it-att" / "snapshots" / "0f1e"
    source = FOREIGN / "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82"
    blob = Path(shutil.copy(source / "params.npz", tmp_path / "blob"))
    folder = snapshot / "layer_9/width_16k/average_l0_13"
    folder.mkdir(parents=True)
    (folder / "params.npz").symlink_to(blob)
    metadata = read_config(folder)["metadata"]
    assert metadata == {"hook_name": "blocks.9.attn.hook_z", "model_name": "google/gemma-2-9b-it", "stated_l0": 13}


# What is given, and what is not there


def test_hook_and_model_are_given_where_files_do_not_say(tmp_path: Path) -> None:
    nameless = Path(shutil.copy(FOREIGN / "Llama-3.1-8B-Instruct-SAE-l19.pth", tmp_path / "weights.pth"))
    with pytest.raises(ValueError, match="does not say which hook it reads: give it with --hook"):
        ends_of(nameless, read_config(nameless))
    config = read_config(nameless, hook="blocks.2.hook_resid_post", model="mine")
    assert config["metadata"] == {"hook_name": "blocks.2.hook_resid_post", "model_name": "mine"}
    named = FOREIGN / "Llama-3.1-8B-Instruct-SAE-l19.pth"
    with pytest.raises(
        ValueError, match="says hook_name 'blocks.19.hook_resid_post', and 'blocks.2.hook_resid_post' is given"
    ):
        read_config(named, hook="blocks.2.hook_resid_post")


def test_a_file_of_fixed_name_is_as_good_as_its_folder(tmp_path: Path) -> None:
    for name, file in (
        ("sparsify/layers.5", "sae.safetensors"),
        ("dictionary_learning/AutoEncoder", "ae.pt"),
        ("saelens/topk", "cfg.json"),
    ):
        assert read_config(FOREIGN / name / file) == read_config(FOREIGN / name)
    weights = FOREIGN / "Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L19R-8x/checkpoints/final.safetensors"
    assert found(weights)[0].name == "Llama Scope"


def test_unknown_folders_say_what_was_looked_for_and_what_lies_below(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no SAE; looked for ") as error:
        load_sae(tmp_path)
    assert all(format.holds in str(error.value) for format in FORMATS)
    with pytest.raises(ValueError, match="none is not there; expected the folder of an SAE, or its file"):
        load_sae(tmp_path / "none")
    copied("sparsify/layers.5", tmp_path)
    copied("sparsify/layers.6.mlp", tmp_path)
    with pytest.raises(
        ValueError, match=r"holds no SAE itself, but \S*/layers.5, \S*/layers.6.mlp; give the path of one"
    ):
        load_sae(tmp_path / "sparsify")


def test_several_files_in_a_folder_are_listed(tmp_path: Path) -> None:
    folder = copied("SAE-Res-Qwen3-1.7B-Base-W32K-L0_3/layer11.sae.pt", tmp_path).parent
    assert read_config(folder)["k"] == 3
    shutil.copy(folder / "layer11.sae.pt", folder / "layer2.sae.pt")
    with pytest.raises(ValueError, match=r"holds several SAEs; give the path of one: layer11.sae.pt, layer2.sae.pt"):
        load_sae(folder)
    assert read_config(folder / "layer2.sae.pt")["metadata"]["hook_name"] == "blocks.2.hook_resid_post"


def test_k_that_no_path_says_is_asked_for(tmp_path: Path) -> None:
    file = copied("SAE-Res-Qwen3-1.7B-Base-W32K-L0_3/layer11.sae.pt", tmp_path)
    with pytest.raises(ValueError, match="lies in no folder that says its k; expected one named as on the hub"):
        load_sae(shutil.copy(file, tmp_path / "layer11.sae.pt"))


class Opaque:
    """Something that a pickle can only hold by its class."""


@pytest.mark.parametrize(
    "held", [{"pre_bias": Opaque(), "latent_bias": Opaque()}, {"encoder.weight": torch.zeros(2, 2), "more": Opaque()}]
)
def test_a_pickle_of_more_than_weights_is_refused(held: dict[str, Any], tmp_path: Path) -> None:
    torch.save(held, tmp_path / "8.pt")
    with pytest.raises(
        ValueError,
        match=r"8.pt holds a \S*Opaque, and needs more than weights to be read \(torch.load with weights_only=True refuses it\)",
    ):
        load_sae(tmp_path / "8.pt")
    folder = copied("dictionary_learning/AutoEncoder", tmp_path)
    torch.save(held, folder / "ae.pt")
    with pytest.raises(ValueError, match=r"ae.pt holds a \S*Opaque, and needs more than weights to be read"):
        load_sae(folder)


@pytest.mark.parametrize("name", NAMES)
def test_truncated_weights_are_named(name: str, tmp_path: Path) -> None:
    copy = copied(name, tmp_path)
    weights = found(copy)[1]
    for kept in (-9, 40):
        weights.write_bytes(weights.read_bytes()[:kept])
        with pytest.raises(
            ValueError,
            match=f"{weights.name} does not hold the weights of this SAE",
        ):
            load_sae(copy)


def test_foreign_tensors_are_named(tmp_path: Path) -> None:
    folder = copied("sparsify/layers.5", tmp_path)
    held = load_file(folder / "sae.safetensors")
    save_file(held | {"W_gate": torch.zeros(3)}, folder / "sae.safetensors")
    with pytest.raises(ValueError, match="holds W_gate, too, which is not known here"):
        load_sae(folder)
    save_file({name: value for name, value in held.items() if name != "b_dec"}, folder / "sae.safetensors")
    with pytest.raises(ValueError, match="lacks b_dec; it does not hold the weights of this SAE"):
        load_sae(folder)
    save_file(held | {"W_dec": held["W_dec"].T.contiguous()}, folder / "sae.safetensors")
    with pytest.raises(ValueError, match="does not hold the weights of this SAE"):
        load_sae(folder)
    folder = copied("gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82", tmp_path)
    np.savez(folder / "params.npz", W_enc=np.zeros(3), b_enc=np.zeros(2))
    with pytest.raises(ValueError, match=r"has no matrix 'W_enc'; it has W_enc \[3\], b_enc \[2\]"):
        load_sae(folder)


def test_those_in_anothers_format_are_taken_into_a_run_once(tmp_path: Path) -> None:
    source, saes = FOREIGN / "dictionary_learning" / "GatedAutoEncoder", tmp_path / "run" / "saes"
    folder = take_in(source, saes, store=tmp_path / "store")
    assert folder == saes / "GatedAutoEncoder"
    assert_as_recorded(
        load_sae(folder),
        EXPECTED[f"dictionary_learning/{source.name} acts"],
        EXPECTED[f"dictionary_learning/{source.name} written"],
    )
    update_metadata(folder, l0=4.0)
    assert take_in(source, saes) == folder
    metadata = read_config(folder)["metadata"]
    assert (metadata["l0"], metadata["hook_name"], metadata["saebench"]) == (
        4.0,
        "blocks.3.hook_resid_post",
        {"store": str(tmp_path / "store")},
    )
    other = Path(
        shutil.copytree(FOREIGN / "dictionary_learning" / "AutoEncoder", tmp_path / "other" / "GatedAutoEncoder")
    )
    assert take_in(other, saes) == saes / "other-GatedAutoEncoder"
    assert not written_here(source)
    assert written_here(folder)
    assert written_here(FOREIGN / "saelens" / "topk")
    assert not written_here(FOREIGN / "saelens" / "before_6_topk")


# Through the commands


@pytest.fixture
def nameless(store: Store, tmp_path: Path) -> tuple[Path, Path]:
    """(an SAE of the store as saebench writes it, the same as dictionary_learning does, which does not say of which hook it is)."""
    sae = an_sae("topk", store)
    ours = tmp_path / "run" / "saes" / "ours"
    save_sae(
        sae, ours, {"model_name": "m", "hook_name": HOOK, "context_size": 16, "saebench": {"store": str(store.folder)}}
    )
    theirs = tmp_path / "elsewhere" / "trainer_0"
    theirs.mkdir(parents=True)
    names = {
        "encoder.weight": sae.W_enc.T,
        "encoder.bias": sae.b_enc,
        "decoder.weight": sae.W_dec.T,
        "b_dec": sae.b_dec,
    }
    held = {name: value.detach().contiguous() for name, value in names.items()}
    torch.save(held | {"k": torch.tensor(6), "threshold": torch.tensor(-1.0)}, theirs / "ae.pt")
    trainer = {"dict_class": "AutoEncoderTopK", "activation_dim": sae.d_in, "dict_size": sae.d_sae, "k": 6, "layer": 1}
    (theirs / "config.json").write_text(json.dumps({"trainer": trainer}))
    return ours, theirs


def test_figures_of_one_in_anothers_format_are_those_of_the_same_in_ours(
    nameless: tuple[Path, Path], store: Store
) -> None:
    ours, theirs = nameless
    before = sorted(theirs.iterdir())
    told: dict[str, Any] = {
        "run": ours.parent.parent,
        "sae": (theirs,),
        "store": store.folder,
        "tokens": 1000,
        "resamples": 10,
    }
    with pytest.raises(ValueError, match="trainer_0 does not say which hook it reads: give it with --hook"):
        evaluate(EvalConfig(**told))
    folders = evaluate(EvalConfig(**told, hook=HOOK))
    assert folders == [ours, ours.parent / "trainer_0"]
    first, second = (read_json(folder / "evaluation.json")["metrics"] for folder in folders)
    assert first == second
    assert first["fvu"] > 0
    assert evaluate(EvalConfig(**told, hook=HOOK)) == folders
    assert sorted(theirs.iterdir()) == before


def test_one_in_anothers_format_is_indexed_and_steered_with_as_it_lies(
    nameless: tuple[Path, Path], store: Store, tmp_path: Path
) -> None:
    ours, theirs = nameless
    told: dict[str, Any] = {"store": store.folder, "rules": False}
    with pytest.raises(
        ValueError,
        match="trainer_0 is another's, beside which nothing is written; give the file of its index with --out",
    ):
        build_index(IndexConfig(sae=theirs, hook=HOOK, **told))
    with pytest.raises(ValueError, match="trainer_0 does not say which hook it reads: give it with --hook"):
        build_index(IndexConfig(sae=theirs, out=tmp_path / "theirs.h5", **told))
    paths = [
        build_index(IndexConfig(sae=ours, **told)),
        build_index(IndexConfig(sae=theirs, hook=HOOK, out=tmp_path / "theirs.h5", **told)),
    ]
    first, second = (open_feature_index(path, sae=sae) for path, sae in zip(paths, nameless, strict=True) if path)
    assert np.array_equal(first.top_rows, second.top_rows)
    bench = open_bench(theirs, index=paths[1])
    assert bench.ends.reads == bench.ends.writes == (HOOK,)
    with pytest.raises(ValueError, match="trainer_0 does not say which hook it reads: give it with --hook"):
        open_bench(theirs)
    alone = open_bench(theirs, hook=HOOK, model=bench.model.id)
    assert alone.model.weights_hash == bench.model.weights_hash


def test_a_set_of_circuit_tracer_says_one_thing_in_its_configuration_and_its_tensors(tmp_path: Path) -> None:
    """Its loader takes what has thresholds for JumpReLU, whatever `activation` says: where they differ nothing is read."""

    def given(name: str, **change: Any) -> Path:
        path = copied(f"circuit-tracer/{name}", tmp_path / str(len(list(tmp_path.iterdir()))))
        source = path.with_name("config.yaml")
        source.write_text(yaml.dump(yaml.safe_load(source.read_text()) | change))
        return path

    for name, change, message in (
        ("jumprelu_skip/layer_0.safetensors", {"activation": "relu"}, "holds activation_function.threshold, too"),
        ("relu/layer_0.safetensors", {"activation": "jump_relu"}, "lacks activation_function.threshold"),
        ("relu/layer_0.safetensors", {"activation": "topk"}, "lacks k"),
        ("relu/layer_0.safetensors", {"model_name": "google/gemma-2-2b"}, "'mlp.hook_out', what the MLP of 'google/gemma-2-2b' puts out"),
        ("relu/layer_0.safetensors", {"model_kind": "cross_layer_transcoder"}, "of which layer_0.safetensors is no file"),
        ("relu/layer_0.safetensors", {"transcoders": ["hf://a/b/c"]}, "names of files that lie beside it"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load_sae(given(name, **change))
    assert isinstance(load_sae(given("relu/layer_0.safetensors", activation="topk", k=3)), TopKSAE)
    part = given("clt/W_enc_0.safetensors")
    assert [file.name for file in weights_of(part)] == [
        "W_enc_0.safetensors",
        "W_dec_0.safetensors",
    ]  # what an index knows it by
    assert [file.name for file in weights_of(given("relu/layer_0.safetensors"))] == ["layer_0.safetensors"]
    part.with_name("W_dec_0.safetensors").unlink()
    with pytest.raises(ValueError, match=r"W_dec_0\.safetensors does not hold the weights"):
        load_sae(part)

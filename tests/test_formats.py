"""Dictionaries of others: each format's fixture was saved, and its outputs recorded, by its own package or as its code has it.

scripts/make_foreign_fixtures.py made them, and says which is which.
"""

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from saebench.sae import SAE, ends_of, load_sae, read_config
from saebench.sae.formats import found

FOREIGN = Path(__file__).parent / "fixtures" / "foreign"
EXPECTED = load_file(FOREIGN / "expected.safetensors")
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
}  # fmt: skip


def copied(name: str, tmp_path: Path) -> Path:
    source, copy = FOREIGN / name, tmp_path / name
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
    assert ends == ((read,), (written or read,))
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

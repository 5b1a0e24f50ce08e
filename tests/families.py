"""A tiny checkpoint of every family that docs/models.md lists: an ordinary configuration with small numbers, random weights.

What is said here of a family, tests/test_families.py holds it to, and docs/models.md is made from it.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerBase,
)

VOCABULARY, LAYERS, WIDTH = 512, 3, 32

_IDS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_OLD = {**_IDS, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
_BASE = {
    **_IDS, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64,
}  # fmt: skip
_GQA = {**_BASE, "num_key_value_heads": 2}
_HEAD = {**_GQA, "head_dim": 8}
_WINDOW = {**_HEAD, "sliding_window": 8}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {**_HEAD, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = {
    **_BASE, "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "first_k_dense_replace": 1, "topk_group": 1, "n_group": 1,
}  # fmt: skip
_DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
_VISION = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


class Family(NamedTuple):
    """A model type of transformers, and what it supports."""

    title: str
    config: dict[str, Any]
    parts: str = "all"
    """where mlp_out and attn_out can be taken: `all` layers, `none`; `attention`: attn_out where there is attention, mlp_out everywhere; `attention alone`: no mlp_out"""
    logits: bool = True
    """whether its logit effects are known"""
    lengths: bool = True
    """whether prompts of different lengths can be in one batch of generation"""


FAMILIES: dict[str, Family] = {
    "gpt2": Family("GPT-2", _OLD),
    "openai-gpt": Family("GPT (2018)", _OLD, parts="none"),
    "gpt_neo": Family(
        "GPT-Neo",
        {**_IDS, "hidden_size": WIDTH, "num_layers": 4, "num_heads": 4, "intermediate_size": 64, "window_size": 8,
         "max_position_embeddings": 64, "attention_types": [[["global", "local"], 2]]},
    ),
    "gpt_neox": Family("GPT-NeoX, Pythia", _BASE),
    "gptj": Family("GPT-J", {**_OLD, "rotary_dim": 4}),
    "codegen": Family("CodeGen", {**_OLD, "rotary_dim": 4}),
    "gpt_bigcode": Family("StarCoder, SantaCoder", _OLD),
    "opt": Family(
        "OPT",
        {**_IDS, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "ffn_dim": 64,
         "max_position_embeddings": 64, "word_embed_proj_dim": WIDTH},
    ),
    "bloom": Family("BLOOM", {**_IDS, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": 4}),
    "xglm": Family(
        "XGLM",
        {**_IDS, "d_model": WIDTH, "num_layers": LAYERS, "attention_heads": 4, "ffn_dim": 64, "max_position_embeddings": 64},
    ),
    "biogpt": Family("BioGPT", _BASE, parts="none"),
    "falcon": Family("Falcon", {k: v for k, v in _BASE.items() if k != "intermediate_size"}),
    "mpt": Family("MPT", {**_IDS, "d_model": WIDTH, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2}),
    "stablelm": Family("StableLM", _GQA),
    "starcoder2": Family("StarCoder 2", _GQA),
    "llama": Family("Llama, SmolLM, Yi, DeepSeek 1, TinyLlama", _GQA),
    "mistral": Family("Mistral", _GQA),
    "qwen2": Family("Qwen 2, Qwen 2.5", _GQA),
    "qwen3": Family("Qwen 3", _HEAD),
    "gemma": Family("Gemma", _HEAD),
    "gemma2": Family("Gemma 2", _WINDOW),
    "gemma3_text": Family("Gemma 3, text", _WINDOW),
    "gemma3": Family(
        "Gemma 3, multimodal (its text)",
        {"text_config": _WINDOW, "vision_config": _VISION, "mm_tokens_per_image": 4, "image_token_index": 511,
         "boi_token_index": 510, "eoi_token_index": 509},
    ),
    "gemma4_text": Family(
        "Gemma 4, text", {**_WINDOW, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}, parts="none"
    ),
    "vaultgemma": Family("VaultGemma", _WINDOW),
    "phi": Family("Phi 1, Phi 2", _GQA),
    "phi3": Family("Phi 3, Phi 4", _GQA),
    "phimoe": Family("Phi 3.5 MoE", {**_GQA, **_EXPERTS}, parts="none"),
    "olmo": Family("OLMo", _GQA),
    "olmo2": Family("OLMo 2", _GQA),
    "olmo3": Family("OLMo 3", {**_GQA, "sliding_window": 8}),
    "olmoe": Family("OLMoE", {**_GQA, "num_experts": 4, "num_experts_per_tok": 2}),
    "flex_olmo": Family("FlexOlmo", {**_GQA, "num_experts": 4, "num_experts_per_tok": 2}),
    "cohere": Family("Command R", {**_GQA, "logit_scale": 0.25}),
    "cohere2": Family("Command R7B, Command A", {**_GQA, "logit_scale": 0.25, "sliding_window": 8}),
    "granite": Family(
        "Granite 3",
        {**_GQA, "logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0, "attention_multiplier": 0.3},
    ),
    "granitemoe": Family("Granite 3 MoE", {**_GQA, **_EXPERTS, "logits_scaling": 4.0, "residual_multiplier": 0.5}),
    "granitemoehybrid": Family(
        "Granite 4",
        {**_GQA, **_EXPERTS, **_MAMBA2, "shared_intermediate_size": 32, "layer_types": ["mamba", "attention", "mamba"]},
        parts="attention alone",
    ),
    "nemotron": Family("Nemotron", _GQA),
    "smollm3": Family("SmolLM 3", _GQA),
    "glm": Family("GLM 4 (2024)", _HEAD),
    "glm4": Family("GLM 4 (2025)", _HEAD),
    "glm4_moe": Family(
        "GLM 4.5", {**_HEAD, "n_routed_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    ),
    "ernie4_5": Family("ERNIE 4.5", _HEAD),
    "exaone4": Family("EXAONE 4", _WINDOW),
    "seed_oss": Family("Seed-OSS", _HEAD),
    "arcee": Family("Arcee", _HEAD),
    "apertus": Family("Apertus", _HEAD),
    "ministral": Family("Ministral", _WINDOW, parts="none"),
    "ministral3": Family("Ministral 3", _HEAD),
    "hunyuan_v1_dense": Family("Hunyuan", _HEAD),
    "helium": Family("Helium", _HEAD, parts="none"),
    "persimmon": Family("Persimmon", _GQA, parts="none"),
    "diffllama": Family("DiffLlama", _GQA, parts="none"),
    "nanochat": Family("nanochat", _GQA),
    "jais2": Family("Jais 2", _GQA),
    "bitnet": Family("BitNet", _GQA),
    "modernbert-decoder": Family("Ettin (ModernBERT decoder)", {**_BASE, "local_attention": 8}, logits=False),
    "mixtral": Family("Mixtral", {**_GQA, "num_local_experts": 4}),
    "qwen2_moe": Family("Qwen 2 MoE", {**_ROUTED, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": Family("Qwen 3 MoE", _ROUTED),
    "qwen3_next": Family(
        "Qwen 3 Next", {**_ROUTED, **_DELTA, "shared_expert_intermediate_size": 32}, parts="attention"
    ),
    "qwen3_5_text": Family("Qwen 3.5, text", {**_HEAD, **_DELTA}, parts="attention"),
    "gpt_oss": Family("gpt-oss", {**_WINDOW, "num_local_experts": 4}),
    "llama4_text": Family("Llama 4, text", {**_HEAD, "num_local_experts": 4, "intermediate_size_mlp": 64}),
    "deepseek_v2": Family("DeepSeek V2", _LATENT),
    "deepseek_v3": Family("DeepSeek V3, R1", _LATENT),
    "jamba": Family(
        "Jamba",
        {**_GQA, "num_experts": 2, "mamba_d_state": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
        parts="attention",
    ),
    "bamba": Family("Bamba", {**_GQA, **_MAMBA2, "attn_layer_indices": [1]}, parts="attention"),
    "falcon_h1": Family(
        "Falcon H1",
        {**_HEAD, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8},
    ),
    "lfm2": Family("LFM 2", {**_GQA, "block_ff_dim": 64, "layer_types": ["conv", "full_attention", "conv"]}, parts="attention"),
    "recurrent_gemma": Family(
        "RecurrentGemma",
        {**_GQA, "lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "recurrent", "attention"]},
        parts="none", lengths=False,
    ),
    "nemotron_h": Family("Nemotron-H", _GQA, parts="none"),
    "mamba": Family("Mamba", {**_IDS, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "state_size": 4}, parts="none"),
    "mamba2": Family(
        "Mamba 2",
        {**_IDS, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1},
        parts="none",
    ),
    "falcon_mamba": Family(
        "Falcon Mamba", {**_IDS, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "state_size": 4}, parts="none"
    ),
    "rwkv": Family(
        "RWKV 4",
        {**_IDS, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "attention_hidden_size": WIDTH, "context_length": 64},
        parts="none", lengths=False,
    ),
}  # fmt: skip

_ENCODER = {**_IDS, **{key: value for key, value in _BASE.items() if key not in ("vocab_size",)}}
REFUSED: dict[str, dict[str, Any]] = {
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "modernbert": _ENCODER,
    "t5": {**_IDS, "d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": LAYERS, "num_heads": 4},
    "bart": {
        **_IDS, "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    },
}  # fmt: skip
"""Encoders and encoder-decoders."""


def make(name: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Save a tiny checkpoint of a family, as `save_pretrained` does."""
    settings = FAMILIES[name].config if name in FAMILIES else REFUSED[name]
    config = AutoConfig.for_model(name, **settings)
    auto: Any = AutoModelForCausalLM
    if name in ("bert", "roberta", "modernbert"):
        auto = AutoModelForMaskedLM
    elif name in REFUSED:
        auto = AutoModelForSeq2SeqLM
    elif name == "gemma3":
        auto = AutoModelForImageTextToText
    torch.manual_seed(1)
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # far enough from zero that layers matter
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return folder / name


BESIDE = ("gpt_neox", "gptj", "codegen", "falcon", "phi", "cohere", "cohere2", "falcon_h1")
"""whose attention has an MLP or a mixer beside it, so that there is no stream behind it and before the MLP"""
NO_NORM = (
    "gptj", "codegen", "falcon", "phi", "cohere", "cohere2", "olmo2", "olmo3", "flex_olmo", "exaone4", "granitemoehybrid",
)  # fmt: skip
"""that have attn_out or mlp_out, and no norm of its own before the MLP (or no mlp_out)"""
PAGE = Path(__file__).parent.parent / "docs" / "models.md"
_PARTS = {
    "all": "yes", "none": "no", "attention": "attn_out where there is attention", "attention alone": "attn_out where there is attention; no mlp_out",
}  # fmt: skip


_MID = dict.fromkeys(("attention", "attention alone"), "where there is attention")


def page() -> str:
    """docs/models.md."""
    rows = [
        f"| {family.title} | `{name}` | {_PARTS[family.parts]} | {'no' if name in BESIDE or family.parts == 'none' else _MID.get(family.parts, 'yes')} | {'yes' if family.logits else 'no'} | {'yes' if family.lengths else 'no'} |"
        for name, family in sorted(FAMILIES.items(), key=lambda item: item[1].title.lower())
    ]
    refused = ", ".join(f"`{name}`" for name in REFUSED)
    return f"""# Which models

Of each of these {len(FAMILIES)} families a tiny checkpoint is made in the tests, loaded, and held to what the table says; `make families` runs all stages on
each: harvest, train, evaluate, index, prompt, steer. The pretrained model that figures are given of is SmolLM2-135M (`llama`).

A family that is not listed is not refused: the same things are tried when its model is loaded, and what does not hold is said
in one line. (Every decoder has `resid_pre` and `resid_post`.)

- **mlp_out, attn_out**: whether these can be harvested and edited. No: the family adds something else to its stream, or its places have no names yet.
  Wherever there is mlp_out there is `mlp_in` (`blocks.L.mlp.hook_in`): what the MLP, or the whole of a mixture of experts, is called with, behind the norm before it and its
  gain. mlp_out is what is added to the stream: where a family has a norm behind its MLP (Gemma 2 and 3, OLMo 2 and 3, FlexOlmo, GLM 4 of 2025, EXAONE 4), or multiplies by a
  number (Granite), it comes after that, and what lies between mlp_in and mlp_out is both together. It is always a function of each position alone, and tried.
  Wherever there is attn_out there is `attn_z` (`blocks.L.attn.hook_z`): what goes into attention's output projection, heads one behind the other and behind any gate or norm
  that a family has there. Wherever there is mlp_out and a norm of its own before the MLP there is `ln2_normalized` (`blocks.L.ln2.hook_normalized`), what that norm gives before its gain; not where the norm
  adds a bias (GPT-2, OPT), nor in {", ".join(f"`{name}`" for name in NO_NORM)}.
- **resid_mid**: the stream between attention and MLP. No: the two, or a mixer, run beside each other.
- **logit effects**: whether a latent's direct effect on the logits is known. No: index with `--no-logits`.
- **lengths**: whether prompts of different lengths can be continued at once.

| family | type | mlp_out, attn_out | resid_mid | logit effects | lengths |
|---|---|---|---|---|---|
{chr(10).join(rows)}

Encoders and encoder-decoders ({refused} and their kin) are refused by name: vectors that you make of them yourself can be written
with `saebench.store.StoreWriter`, and SAEs trained on them.

(This page is made by `python tests/families.py`, and a test compares it.)
"""


if __name__ == "__main__":
    PAGE.write_text(page())

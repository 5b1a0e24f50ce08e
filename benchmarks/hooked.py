"""A checkpoint on disk as the HookedTransformer that SAELens and SAEDashboard run: their own loading takes only names of the hub.

For the scripts that run in the peers' environment, with its older transformer-lens.
"""

from pathlib import Path
from typing import Any

import torch
from sae_lens import HookedSAETransformer
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights, convert_llama_weights
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def _llama(config: Any) -> dict[str, Any]:
    d_head = config.hidden_size // config.num_attention_heads
    return {
        "n_layers": config.num_hidden_layers, "d_model": config.hidden_size, "n_ctx": config.max_position_embeddings,
        "d_head": d_head, "n_heads": config.num_attention_heads, "d_mlp": config.intermediate_size,
        "act_fn": config.hidden_act, "eps": config.rms_norm_eps, "normalization_type": "RMS",
        "positional_embedding_type": "rotary", "rotary_adjacent_pairs": False, "rotary_dim": d_head, "final_rms": True,
        "gated_mlp": True, "original_architecture": "LlamaForCausalLM",
    }  # fmt: skip


def _gpt2(config: Any) -> dict[str, Any]:
    return {
        "n_layers": config.n_layer, "d_model": config.n_embd, "n_ctx": config.n_positions,
        "d_head": config.n_embd // config.n_head, "n_heads": config.n_head, "d_mlp": 4 * config.n_embd,
        "act_fn": "gelu_new", "eps": config.layer_norm_epsilon, "normalization_type": "LN",
        "original_architecture": "GPT2LMHeadModel",
    }  # fmt: skip


FAMILIES = {"llama": (_llama, convert_llama_weights), "gpt2": (_gpt2, convert_gpt2_weights)}


def hooked(folder: Path) -> HookedSAETransformer:
    """Of a Llama or GPT-2 checkpoint; its logits are checked against the checkpoint's own."""
    source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings, convert = FAMILIES[source.config.model_type]
    made = HookedTransformerConfig(
        **settings(source.config), d_vocab=source.config.vocab_size, device="cpu", model_name="local"
    )
    weights = convert(source, made)
    model = HookedSAETransformer(made)
    model.load_state_dict(weights, strict=False)
    model.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = torch.arange(16)[None] + 100
    with torch.no_grad():
        difference = (model(ids).log_softmax(-1) - source(ids).logits.log_softmax(-1)).abs().max()
    assert difference < 1e-3, f"the model does not compute what its checkpoint does: {difference}"
    return model

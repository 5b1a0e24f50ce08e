"""Passes of a model over two devices, "two:0" and "two:1", that no machine has: torch follows where each tensor would be, and refuses what mixes them.

A process of its own, since a backend that is registered stays. Prints what came where; run by test_several_devices.py.
"""

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import dispatch_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from saebench.models import clean_pass, head, hook_name, last_states, logits, next_logits, resumed_states
from saebench.models.devices import through
from saebench.models.load import _described, _note_ids
from saebench.models.passes import capture, spliced_logits

LAYERS, WIDTH = 4, 32


def placed(module: nn.Module, device: str) -> None:
    """Weights of their size there: moving them is what such tensors cannot."""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, value in held.items():
                if value is not None:
                    there: Any = torch.empty(value.shape, dtype=value.dtype, device=device)
                    held[name] = nn.Parameter(there, requires_grad=False) if held is part._parameters else there


def main() -> None:
    _setup_privateuseone_for_python_backend("two")
    with FakeTensorMode(), mock.patch("accelerate.hooks.set_module_tensor_to_device"):
        config = LlamaConfig(
            hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=128, max_position_embeddings=64,
        )  # fmt: skip
        module: Any = LlamaForCausalLM(config).eval()
        there = {f"model.layers.{layer}": f"two:{layer // 2}" for layer in range(LAYERS)}
        there |= {"model.embed_tokens": "two:0", "model.norm": "two:1", "model.rotary_emb": "two:1", "lm_head": "two:1"}
        for name, device in there.items():
            placed(module.get_submodule(name), device)
        dispatch_model(module, there)
        known: dict[str, Any] = {"folder": Path(), "weights_hash": "", "tokenizer_files": (), "dtype": "float32"}
        model = _described(module, id="m", tokenizer=None, **known)
        model.passing.output = BaseModelOutputWithPast
        _note_ids(model)
        tokens = torch.zeros(2, 8, dtype=torch.long, device=model.device)
        one = torch.ones(1, device=model.device)
        states = last_states(model, tokens)
        found = {
            "model": model, "logits": logits(model, tokens), "states": states, "head": head(model, states[0]),
            "next": next_logits(model, tokens, padding=tokens[:, 0], use_cache=False)[0],
            "norm": through(module.model.norm, states), "seen": model.passing.ids,
        }  # fmt: skip
        for layer in (1, LAYERS - 1):
            for kind in ("resid_pre", "attn_z", "resid_mid", "mlp_in", "mlp_out", "resid_post"):
                hook = hook_name(layer, kind)
                found[f"{hook} captured"] = capture(model, tokens, [hook])[hook]
                found[f"{hook} spliced"] = spliced_logits(model, tokens, hook, lambda x: x + one)
                clean = clean_pass(model, tokens, hook)
                found[f"{hook} resumed"] = resumed_states(model, clean, clean.value + one)
    sys.stdout.writelines(f"{name} {value.device}\n" for name, value in found.items())


if __name__ == "__main__":
    main()

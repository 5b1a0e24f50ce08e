"""Llama Scope (OpenMOSS): `hyperparams.json` and `checkpoints/final.safetensors`; Llamascopium 2: `config.json` and `sae_weights.safetensors`.

Both read and write vectors that a scalar of each hook has brought to a mean norm of √D, s = √D / `dataset_average_activation_norm`,
unless they say otherwise. It is folded here: b_enc / s_in, W_dec s_in / s_out, b_dec / s_out.
"""

import math
from pathlib import Path
from typing import Any

import torch

from saebench.files import read_json
from saebench.sae.formats.reading import (
    Config,
    Read,
    Tensors,
    check_fields,
    check_names,
    configuration,
    expect,
    in_path,
    load_tensors,
    needed,
    unit_rows,
)

_USED = (
    "hook_point_in", "hook_point_out", "d_model", "expansion_factor", "act_fn", "norm_activation", "sparsity_include_decoder_norm",
    "use_decoder_bias", "apply_decoder_bias_to_pre_encoder", "use_glu_encoder",
)  # fmt: skip
_USED_1 = (*_USED, "d_sae", "jump_relu_threshold", "dataset_average_activation_norm")
_KNOWN_1 = (
    "device", "seed", "dtype", "bias_init_method", "decoder_bias_init_method", "decoder_exactly_fixed_norm", "init_decoder_norm",
    "init_encoder_norm", "init_encoder_with_decoder_transpose", "lp", "l1_coefficient", "l1_coefficient_warmup_steps", "top_k",
    "k_warmup_steps", "use_batch_norm_mse", "use_ghost_grads", "tp_size", "ddp_size", "sae_pretrained_name_or_path", "strict_loading",
)  # fmt: skip
_USED_2 = (*_USED, "sae_type", "top_k")
_KNOWN_2 = (
    "device",
    "dtype",
    "use_triton_kernel",
    "sparsity_threshold_for_triton_spmm_kernel",
    "jumprelu_threshold_window",
)
_THRESHOLD = "log_jumprelu_threshold"


def read_1(file: Path) -> Read:
    source = file.parent.parent / "hyperparams.json"
    said = read_json(source)
    check_fields(source, said, _USED_1, _KNOWN_1)
    for field, value in (
        ("use_decoder_bias", True),
        ("apply_decoder_bias_to_pre_encoder", False),
        ("use_glu_encoder", False),
    ):
        expect(source, said, field, value)
    expect(source, said, "act_fn", "jumprelu")
    expect(source, said, "norm_activation", "dataset-wise")
    d_in, threshold, norms = needed(source, said, "d_model", "jump_relu_threshold", "dataset_average_activation_norm")
    d_sae = said.get("d_sae") or d_in * needed(source, said, "expansion_factor")[0]
    model = "meta-llama/Llama-3.1-8B" if in_path(file, r"Llama3_1-8B-Base") else None
    config = _configuration(source, "jumprelu", (d_in, d_sae), said, {"model_name": model})

    def tensors() -> Tensors:
        held = load_tensors(file)
        check_names(file, held, ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"))
        made = {
            "W_enc": held["encoder.weight"].T, "b_enc": held["encoder.bias"],
            "W_dec": held["decoder.weight"].T, "b_dec": held["decoder.bias"],
        }  # fmt: skip
        into, out = needed(source, norms, "in")[0], norms.get("out", norms["in"])
        made = unit_rows(_folded(made, math.sqrt(d_in) / into, math.sqrt(d_in) / out))
        # Their threshold is for vectors as the model has them, and for decoder rows of norm 1.
        return made | {"threshold": torch.full((d_sae,), float(threshold))}

    return Read(config, tensors)


def read_2(file: Path) -> Read:
    source = file.with_name("config.json")
    said = read_json(source)
    check_fields(source, said, _USED_2, _KNOWN_2)
    expect(source, said, "sae_type", "sae")  # none of `crosscoder`, `clt`, `lorsa` and `molt`
    for field in ("use_glu_encoder", "apply_decoder_bias_to_pre_encoder"):
        expect(source, said, field, False)
    act = expect(source, said, "act_fn", "relu", "jumprelu", "topk")  # `batchtopk` of a row depends on its batch
    how = expect(source, said, "norm_activation", "dataset-wise", "inference", "token-wise")
    by_norm = expect(source, said, "sparsity_include_decoder_norm", True, False)
    d_in, factor = needed(source, said, "d_model", "expansion_factor")
    more: Config = {"normalize_activations": "constant_norm_rescale"} if how == "token-wise" else {}
    metadata: Config = {}
    if act == "topk":
        k = needed(source, said, "top_k")[0]
        more |= {"k": k, "rescale_acts_by_decoder_norm": by_norm}
        metadata["stated_l0"] = k
    shape = (d_in, int(d_in * factor))
    config = _configuration(source, {"relu": "standard"}.get(act, act), shape, said, metadata, **more)

    def tensors() -> Tensors:
        held = load_tensors(file)
        names = {"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D", "b_dec": "b_D"}
        if not expect(source, said, "use_decoder_bias", True, False):
            del names["b_dec"]
        # The norms are saved even where they are folded already, and are then any number.
        norms = [f"dataset_average_activation_norm.{hook}" for hook in _ends(source, said)]
        threshold = next((name for name in held if name.endswith(_THRESHOLD)), f"activation_function.{_THRESHOLD}")
        required = [
            *names.values(),
            *(norms if how == "dataset-wise" else []),
            *([threshold] if act == "jumprelu" else []),
        ]
        check_names(file, held, required, norms)
        made = {ours: held[theirs] for ours, theirs in names.items()}
        made.setdefault("b_dec", made["W_dec"].new_zeros(d_in))
        s_in, s_out = (math.sqrt(d_in) / float(held[name]) if how == "dataset-wise" else 1.0 for name in norms)
        made = _folded(made, s_in, s_out)
        if (
            act == "jumprelu"
        ):  # of scaled vectors: pre-activations are of what is read, times a decoder row's norm of what is written
            made["threshold"] = held[threshold].float().exp() / (s_out if by_norm else s_in)
        return unit_rows(made) if by_norm and act != "topk" else made

    return Read(config, tensors)


def _ends(source: Path, said: Config) -> tuple[str, str]:
    into = needed(source, said, "hook_point_in")[0]
    return into, said.get("hook_point_out") or into


def _configuration(
    source: Path, architecture: str, shape: tuple[int, int], said: Config, metadata: Config, **more: Any
) -> Config:
    into, out = _ends(source, said)
    if into == out:
        return configuration(architecture, shape, into, metadata=metadata, **more)
    name = "transcoder" if architecture == "standard" else f"{architecture}_transcoder"
    return configuration(name, shape, into, out, d_out=shape[0], metadata=metadata, **more)


def _folded(made: Tensors, s_in: float, s_out: float) -> Tensors:
    """In float32, for vectors as the model has them: activations are those of scaled vectors over `s_in`."""
    made = {name: value.float() for name, value in made.items()}
    return made | {
        "b_enc": made["b_enc"] / s_in,
        "W_dec": made["W_dec"] * (s_in / s_out),
        "b_dec": made["b_dec"] / s_out,
    }

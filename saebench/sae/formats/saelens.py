"""SAELens, whose layout is ours: `cfg.json` and `sae_weights.safetensors`. What is written before version 6 is brought into its present form."""

import re
from pathlib import Path
from typing import Any

import torch

from saebench.files import read_json
from saebench.sae.formats.reading import Config, Read, Tensors, check_fields, expect, load_tensors, needed

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"

_USED = (
    "architecture", "d_in", "d_sae", "d_out", "k", "parts", "apply_b_dec_to_input", "normalize_activations", "reshape_activations",
    "rescale_acts_by_decoder_norm", "metadata",
)  # fmt: skip
_LISTED = ("norm_scaling_factor",)  # what a list of releases says of some
_KNOWN = ("dtype", "device")
_METADATA_USED = (
    "model_name", "model_revision", "hook_name", "hook_name_out", "hook_head_index", "hook_head_index_out", "reads", "writes", "set",
    "joint", "context_size", "model_from_pretrained_kwargs", "saebench", "evaluation", "l0", "stated_l0", "training_architecture",
    "source", "training_architecture_details",
)  # fmt: skip
# What it was trained on and with, and where pages of it are: an SAE is the same whatever they say.
_METADATA_KNOWN = (
    "sae_lens_version", "sae_lens_training_version", "model_class_name", "dataset_path", "dataset_trust_remote_code", "prepend_bos",
    "exclude_special_tokens", "seqpos_slice", "sequence_separator_token", "disable_concat_sequences", "neuronpedia_id", "hook_layer",
    "hook_layer_out", "hf_hook_name", "hf_hook_name_out",
)  # fmt: skip

# Of configurations of before version 6, in which all of this stands side by side, training and all.
_RENAMED = {"hook_point": "hook_name", "hook_point_layer": "hook_layer", "hook_point_head_index": "hook_head_index"}
_OLD_USED = (
    "architecture", "d_in", "d_sae", "apply_b_dec_to_input", "normalize_activations", "reshape_activations", "activation_fn",
    "activation_fn_str", "activation_fn_kwargs", "finetuning_scaling_factor", "model_name", "hook_name", "hook_head_index",
    "context_size", "model_from_pretrained_kwargs", "is_transcoder", "scaling_factor",
)  # fmt: skip
_OLD_KNOWN = (
    *_KNOWN, *_METADATA_KNOWN, "hook_eval", "hook_point_eval", "streaming", "is_dataset_tokenized", "use_cached_activations",
    "cached_activations_path", "expansion_factor", "from_pretrained_path", "n_batches_in_buffer", "training_tokens",
    "total_training_tokens", "finetuning_tokens", "store_batch_size", "store_batch_size_prompts", "train_batch_size",
    "train_batch_size_tokens", "eval_batch_size_prompts", "n_eval_batches", "n_eval_seqs", "act_store_device", "llm_device", "seed",
    "autocast", "autocast_lm", "compile_llm", "llm_compilation_mode", "compile_sae", "sae_compilation_mode", "adam_beta1",
    "adam_beta2", "l1_coefficient", "lp_norm", "scale_sparsity_penalty_by_decoder_norm", "l1_warm_up_steps", "lr", "lr_end",
    "lr_scheduler_name", "lr_warm_up_steps", "lr_decay_steps", "n_restart_cycles", "b_dec_init_method", "decoder_heuristic_init",
    "decoder_orthogonal_init", "init_encoder_as_decoder_transpose", "normalize_sae_decoder", "use_ghost_grads", "feature_sampling_window",
    "feature_sampling_method", "feature_reinit_scale", "dead_feature_threshold", "dead_feature_window", "dead_feature_estimation_method",
    "resample_batches", "noise_factor", "noise", "mse_loss_normalization", "finetuning_method", "ghost_grad", "log_to_wandb",
    "log_activations_store_to_wandb", "log_optimizer_state_to_wandb", "wandb_project", "wandb_id", "run_name", "wandb_entity",
    "wandb_log_frequency", "eval_every_n_wandb_logs", "log_weights_to_wandb", "resume", "n_checkpoints", "checkpoint_path", "verbose",
    "tokens_per_buffer", "jumprelu_init_threshold", "jumprelu_bandwidth", "mlp_out", "cosine_decay", "sae_name",
)  # fmt: skip

_HAS_LAYER_NORM = re.compile(
    r"gpt2|gpt-neo|gpt-j|pythia|\bopt-|bloom|tinystories|tiny-stories|(?:gelu|solu|attn-only|attn)-\d+l|phi-[12]|stablelm"
)
_HAS_RMS_NORM = re.compile(r"llama|gemma|mistral|mixtral|qwen|smollm|olmo-2|deepseek|phi-3")
# Keywords of TransformerLens' from_pretrained that leave the stream as it is, or are how it is computed.
_PLAIN_KEYWORDS = (
    "center_unembed", "dtype", "torch_dtype", "device", "n_devices", "device_map", "low_cpu_mem_usage", "trust_remote_code", "cache_dir",
    "default_padding_side", "default_prepend_bos", "move_to_device", "first_n_layers", "attn_implementation", "local_files_only",
)  # fmt: skip


def find(path: Path) -> Path | None:
    """Its file of weights, which need not be there: what has this configuration is of this format."""
    folder = path.parent if path.name in (CONFIG, WEIGHTS) else path
    return folder / WEIGHTS if (folder / CONFIG).exists() else None


def read(file: Path) -> Read:
    source = file.with_name(CONFIG)
    config = read_json(source)
    if isinstance(config, dict) and "metadata" not in config and {"hook_name", "hook_point"} & set(config):
        config = _present(source, config)
    elif isinstance(config, dict) and isinstance(config.get("metadata"), dict):
        details = config["metadata"].get("training_architecture_details") or {}
        if details.get("k") is not None:  # of BatchTopK, which is saved as JumpReLU
            config["metadata"].setdefault("stated_l0", details["k"])

    def tensors() -> Tensors:
        held = load_tensors(file)
        scaling = held.pop("scaling_factor", None)
        if scaling is not None and not torch.allclose(scaling.float(), torch.ones_like(scaling.float())):
            raise ValueError(
                f"{file} holds a scaling_factor that is not 1 (finetuning_scaling_factor), which is not supported"
            )
        return held

    return Read(config, tensors)


def with_said(config: Config, said: Config) -> Config:
    """A configuration with what is known of it elsewhere: fields of its own, and all others in its metadata."""
    own = {name: value for name, value in said.items() if name in (*_USED, *_LISTED)}
    rest = {name: value for name, value in said.items() if name not in own}
    return config | own | {"metadata": (config.get("metadata") or {}) | rest}


def check(source: Path, config: Config) -> None:
    """Raises ValueError for what a present configuration says that makes another SAE of it than is made here."""
    needed(source, config, "architecture", "d_in", "d_sae")
    check_fields(source, config, (*_USED, *_LISTED), _KNOWN)
    metadata = config.get("metadata") or {}
    check_fields(source, metadata, _METADATA_USED, _METADATA_KNOWN)
    for name in ("hook_head_index", "hook_head_index_out"):
        expect(source, metadata, name, None)
    if config.get("rescale_acts_by_decoder_norm") and not config["architecture"].startswith("topk"):
        raise ValueError(
            f"{source} says rescale_acts_by_decoder_norm: True of {config['architecture']!r}, where SAELens does not look at it; expected it of topk"
        )
    hook = metadata.get("hook_name") or ""
    if expect(source, config, "reshape_activations", "none", "hook_z") == "hook_z" and not hook.endswith("hook_z"):
        raise ValueError(
            f"{source} says reshape_activations: 'hook_z', and reads {hook or 'no hook that it names'}; expected blocks.N.attn.hook_z"
        )
    for keyword, value in (metadata.get("model_from_pretrained_kwargs") or {}).items():
        _check_keyword(source, keyword, value, hook, metadata.get("hook_name_out") or "")
    if _centred(source, config):
        expect(source, config, "normalize_activations", "none", "expected_average_only_in", "layer_norm")


def _check_keyword(source: Path, keyword: str, value: Any, *hooks: str) -> None:
    """Raises ValueError where a model that is loaded with it has other vectors at these hooks than the plain one."""
    if not value or keyword in (*_PLAIN_KEYWORDS, "center_writing_weights", "revision"):
        return
    elsewhere = {
        "fold_ln": ("mlp.hook_in", "hook_normalized"),
        "fold_value_biases": ("hook_z",),
        "refactor_factored_attn_matrices": ("hook_z",),
    }
    if keyword in elsewhere and not any(hook.endswith(elsewhere[keyword]) for hook in hooks):
        return
    raise ValueError(
        f"{source} says model_from_pretrained_kwargs.{keyword}: {value!r}, of which the model has other vectors than the plain one; "
        "expected an SAE of the plain model"
    )


def _centred(source: Path, config: Config) -> bool:
    """Whether it is of a stream whose every vector has mean 0 (`center_writing_weights`): TransformerLens makes it so where norms are LayerNorm."""
    metadata = config.get("metadata") or {}
    hook, model = metadata.get("hook_name") or "", str(metadata.get("model_name") or "").lower()
    if not (metadata.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights"):
        return False
    if hook.endswith(("hook_z", "mlp.hook_in", "hook_normalized")) or _HAS_RMS_NORM.search(model):
        return False
    if not _HAS_LAYER_NORM.search(model):
        raise ValueError(
            f"{source} says model_from_pretrained_kwargs.center_writing_weights of {metadata.get('model_name')!r}, "
            "of which it is not known here whether that changes its vectors; expected a model known to have LayerNorm or RMSNorm"
        )
    return True


def normalize_of(source: Path, config: Config) -> str:
    """What is done to a row before it is read, and undone behind: SAELens does nothing by `expected_average_only_in`, and neither is done here."""
    how = config.get("normalize_activations") or "none"
    how = "none" if how == "expected_average_only_in" else how
    return "center" if how == "none" and _centred(source, config) else how


def _present(source: Path, old: Config) -> Config:
    """A configuration of before version 6 as version 6 would write it."""
    said = {_RENAMED.get(name, name): value for name, value in old.items()}
    check_fields(source, said, _OLD_USED, _OLD_KNOWN)
    for field in ("is_transcoder", "finetuning_scaling_factor"):
        expect(source, said, field, None, False)
    expect(source, said, "scaling_factor", None, 1.0)
    architecture = said.get("architecture") or "standard"
    chosen = said.get("activation_fn_str") or said.get("activation_fn") or "relu"
    kwargs = said.get("activation_fn_kwargs") or {}
    expect(source, {"activation_fn": chosen}, "activation_fn", "relu", "topk")
    check_fields(source, kwargs, ("k", "postact_fn"), ("use_sparse_activations",))
    expect(source, kwargs, "postact_fn", None, "relu", "ReLU")
    config: Config = {"apply_b_dec_to_input": said.get("apply_b_dec_to_input", True)}
    if chosen == "topk" or architecture == "topk":
        if architecture not in ("standard", "topk"):
            raise ValueError(f"{source} says activation_fn: 'topk' of {architecture!r}; expected it of standard")
        architecture, config["k"] = "topk", needed(source, kwargs, "k")[0]
    normalize = said.get("normalize_activations") or "none"
    hook = said.get("hook_name") or ""
    names = (*_METADATA_USED, *_METADATA_KNOWN)
    return config | {
        "architecture": architecture,
        "d_in": said.get("d_in"),
        "d_sae": said.get("d_sae"),
        "normalize_activations": "expected_average_only_in" if normalize is True else normalize,
        "reshape_activations": said.get("reshape_activations") or ("hook_z" if hook.endswith("hook_z") else "none"),
        "metadata": {name: value for name, value in said.items() if name in names and value is not None},
    }

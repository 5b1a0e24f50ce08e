"""OpenAI's `sparse_autoencoder` (GPT-2): one file for each layer, such as `gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt`."""

from pathlib import Path

from saebench.sae.formats.reading import (
    Config,
    Read,
    Tensors,
    check_names,
    configuration,
    expect,
    in_path,
    load_tensors,
    needed,
    shape_of,
)

NAMES = ("encoder.weight", "latent_bias", "decoder.weight", "pre_bias")
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_SITES = {
    "resid_post_mlp": "hook_resid_post",
    "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_delta_attn": "hook_attn_out",
}


def read(file: Path) -> Read:
    held = load_tensors(file)
    d_sae, d_in = shape_of(file, "encoder.weight")
    activation = expect(file, held, "activation", "ReLU", "TopK")
    site = in_path(file, rf"/({'|'.join(_SITES)})(?:_v\d+\w*)?/")
    hook = f"blocks.{file.stem}.{_SITES[site[1]]}" if site and file.stem.isdigit() else None
    metadata: Config = {"model_name": "gpt2" if in_path(file, r"/gpt2-small/") else None}
    more: Config = {}
    if activation == "TopK":
        state = held.get("activation_state_dict", {})
        expect(file, state, "postact_fn", "ReLU")
        metadata["stated_l0"] = k = int(needed(file, state, "k")[0])
        # By their rule TopK ones, and no others, take each row less its mean and over its deviation.
        more = {"k": k, "normalize_activations": "layer_norm"}
    architecture = {"ReLU": "standard", "TopK": "topk"}[activation]
    config = configuration(architecture, (d_in, d_sae), hook, pre_bias=True, metadata=metadata, **more)
    return Read(config, lambda: _tensors(file))


def _tensors(file: Path) -> Tensors:
    held = load_tensors(file)
    check_names(file, held, NAMES, (*_STATISTICS, "activation", "activation_state_dict"))
    W_enc, b_enc, W_dec, b_dec = (held[name] for name in NAMES)
    return {"W_enc": W_enc.T, "b_enc": b_enc, "W_dec": W_dec.T, "b_dec": b_dec}

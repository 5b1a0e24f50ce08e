"""Goodfire's: one file, such as `Llama-3.1-8B-Instruct-SAE-l19.pth`, whose name says model and layer. ReLU without a pre-bias."""

from pathlib import Path

from saebench.sae.formats.reading import Read, Tensors, check_names, configuration, in_path, load_tensors, shape_of

NAMES = ("encoder_linear.weight", "encoder_linear.bias", "decoder_linear.weight", "decoder_linear.bias")
_OWNERS = {"Llama": "meta-llama", "DeepSeek": "deepseek-ai"}


def read(file: Path) -> Read:
    d_sae, d_in = shape_of(file, NAMES[0])
    named = in_path(file, r"/((Llama|DeepSeek)-[^/]+)-SAE-l(\d+)\.pth?$")
    hook, model = (f"blocks.{named[3]}.hook_resid_post", f"{_OWNERS[named[2]]}/{named[1]}") if named else (None, None)
    config = configuration("standard", (d_in, d_sae), hook, metadata={"model_name": model})
    return Read(config, lambda: _tensors(file))


def _tensors(file: Path) -> Tensors:
    held = load_tensors(file)
    check_names(file, held, NAMES)
    W_enc, b_enc, W_dec, b_dec = (held[name] for name in NAMES)
    return {"W_enc": W_enc.T, "b_enc": b_enc, "W_dec": W_dec.T, "b_dec": b_dec}

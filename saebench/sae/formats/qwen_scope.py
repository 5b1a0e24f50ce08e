"""Qwen-Scope: `layerN.sae.pt` in `SAE-Res-MODEL-W32K-L0_50`, whose name says model and k. TopK without a pre-bias."""

from pathlib import Path

from saebench.sae.formats.reading import Read, Tensors, check_names, configuration, in_path, load_tensors, shape_of

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def read(file: Path) -> Read:
    d_sae, d_in = shape_of(file, "W_enc")
    named, layer = in_path(file, r"SAE-Res-([^/]+?)-W\d+K-L0_(\d+)\b"), in_path(file, r"/layer(\d+)\.sae\.pt$")
    if named is None:
        raise ValueError(
            f"{file} lies in no folder that says its k; expected one named as on the hub, such as SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
        )
    hook, k = f"blocks.{layer[1]}.hook_resid_post" if layer else None, int(named[2])
    metadata = {"model_name": f"Qwen/{named[1]}", "stated_l0": k}
    return Read(configuration("topk", (d_in, d_sae), hook, metadata=metadata, k=k), lambda: _tensors(file))


def _tensors(file: Path) -> Tensors:
    held = load_tensors(file)
    check_names(file, held, NAMES)
    return {"W_enc": held["W_enc"].T, "b_enc": held["b_enc"], "W_dec": held["W_dec"].T, "b_dec": held["b_dec"]}

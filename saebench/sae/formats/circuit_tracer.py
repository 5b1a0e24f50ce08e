"""circuit-tracer: a set of transcoders, `config.yaml` and `layer_N.safetensors` for each layer. Nothing is taken off what is read."""

import re
from pathlib import Path
from typing import Any

import yaml

from saebench.files import first_line, write_text
from saebench.sae.formats.reading import (
    Config,
    Read,
    Tensors,
    check_fields,
    check_names,
    configuration,
    expect,
    load_tensors,
    needed,
    shape_of,
    shapes_of,
)
from saebench.sae.formats.writing import (
    Dictionary,
    b_enc_without_pre_bias,
    check_expressible,
    refuse,
    save,
    thresholds,
)

_CONFIG = "config.yaml"
_LAYER = re.compile(r"layer_(\d+)\.safetensors")
_THRESHOLD = "activation_function.threshold"
_USED = ("model_name", "model_kind", "feature_input_hook", "feature_output_hook", "activation", "k")
_KNOWN = ("scan",)  # where its pages are


def find(path: Path) -> Path | None:
    """The file of a layer, by its own path or as the only one of a set."""
    files = [path] if path.is_file() else sorted(path.glob("layer_*.safetensors"))
    files = [file for file in files if _LAYER.fullmatch(file.name) and file.with_name(_CONFIG).is_file()]
    if len(files) > 1:
        raise ValueError(f"{path} holds several transcoders; give the path of one: {', '.join(f.name for f in files)}")
    return files[0] if files else None


def read(file: Path) -> Read:
    source = file.with_name(_CONFIG)
    said = _yaml(source)
    check_fields(source, said, _USED, _KNOWN)
    expect(source, said, "model_kind", "transcoder_set")
    activation = expect(source, said, "activation", None, "relu", "topk", "jump_relu")
    into, out = needed(source, said, "feature_input_hook", "feature_output_hook")
    names = shapes_of(file)
    d_sae, d_in = shape_of(file, "W_enc")
    chosen = activation if activation in ("relu", "topk") else ("jumprelu" if _THRESHOLD in names else "relu")
    skip = "W_skip" in names
    kind = "skip_transcoder" if skip else "transcoder"
    layer = _LAYER.fullmatch(file.name)[1]  # type: ignore[index]
    k = needed(source, said, "k")[0] if chosen == "topk" else None
    config = configuration(
        kind if chosen == "relu" else f"{chosen}_{kind}", (d_in, d_sae), f"blocks.{layer}.{into}", f"blocks.{layer}.{out}",
        d_out=shape_of(file, "W_dec")[1], metadata={"model_name": said.get("model_name"), "stated_l0": k}, **({"k": k} if k else {}),
    )  # fmt: skip
    return Read(config, lambda: _tensors(file, skip, chosen == "jumprelu"))


def _yaml(source: Path) -> Config:
    try:
        said = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{source} cannot be read: {first_line(error)}") from error
    if not isinstance(said, dict):
        raise ValueError(f"{source} holds a {type(said).__name__}; expected the fields of a set of transcoders")
    return said


def _tensors(file: Path, skip: bool, jumprelu: bool) -> Tensors:
    held = load_tensors(file)
    names = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    names |= {"W_skip": "W_skip"} if skip else {}
    names |= {_THRESHOLD: "threshold"} if jumprelu else {}
    check_names(file, held, names, () if jumprelu else ("k", _THRESHOLD))
    made = {ours: held[theirs] for theirs, ours in names.items()}
    return made | {"W_enc": made["W_enc"].T}


def write(given: Dictionary, folder: Path) -> Path:
    """A transcoder as a layer of a set, which grows by one with each that is written into its folder; returns the layer's file."""
    sae, to = given.sae, "circuit-tracer"
    check_expressible(to, sae, ("relu", "topk", "jumprelu"), saes=False, transcoders=True, skip=True)
    if sae.d_in != sae.d_out:
        refuse(to, f"a transcoder from {sae.d_in} to {sae.d_out} numbers")
    (_, layer, into), (_, layer_out, out) = (hook.split(".", 2) for hook in (given.reads, given.writes))
    if layer != layer_out:
        refuse(to, f"a transcoder from layer {layer} to layer {layer_out}")
    said: dict[str, Any] = {
        "model_kind": "transcoder_set", "model_name": given.metadata.get("model_name"), "feature_input_hook": into,
        "feature_output_hook": out, "activation": "jump_relu" if sae.architecture == "jumprelu" else sae.architecture,
        "k": getattr(sae, "k", None),
    }  # fmt: skip
    said = {name: value for name, value in said.items() if value is not None}
    source = folder / _CONFIG
    if source.exists() and (there := _yaml(source)) != said:
        raise ValueError(f"{source} says {there}, and of this transcoder it would say {said}; choose another --out")
    tensors = {"W_enc": sae.W_enc.T, "b_enc": b_enc_without_pre_bias(sae), "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip.T
    if sae.architecture == "jumprelu":
        tensors[_THRESHOLD] = thresholds(sae)
    file = save(tensors, folder / f"layer_{layer}.safetensors")
    write_text(source, yaml.safe_dump(said, sort_keys=False))
    return file

"""Gemma Scope (DeepMind), JumpReLU without a pre-bias. 1: `params.npz`, all else in its path; 2: `params.safetensors`, mostly with `config.json`."""

import re
from pathlib import Path

from saebench.files import read_json, write_json
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
    shape_of,
)
from saebench.sae.formats.writing import (
    Dictionary,
    b_enc_without_pre_bias,
    check_expressible,
    save,
    site_of,
    thresholds,
)

_SITES = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z", "transcoders": "ln2.hook_normalized"}
_USED = (
    "architecture",
    "model_name",
    "hf_hook_point_in",
    "hf_hook_point_out",
    "affine_connection",
    "type",
    "l0",
    "width",
)
# What is at the ends of Hugging Face's modules of Gemma 3, by TransformerLens' names.
_PLACES = {
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
    "post_feedforward_layernorm.output": "hook_mlp_out",
    "pre_feedforward_layernorm.output": "mlp.hook_in",
}


def read_1(file: Path) -> Read:
    if in_path(file, r"/embedding/"):
        raise ValueError(f"{file} is of the embedding, which is at no hook that is known here; expected a layer_N")
    shape = shape_of(file, "W_enc")
    repository = in_path(file, r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)\b")
    layer, l0 = in_path(file, r"/layer_(\d+)/"), in_path(file, r"/average_l0_(\d+)/")
    metadata: Config = {"stated_l0": int(l0[1]) if l0 else None}
    site, hook = None, None
    if repository:
        site = repository[3]
        metadata["model_name"] = f"google/gemma-2-{repository[1]}{'-it' if repository[2] == 'it' else ''}"
        hook = f"blocks.{layer[1]}.{_SITES[site]}" if layer else None
    if site == "transcoders":
        # It reads what is behind the norm before the MLP and before that norm's gain.
        written, d_out = f"blocks.{layer[1]}.hook_mlp_out" if layer else None, shape_of(file, "W_dec")[1]
        return Read(
            configuration("jumprelu_transcoder", shape, hook, written, d_out=d_out, metadata=metadata),
            lambda: _tensors(file),
        )
    return Read(configuration("jumprelu", shape, hook, metadata=metadata), lambda: _tensors(file))


def read_2(file: Path) -> Read:
    source = file.with_name("config.json")
    said = read_json(source) if source.is_file() else _by_path(file)
    check_fields(source, said, _USED, ())
    expect(source, said, "architecture", "jump_relu")
    kind = expect(source, said, "type", None, "sae", "transcoder")  # neither `crosscoder` nor `clt`
    shape, d_out = shape_of(file, "w_enc"), shape_of(file, "w_dec")[1]
    into = said.get("hf_hook_point_in")
    out = said.get("hf_hook_point_out") or into
    model = said.get("model_name")
    if model:
        model = model if "/" in model else f"google/{model}"
        model = model.replace("gemma-v3", "gemma-3").replace("270m-pt", "270m")  # as the hub calls them
    metadata = {"model_name": model, "stated_l0": said.get("l0")}
    skip = bool(said.get("affine_connection"))
    if kind != "transcoder" and out == into and not skip:
        config = configuration("jumprelu", shape, _hook(into), metadata=metadata)
    else:
        name = "jumprelu_skip_transcoder" if skip else "jumprelu_transcoder"
        config = configuration(name, shape, _hook(into), _hook(out), d_out=d_out, metadata=metadata)
    return Read(config, lambda: _tensors(file, skip))


def _by_path(file: Path) -> Config:
    """What a configuration would say, where there is none."""
    repository, layer = in_path(file, r"gemma-scope-2-(\w+)-(pt|it)\b"), in_path(file, r"/layer_(\d+)_")
    said = {"model_name": f"google/gemma-3-{repository[1]}-{repository[2]}"} if repository else {}
    sites = {
        "resid_post": "output",
        "attn_out": "self_attn.o_proj.input",
        "mlp_out": "post_feedforward_layernorm.output",
    }
    site = in_path(file, rf"/({'|'.join(sites)}|transcoder|clt|crosscoder)(?:_all)?/")
    if layer is None or site is None:
        return said
    if site[1] in sites:
        return said | {"hf_hook_point_in": f"model.layers.{layer[1]}.{sites[site[1]]}"}
    ends = {
        end: f"model.layers.{layer[1]}.{norm}_feedforward_layernorm.output"
        for end, norm in (("in", "pre"), ("out", "post"))
    }
    return said | {
        "type": site[1],
        "affine_connection": "affine" in file.parent.name,
        "hf_hook_point_in": ends["in"],
        "hf_hook_point_out": ends["out"],
    }


def _hook(place: str | None) -> str | None:
    """By one of Hugging Face's modules and which of its ends it is; None for one that is not known."""
    match = re.fullmatch(r"(?:model\.)?(?:language_model\.)?layers\.(\d+)\.(.+)", place or "")
    return f"blocks.{match[1]}.{_PLACES[match[2]]}" if match and match[2] in _PLACES else None


def _tensors(file: Path, skip: bool = False) -> Tensors:
    held = {f"W{name[1:]}" if name.startswith("w_") else name: value for name, value in load_tensors(file).items()}
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    check_names(file, held, (*names, "affine_skip_connection") if skip else names)
    made = {name: held[name] for name in names}
    return made | (
        {"W_skip": held["affine_skip_connection"].T} if skip else {}
    )  # theirs is [in, out], SAELens' [out, in]


def write(given: Dictionary, folder: Path) -> Path:
    """A dictionary of JumpReLU, or of ReLU with thresholds of 0, as Gemma Scope 2 has it, which says all in `config.json`; returns the folder."""
    sae, metadata = given.sae, given.metadata
    check_expressible("gemma-scope", sae, ("jumprelu", "relu"), transcoders=True, skip=True)
    into, out = (
        f"model.layers.{hook.split('.')[1]}.{site_of('gemma-scope', hook, {name: place for place, name in _PLACES.items()})}"
        for hook in (given.reads, given.writes)
    )
    tensors = {
        "w_enc": sae.W_enc, "b_enc": b_enc_without_pre_bias(sae), "w_dec": sae.W_dec, "b_dec": sae.b_dec, "threshold": thresholds(sae),
    }  # fmt: skip
    if sae.W_skip is not None:
        tensors["affine_skip_connection"] = sae.W_skip
    file = save(tensors, folder / "params.safetensors")
    said = {
        "hf_hook_point_in": into, "hf_hook_point_out": out, "width": sae.d_sae, "model_name": metadata.get("model_name"),
        "architecture": "jump_relu", "l0": metadata.get("stated_l0"), "affine_connection": sae.W_skip is not None,
        "type": "sae" if sae.tied else "transcoder",
    }  # fmt: skip
    write_json(file.with_name("config.json"), {name: value for name, value in said.items() if value is not None})
    return folder

"""circuit-tracer: `config.yaml`, and of each layer `layer_N.safetensors` or the file that its `transcoders` name (a set of transcoders), or
`W_enc_N.safetensors` and `W_dec_N.safetensors` (a cross-layer transcoder). Nothing is taken off what is read.

Its loader goes by the tensors alone: JumpReLU where there are thresholds, else ReLU. So TopK is read where `activation` says it, and not written.
"""

import re
from pathlib import Path

import torch
import yaml
from einops import rearrange

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
    check_free,
    refuse,
    save,
    thresholds,
)

_CONFIG = "config.yaml"
_SET, _JOINT = "transcoder_set", "cross_layer_transcoder"
_FILE = re.compile(r"(layer|W_enc)_(\d+)\.safetensors")
_THRESHOLD = "activation_function.threshold"
_USED = ("model_name", "model_kind", "feature_input_hook", "feature_output_hook", "activation", "k", "transcoders")
_KNOWN = ("scan", "revision")  # where its pages are, and of which state of a repository it is


def find(path: Path) -> Path | None:
    """The file of a layer, by its own path or as the only one of a set."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    files = [file for file in files if file.with_name(_CONFIG).is_file() and _place(file)]
    if len(files) > 1:
        raise ValueError(f"{path} holds several transcoders; give the path of one: {', '.join(f.name for f in files)}")
    return files[0] if files else None


def members(path: Path) -> list[Path]:
    """The files of a whole set, by its folder or its `config.yaml`, in the order of layers; none where it is no set of these.

    Raises ValueError for a layer whose file is missing.
    """
    folder = path.parent if path.name == _CONFIG else path
    if not (folder / _CONFIG).is_file():
        return []
    for name in _named(folder / _CONFIG):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / _CONFIG} names {name}, which is not beside it; download it there")
    places = {file: place for file in folder.glob("*.safetensors") if (place := _place(file))}
    return sorted(places, key=lambda file: places[file][1])


def _place(file: Path) -> tuple[str, int] | None:
    """(what a file is of, its layer), by its name or where the configuration lists it; None of others."""
    if file.suffix != ".safetensors":
        return None
    if names := _named(file.with_name(_CONFIG)):
        return ("layer", names.index(file.name)) if file.name in names else None
    match = _FILE.fullmatch(file.name)
    return None if match is None else (match[1], int(match[2]))


def _named(source: Path) -> list[str]:
    """The files that a configuration lists, by layer. Raises ValueError for those that lie elsewhere."""
    names = _yaml(source).get("transcoders") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and "/" not in name for name in names):
        raise ValueError(
            f"{source} says transcoders: {names!r}; expected names of files that lie beside it: download them there, and say so in a copy"
        )
    return names


def read(file: Path) -> Read:
    source = file.with_name(_CONFIG)
    said = _yaml(source)
    check_fields(source, said, _USED, _KNOWN)
    kind = expect(source, said, "model_kind", _SET, _JOINT)
    place = _place(file)
    assert place is not None  # it was found by that
    name, layer = place
    if (name == "W_enc") != (kind == _JOINT):
        raise ValueError(f"{source} says model_kind: {kind!r}, of which {file.name} is no file")
    return (_read_joint if kind == _JOINT else _read_one)(file, source, said, layer)


def _read_one(file: Path, source: Path, said: Config, layer: int) -> Read:
    into, out = _ends(source, said)
    names = shapes_of(file)
    d_sae, d_in = shape_of(file, "W_enc")
    chosen, skip = _activation(source, said, _THRESHOLD in names), "W_skip" in names
    k = needed(source, said, "k")[0] if chosen == "topk" else None
    config = configuration(
        _architecture(chosen, skip), (d_in, d_sae), f"blocks.{layer}.{into}", f"blocks.{layer}.{out}",
        d_out=shape_of(file, "W_dec")[1], metadata={"model_name": said.get("model_name"), "stated_l0": k}, **({"k": k} if k else {}),
    )  # fmt: skip
    return Read(config, lambda: _tensors(file, skip, chosen == "jumprelu"))


def more(file: Path) -> list[Path]:
    """The file of the decoder, where it is another."""
    return [file.with_name(file.name.replace("W_enc", "W_dec"))] if file.name.startswith("W_enc") else []


def _read_joint(file: Path, source: Path, said: Config, layer: int) -> Read:
    """The part that reads a layer, and writes to it and to each behind it; what is written at a layer is the sum over the parts."""
    into, out = _ends(source, said)
    d_sae, d_in = shape_of(file, f"W_enc_{layer}")
    (decoder,) = more(file)
    shape = shapes_of(decoder).get(f"W_dec_{layer}", ())
    if len(shape) != 3 or shape[0] != d_sae:
        raise ValueError(
            f"{decoder} has W_dec_{layer} of shape {list(shape)}; expected {d_sae} latents, layers written, width"
        )
    chosen = _activation(source, said, f"threshold_{layer}" in shapes_of(file))
    layers = range(layer, layer + shape[1])
    reads, writes = [f"blocks.{layer}.{into}"], [f"blocks.{each}.{out}" for each in layers]
    metadata = {
        "model_name": said.get("model_name"), "reads": reads, "writes": writes, "joint": True, "set": file.absolute().parent.name,
        "set_reads": [f"blocks.{each}.{into}" for each in range(layers.stop)],
    }  # fmt: skip
    parts: Config = {"parts": [shape[2]] * len(layers)} if len(layers) > 1 else {}
    config = configuration(
        _architecture(chosen), (d_in, d_sae), reads[0], writes[0], d_out=len(layers) * shape[2], metadata=metadata, **parts
    )  # fmt: skip
    return Read(config, lambda: _joint_tensors(file, decoder, layer, chosen == "jumprelu"))


def _ends(source: Path, said: Config) -> tuple[str, str]:
    """What is read and written within a layer, by our names."""
    into, out = needed(source, said, "feature_input_hook", "feature_output_hook")
    model = said.get("model_name")
    if out == "mlp.hook_out" and not re.search("llama|qwen", str(model), re.IGNORECASE):
        raise ValueError(
            f"{source} says feature_output_hook: {out!r}, what the MLP of {model!r} puts out, which need not be what is added to the stream: "
            "where it is (no norm behind it, no factor), say hook_mlp_out in a copy of the file"
        )
    return into, "hook_mlp_out" if out == "mlp.hook_out" else out


def _activation(source: Path, said: Config, has_thresholds: bool) -> str:
    """The architecture, by the tensors where the configuration does not say it."""
    activation = expect(source, said, "activation", None, "relu", "topk", "jump_relu")
    if activation is None:
        return "jumprelu" if has_thresholds else "relu"
    return activation.replace("_", "")


def _architecture(chosen: str, skip: bool = False) -> str:
    kind = "skip_transcoder" if skip else "transcoder"
    return kind if chosen == "relu" else f"{chosen}_{kind}"


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
    check_names(file, held, names, () if jumprelu else ("k",))
    made = {ours: held[theirs] for theirs, ours in names.items()}
    return made | {"W_enc": made["W_enc"].T}


def _joint_tensors(file: Path, decoder: Path, layer: int, jumprelu: bool) -> Tensors:
    names = ("W_enc", "b_enc", "b_dec", *(["threshold"] if jumprelu else []))
    held, W_dec_FLD = load_tensors(file), load_tensors(decoder)[f"W_dec_{layer}"]
    check_names(file, held, [f"{name}_{layer}" for name in names])
    made = {name: held[f"{name}_{layer}"] for name in names}
    b_dec = torch.zeros_like(W_dec_FLD[0])  # that of a later layer is in its own file
    b_dec[0] = made["b_dec"]
    return made | {
        "W_enc": made["W_enc"].T,
        "W_dec": rearrange(W_dec_FLD, "f l d -> f (l d)"),
        "b_dec": b_dec.flatten(),
    }


def write(given: Dictionary, folder: Path) -> Path:
    """A transcoder as a layer of a set, or as the part of a cross-layer one that reads a layer; the folder grows by one with each.

    Returns the layer's file. Raises ValueError for one that is not of a kind with those in the folder.
    """
    sae, to, joint = given.sae, "circuit-tracer", bool(given.metadata.get("joint"))
    check_expressible(to, sae, ("relu", "jumprelu"), saes=False, transcoders=True, skip=not joint, several=joint)
    writes = given.metadata.get("writes") or [given.writes]
    (_, layer, into), outs = given.reads.split(".", 2), [hook.split(".", 2) for hook in writes]
    if set(sae.parts) != {sae.d_in}:
        refuse(to, f"a transcoder from {sae.d_in} to {' and '.join(map(str, sae.parts))} numbers")
    if [(int(at), out) for _, at, out in outs] != [(int(layer) + n, outs[0][2]) for n in range(len(outs))]:
        refuse(to, f"a transcoder from layer {layer} to {', '.join(writes)}")
    said = {
        "model_kind": _JOINT if joint else _SET, "model_name": given.metadata.get("model_name"), "feature_input_hook": into,
        "feature_output_hook": outs[0][2], "activation": "jump_relu" if sae.architecture == "jumprelu" else "relu",
    }  # fmt: skip
    said = {name: value for name, value in said.items() if value is not None}
    source = folder / _CONFIG
    if source.exists() and (there := _yaml(source)) != said:
        raise ValueError(f"{source} says {there}, and of this transcoder it would say {said}; choose another --out")
    tensors = {"W_enc": sae.W_enc.T, "b_enc": b_enc_without_pre_bias(sae), "b_dec": sae.b_dec}
    file = (_write_joint if joint else _write_one)(given, folder, tensors)
    write_text(source, yaml.safe_dump(said, sort_keys=False))
    return file


def _write_one(given: Dictionary, folder: Path, tensors: Tensors) -> Path:
    sae = given.sae
    tensors |= {"W_dec": sae.W_dec}
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip.T
    if sae.architecture == "jumprelu":
        tensors[_THRESHOLD] = thresholds(sae)
    for other in folder.glob(
        "layer_*.safetensors"
    ):  # what has a skip or not, and how wide, the first layer says for all
        if (there := shapes_of(other)) != (mine := {name: tuple(value.shape) for name, value in tensors.items()}):
            raise ValueError(f"{other} has {there}, and this transcoder {mine}; choose another --out")
    return save(tensors, folder / f"layer_{given.layer}.safetensors")


def _write_joint(given: Dictionary, folder: Path, tensors: Tensors) -> Path:
    sae, layer, n = given.sae, given.layer, len(given.sae.parts)
    own, *later = tensors["b_dec"].split(sae.parts)
    if any(bias.any() for bias in later):
        refuse("circuit-tracer", "a bias at a layer behind the one that is read")
    if (first := (given.metadata.get("set_reads") or ["blocks.0."])[0].split(".")[1]) != "0":
        refuse("circuit-tracer", f"a cross-layer transcoder that begins at layer {first} and not at 0")
    tensors["b_dec"] = own
    if sae.architecture == "jumprelu":
        tensors["threshold"] = thresholds(sae)
    for other in sorted(folder.glob("W_dec_*.safetensors")):
        ((name, there),) = shapes_of(other).items()
        mine = (sae.d_sae, n + int(layer) - int(name.removeprefix("W_dec_")), sae.d_in)
        if there != mine:
            raise ValueError(
                f"{other} has shape {there}, and beside this transcoder it would have {mine}; choose another --out"
            )
    file = folder / f"W_enc_{layer}.safetensors"
    check_free(file)
    W_dec_FLD = rearrange(sae.W_dec, "f (l d) -> f l d", l=n)
    save({f"W_dec_{layer}": W_dec_FLD}, folder / f"W_dec_{layer}.safetensors")
    return save({f"{name}_{layer}": value for name, value in tensors.items()}, file)

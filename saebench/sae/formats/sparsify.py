"""sparsify (EleutherAI): `cfg.json` and `sae.safetensors` in a folder named after the module whose output is read."""

import re
from pathlib import Path

from saebench.files import read_json, write_json
from saebench.sae.formats.reading import (
    Read,
    Tensors,
    check_fields,
    check_names,
    configuration,
    expect,
    load_tensors,
    needed,
)
from saebench.sae.formats.writing import Dictionary, check_expressible, refuse, save, site_of

_USED = ("activation", "expansion_factor", "num_latents", "k", "skip_connection", "transcode", "d_in", "signed")
_KNOWN = ("normalize_decoder", "multi_topk")
_MODULES = re.compile(r"(?:.*\.)?(?:layers?|h|blocks)[._](\d+)(?:\.(mlp|self_attn|attn|attention))?")
_PARTS = {"hook_resid_post": "", "hook_mlp_out": ".mlp", "hook_attn_out": ".self_attn"}


def read(file: Path) -> Read:
    source = file.with_name("cfg.json")
    said = read_json(source)
    check_fields(source, said, _USED, _KNOWN)
    d_in, k = needed(source, said, "d_in", "k")
    expect(source, said, "activation", "topk")  # `groupmax` takes one latent of each group
    expect(source, said, "signed", False)
    transcode, skip = bool(said.get("transcode")), bool(said.get("skip_connection"))
    if skip and not transcode:
        raise ValueError(
            f"{source} says skip_connection: True of what writes what it reads; expected it of a transcoder alone"
        )
    d_sae = said.get("num_latents") or d_in * needed(source, said, "expansion_factor")[0]
    run = file.parent.parent / "config.json"
    trained = read_json(run) if run.is_file() else {}
    metadata = {"model_name": trained.get("model"), "context_size": trained.get("ctx_len"), "stated_l0": k}
    into, out = _hooks(file.parent.name, trained.get("model") or file.absolute().as_posix())
    if not transcode:
        config = configuration("topk", (d_in, d_sae), out, pre_bias=True, metadata=metadata, k=k)
    else:
        kind = "topk_skip_transcoder" if skip else "topk_transcoder"
        config = configuration(kind, (d_in, d_sae), into, out, d_out=d_in, metadata=metadata, k=k)
    return Read(config, lambda: _tensors(file, skip))


def _hooks(module: str, model: str) -> tuple[str | None, str | None]:
    """What goes into, and out of, the module that a folder is named after; None where no hook is known to have it.

    What Gemma's attention and MLP put out goes through another norm before it is what their hooks have.
    """
    match = _MODULES.fullmatch(module)
    if match is None or (match[2] and "gemma" in model.lower()):
        return None, None
    layer, part = match.groups()
    into = {None: "hook_resid_pre", "mlp": "mlp.hook_in"}.get(part)
    out = {None: "hook_resid_post", "mlp": "hook_mlp_out"}.get(part, "hook_attn_out")
    return into and f"blocks.{layer}.{into}", f"blocks.{layer}.{out}"


def _tensors(file: Path, skip: bool) -> Tensors:
    held = load_tensors(file)
    as_they_are = ("W_dec", "b_dec", "W_skip") if skip else ("W_dec", "b_dec")
    check_names(file, held, ("encoder.weight", "encoder.bias", *as_they_are))
    made = {"W_enc": held["encoder.weight"].T, "b_enc": held["encoder.bias"]}
    return made | {name: held[name] for name in as_they_are}


def write(given: Dictionary, run: Path) -> Path:
    """A dictionary of TopK into the folder of a run, in one named after its module, which is returned."""
    sae, metadata = given.sae, given.metadata
    check_expressible("sparsify", sae, ("topk",), transcoders=True, skip=True)
    if sae.d_in != sae.d_out:
        refuse("sparsify", f"a transcoder from {sae.d_in} to {sae.d_out} numbers")
    module = f"layers.{given.layer}{site_of('sparsify', given.writes, _PARTS)}"
    into, out = _hooks(module, metadata.get("model_name") or "")
    if (out if sae.tied else into, out) != (given.reads, given.writes):
        refuse("sparsify", f"what reads {given.reads} and writes {given.writes}: they are not the ends of {module!r}")
    tensors = {"encoder.weight": sae.W_enc.T, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip.T
    file = save(tensors, run / module / "sae.safetensors")
    write_json(
        file.with_name("cfg.json"),
        {
            "activation": "topk", "expansion_factor": max(1, sae.d_sae // sae.d_in), "normalize_decoder": False, "num_latents": sae.d_sae,
            "k": sae.k, "multi_topk": False, "skip_connection": sae.W_skip is not None, "transcode": not sae.tied, "d_in": sae.d_in,
        },
    )  # fmt: skip
    trained = {"model": metadata.get("model_name"), "ctx_len": metadata.get("context_size")}
    write_json(run / "config.json", {name: value for name, value in trained.items() if value is not None})
    return file.parent

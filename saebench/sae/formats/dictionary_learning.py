"""dictionary_learning (Marks, Karvonen): `ae.pt`, a plain state dict, and `config.json`, of its trainer and buffer."""

import re
from pathlib import Path
from typing import NamedTuple

import torch

from saebench.files import read_json, replacing, write_json
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
    unit_rows,
)
from saebench.sae.formats.writing import (
    Dictionary,
    b_enc_without_pre_bias,
    check_expressible,
    check_free,
    plain,
    site_of,
)


class _Class(NamedTuple):
    """A class of its: the architecture that it is, and our name of each of its tensors, with `.T` behind one that is transposed."""

    architecture: str
    names: dict[str, str]
    pre_bias: bool = True
    trained_as: str | None = None
    unused: tuple[str, ...] = ()
    """tensors that its forward pass does not use"""
    unit_rows: bool = False
    """whether it is loaded with decoder rows of norm 1"""


_LINEAR = {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc", "decoder.weight": "W_dec.T"}
_PLAIN = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec", "threshold": "threshold"}
_GATED = {"encoder.weight": "W_enc.T", "decoder.weight": "W_dec.T", "decoder_bias": "b_dec"}
CLASSES = {
    "AutoEncoder": _Class("standard", _LINEAR | {"bias": "b_dec"}, unit_rows=True),
    "AutoEncoderNew": _Class("standard", _LINEAR | {"decoder.bias": "b_dec"}, pre_bias=False),
    "GatedAutoEncoder": _Class("gated", _GATED | {"r_mag": "r_mag", "gate_bias": "b_gate", "mag_bias": "b_mag"}),
    # Its threshold is for other uses than its forward pass, which takes the k largest of each row.
    "AutoEncoderTopK": _Class("topk", _LINEAR | {"b_dec": "b_dec"}, unused=("k", "threshold")),
    "BatchTopKSAE": _Class(
        "jumprelu", _LINEAR | {"b_dec": "b_dec", "threshold": "threshold"}, trained_as="batchtopk", unused=("k",)
    ),
    "MatryoshkaBatchTopKSAE": _Class("jumprelu", _PLAIN, trained_as="matryoshka", unused=("k", "group_sizes")),
    "JumpReluAutoEncoder": _Class("jumprelu", _PLAIN, pre_bias=False),
}

_USED = ("dict_class", "activation_dim", "dict_size", "k", "target_l0", "layer", "lm_name", "submodule_name")
_KNOWN = (
    "trainer_class", "lr", "steps", "warmup_steps", "decay_start", "seed", "device", "wandb_name", "auxk_alpha", "threshold_beta",
    "threshold_start_step", "top_k_aux", "l1_penalty", "resample_steps", "sparsity_warmup_steps", "sparsity_function",
    "sparsity_penalty", "p_start", "p_end", "anneal_start", "sparsity_queue_length", "n_sparsity_updates", "bandwidth",
    "group_fractions", "group_weights", "group_sizes", "norm_factor",  # what rows were divided by in training: biases are saved for rows as they are
)  # fmt: skip
_SITES = {f"hook_{name}": name for name in ("resid_post", "resid_pre", "mlp_out", "attn_out")}


def read(file: Path) -> Read:
    source = file.with_name("config.json")
    said = read_json(source)
    trainer, buffer = said.get("trainer") or {}, said.get("buffer") or {}
    check_fields(source, said, ("trainer", "buffer"), ())
    check_fields(source, trainer, _USED, _KNOWN)
    check_fields(
        source, buffer, ("ctx_len", "io"), ("d_submodule", "n_ctxs", "refresh_batch_size", "out_batch_size", "device")
    )
    called, d_in, d_sae = needed(source, trainer, "dict_class", "activation_dim", "dict_size")
    if called not in CLASSES:
        raise ValueError(f"{source} has dict_class {called!r}; expected one of {', '.join(CLASSES)}")
    of = CLASSES[called]
    # What goes into a module is not at the hook that is called after it.
    hook = _hook(trainer) if expect(source, buffer, "io", "out", "in") == "out" else None
    k = needed(source, trainer, "k")[0] if "k" in of.unused else None
    metadata = {
        "model_name": trainer.get("lm_name"),
        "context_size": buffer.get("ctx_len"),
        "training_architecture": of.trained_as,
        "stated_l0": k or trainer.get("target_l0"),
    }
    more = {"k": k} if of.architecture == "topk" else {}
    config = configuration(of.architecture, (d_in, d_sae), hook, pre_bias=of.pre_bias, metadata=metadata, **more)
    return Read(config, lambda: _tensors(file, of, d_sae, k))


def _hook(trainer: Config) -> str | None:
    """By a submodule's name as its demonstrations give it, `resid_post_layer_8`; None for another."""
    match = re.fullmatch(rf"({'|'.join(_SITES.values())})(?:_layer_(\d+))?", trainer.get("submodule_name") or "")
    layer = trainer.get("layer")
    if match is None or layer is None or match[2] not in (None, str(layer)):
        return None
    return f"blocks.{layer}.hook_{match[1]}"


def _tensors(file: Path, of: _Class, d_sae: int, k: int | None) -> Tensors:
    held = load_tensors(file)
    check_names(file, held, of.names, of.unused)
    if k is not None and int(held.get("k", k)) != k:
        raise ValueError(
            f"{file} holds k {int(held['k'])}, and config.json beside it says {k}; expected one and the same"
        )
    made = {
        ours.removesuffix(".T"): held[theirs].T if ours.endswith(".T") else held[theirs]
        for theirs, ours in of.names.items()
    }
    if (
        "threshold" in made and made["threshold"].ndim == 0
    ):  # one for all; -1 where it was never set, which is plain ReLU
        made["threshold"] = made["threshold"].expand(d_sae)
    return unit_rows(made) if of.unit_rows else made


# The class in which each architecture is written: none of them changes decoder rows as it is loaded.
_WRITTEN_AS = {
    "relu": "AutoEncoderNew",
    "gated": "GatedAutoEncoder",
    "topk": "AutoEncoderTopK",
    "jumprelu": "JumpReluAutoEncoder",
}


def write(given: Dictionary, folder: Path) -> Path:
    """An SAE as `ae.pt`, a plain state dict, and `config.json`; returns the folder."""
    sae, metadata = given.sae, given.metadata
    check_expressible("dictionary_learning", sae, tuple(_WRITTEN_AS))
    called = _WRITTEN_AS[sae.architecture]
    of = CLASSES[called]
    held: Tensors = dict(sae.named_parameters())
    if not of.pre_bias:
        held["b_enc"] = b_enc_without_pre_bias(sae)
    state = {
        theirs: held[ours.removesuffix(".T")].T if ours.endswith(".T") else held[ours]
        for theirs, ours in of.names.items()
    }
    trainer = {
        "dict_class": called, "activation_dim": sae.d_in, "dict_size": sae.d_sae, "layer": int(given.layer),
        "submodule_name": site_of("dictionary_learning", given.writes, _SITES) + f"_layer_{given.layer}",
        "lm_name": metadata.get("model_name"),
    }  # fmt: skip
    if sae.architecture == "topk":
        trainer["k"] = sae.k
        state |= {"k": torch.tensor(sae.k, dtype=torch.int), "threshold": torch.tensor(-1.0)}
    elif metadata.get("stated_l0"):
        trainer["target_l0"] = metadata["stated_l0"]
    file = folder / "ae.pt"
    check_free(file)
    with replacing(file) as temporary:
        torch.save(plain(state), temporary)
    buffer = {"d_submodule": sae.d_in, "io": "out", "ctx_len": metadata.get("context_size")}
    write_json(file.with_name("config.json"), {"trainer": trainer, "buffer": buffer})
    return folder

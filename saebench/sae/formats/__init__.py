"""Dictionaries of others: each format is read as SAELens 6 would have written what it holds, a file for each."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from saebench.sae.formats import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    goodfire,
    llama_scope,
    openai,
    qwen_scope,
    saelens,
    sparsify,
)
from saebench.sae.formats.reading import Config, Read, Tensors, beside, holding
from saebench.sae.formats.saelens import CONFIG, WEIGHTS, check, normalize_of, with_said
from saebench.sae.formats.writing import Dictionary, check_expressible, check_free

__all__ = [
    "CONFIG",
    "FORMATS",
    "WEIGHTS",
    "WRITERS",
    "Config",
    "Dictionary",
    "Format",
    "Read",
    "Tensors",
    "check",
    "check_expressible",
    "check_free",
    "found",
    "normalize_of",
    "with_said",
]


class Format(NamedTuple):
    """How a format's files are known, and what reads them."""

    name: str
    holds: str
    """its files, in words"""
    weights: Callable[[Path], Path | None]
    """the file of weights, where a folder or a file is of this format"""
    read: Callable[[Path], Read]
    """by the file of weights. Raises ValueError for what a configuration says that is not known here"""
    more: Callable[[Path], list[Path]] = lambda weights: []
    """the other files that weights are in, beside that one"""


_BY_NAMES = (
    Format("sparsify", "cfg.json and sae.safetensors", beside("sae.safetensors", "cfg.json"), sparsify.read),
    Format(
        "Llamascopium", "config.json and sae_weights.safetensors", beside(WEIGHTS, "config.json", without=CONFIG), llama_scope.read_2
    ),
    Format("SAELens", f"{CONFIG} and {WEIGHTS}", saelens.find, saelens.read),
    Format("dictionary_learning", "config.json and ae.pt", beside("ae.pt", "config.json"), dictionary_learning.read),
    Format("Gemma Scope", "params.npz", beside("params.npz"), gemma_scope.read_1),
    Format("Gemma Scope 2", "params.safetensors", beside("params.safetensors"), gemma_scope.read_2),
    Format(
        "circuit-tracer", "config.yaml and one layer_N.safetensors or W_enc_N.safetensors", circuit_tracer.find, circuit_tracer.read, circuit_tracer.more,
    ),
    Format(
        "Llama Scope", "hyperparams.json and checkpoints/final.safetensors",
        beside("checkpoints/final.safetensors", "hyperparams.json"), llama_scope.read_1,
    ),
)  # fmt: skip
_BY_TENSORS = (
    Format("OpenAI", "a .pt with pre_bias and latent_bias", holding("pre_bias", "latent_bias"), openai.read),
    Format("Goodfire", "a .pt or .pth with encoder_linear.weight", holding("encoder_linear.weight"), goodfire.read),
    Format("Qwen-Scope", "layerN.sae.pt with W_enc and W_dec", holding("W_enc", "W_dec"), qwen_scope.read),
)
FORMATS = _BY_NAMES + _BY_TENSORS
WRITERS: dict[str, Callable[[Dictionary, Path], Path]] = {
    "sparsify": sparsify.write,
    "dictionary_learning": dictionary_learning.write,
    "gemma-scope": gemma_scope.write,
    "circuit-tracer": circuit_tracer.write,
}
"""What writes a dictionary into a folder, and returns where it is to be read; SAELens' layout is our own."""


def found(path: Path) -> tuple[Format, Path]:
    """The format of a folder or a file, and its file of weights. Raises ValueError where it is of none, and where it holds several."""
    if not path.exists():
        raise ValueError(f"{path} is not there; expected the folder of an SAE, or its file")
    for format in FORMATS:
        if weights := format.weights(path):
            return format, weights
    if below := _below(path):
        raise ValueError(f"{path} holds no SAE itself, but {', '.join(map(str, below))}; give the path of one")
    raise ValueError(
        f"{path} holds no SAE; looked for {'; '.join(f'{format.holds} ({format.name})' for format in FORMATS)}"
    )


def _below(folder: Path) -> list[Path]:
    """Folders up to three levels below that hold an SAE in files of fixed names, the first ten."""
    folders = [each for levels in ("*", "*/*", "*/*/*") for each in sorted(folder.glob(levels)) if each.is_dir()]
    return [each for each in folders if any(format.weights(each) for format in _BY_NAMES)][:10]

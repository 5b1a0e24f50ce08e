"""SAEs out of here: `saebench convert` writes one in another's format, from any that is read.

Nothing is folded that would change activations: decoder rows of TopK keep their norms, by which the selection would change.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from saebench.sae.formats import CONFIG, WRITERS, Dictionary, check_expressible, check_free
from saebench.sae.hub import SaePath
from saebench.sae.io import ends_of, load_sae, read_config, save_sae

Target = Literal["saelens", "sparsify", "dictionary_learning", "gemma-scope", "circuit-tracer"]


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Which SAE to write, and in whose format."""

    sae: SaePath
    """SAE, in any format that is read"""
    to: Target
    """whose format to write"""
    out: Path
    """folder to write into; sparsify's gets one named after the module, circuit-tracer's one more layer"""
    hook: str | None = None
    """hook that the SAE reads, where its files do not say"""
    model: str | None = None
    """model that the SAE is of, where its files do not say"""


def convert(config: ConvertConfig) -> Path:
    """Write an SAE in another's format; returns where it is to be read: a folder, of circuit-tracer a file.

    Raises ValueError, and writes nothing, for what that format cannot express, and where a file is there already.
    """
    said = read_config(config.sae, hook=config.hook, model=config.model)
    ends, sae = ends_of(config.sae, said), load_sae(config.sae)
    given = Dictionary(sae, ends.reads[0], ends.writes[0], said["metadata"])
    return (_write_saelens if config.to == "saelens" else WRITERS[config.to])(given, config.out)


def _write_saelens(given: Dictionary, folder: Path) -> Path:
    """What SAELens 6 has a name for, in its layout, which is ours."""
    sae = given.sae
    known = ("relu", "topk", "gated", "jumprelu") if sae.tied else ("relu", "jumprelu")
    normalize = ("none", "constant_norm_rescale", "layer_norm")
    check_expressible("saelens", sae, known, transcoders=True, skip=True, normalize=normalize)
    check_free(folder / CONFIG)
    save_sae(sae, folder, given.metadata)
    return folder

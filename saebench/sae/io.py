"""SAEs on disk, in SAELens' layout: `cfg.json` and `sae_weights.safetensors`.

Every directory written here opens in SAELens 6 and the tools built on it. Provenance and evaluation
sit in the `metadata` of `cfg.json`.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from saebench.files import read_json, replacing, write_json
from saebench.sae.architectures import ARCHITECTURES, SAE, GatedSAE, ReLUSAE, new_sae

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
SAELENS_VERSION = "6.0.0"  # the version of the layout, which SAELens reads to choose its loader

_FROM_SAELENS = {sae.saved_as: name for name, sae in ARCHITECTURES.items()}


@torch.no_grad()
def fold(sae: SAE, input_scale: float = 1.0) -> None:
    """Bring a trained SAE into the form that is saved: unit decoder rows, inputs as the model has them.

    `input_scale` is the factor that inputs were multiplied with in training. Reconstructions do not
    change but for that factor; activations become lengths along unit directions.
    """
    norms = sae.W_dec.norm(dim=1)
    sae.rescale_latents(torch.where(norms > 0, norms, torch.ones_like(norms)))
    sae.rescale_input(input_scale)


def save_sae(sae: SAE, folder: Path, metadata: dict[str, Any]) -> None:
    """Write the SAE's directory. `metadata` must name `model_name`, `hook_name` and `context_size`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in sae.state_dict().items()}
    with replacing(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary)
    config = {
        "architecture": sae.saved_as,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": sae.normalize,
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": SAELENS_VERSION, **metadata},
    }
    if hasattr(sae, "k"):
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    write_json(folder / CONFIG, config)


def read_config(folder: Path | str) -> dict[str, Any]:
    """`cfg.json` of an SAE directory. Raises ValueError when there is none."""
    path = Path(folder) / CONFIG
    if not path.exists():
        raise ValueError(f"{folder} holds no SAE (no {CONFIG}); expected a directory with {CONFIG} and {WEIGHTS}")
    return read_json(path)


def update_metadata(folder: Path, **values: Any) -> None:
    """Add entries to the metadata of an SAE on disk."""
    config = read_config(folder)
    config["metadata"] |= values
    write_json(folder / CONFIG, config)


def load_sae(folder: Path | str, *, device: str = "cpu") -> SAE:
    """Load an SAE written here or by SAELens 6 (standard, topk, gated, jumprelu), in float32.

    What SAELens keeps as a flag is folded into the weights: no pre-bias, and activations rescaled by
    decoder norms. The reconstruction is SAELens' own. Raises ValueError for a directory that is not
    an SAE, an architecture or option this version cannot represent, and weights that do not fit.
    """
    folder = Path(folder)
    config = read_config(folder)
    missing = [name for name in ("architecture", "d_in", "d_sae") if name not in config]
    if missing:
        raise ValueError(f"{folder / CONFIG} lacks {', '.join(missing)}; it is not the configuration of an SAE")
    architecture = _FROM_SAELENS.get(config["architecture"])
    if architecture is None:
        raise ValueError(
            f"{folder} has architecture {config['architecture']!r}; this version loads {', '.join(_FROM_SAELENS)}"
        )
    if config.get("reshape_activations", "none") != "none":
        raise ValueError(
            f"{folder} reads reshaped activations ({config['reshape_activations']!r}); only residual-stream vectors are supported"
        )
    normalize = config.get("normalize_activations", "none")
    if normalize not in ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm"):
        raise ValueError(f"{folder} normalises its inputs by {normalize!r}, which is not known here")
    if ARCHITECTURES[architecture].takes_k and "k" not in config:
        raise ValueError(f"{folder / CONFIG} has no k; a {architecture} SAE cannot be used without it")
    # SAELens does not apply `expected_average_only_in` at inference: it is folded at save.
    normalize = "none" if normalize == "expected_average_only_in" else normalize
    sae = new_sae(architecture, config["d_in"], config["d_sae"], k=config.get("k"), normalize=normalize)
    try:
        tensors = load_file(folder / WEIGHTS)
        sae.load_state_dict({name: value.float() for name, value in tensors.items()})
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS} does not hold the weights of this SAE: {error}") from error
    _fold_flags(sae, config)
    return sae.to(device).eval().requires_grad_(False)


@torch.no_grad()
def _fold_flags(sae: SAE, config: dict[str, Any]) -> None:
    if not config.get("apply_b_dec_to_input", True):
        shift_F = sae.b_dec @ sae.W_enc
        if isinstance(sae, GatedSAE):
            sae.b_gate += shift_F
            sae.b_mag += shift_F * sae.r_mag.exp()
        else:
            assert isinstance(sae, ReLUSAE)
            sae.b_enc += shift_F
    if config.get("rescale_acts_by_decoder_norm", False):
        # SAELens selects among pre-activations times ‖d‖ and divides by ‖d‖ again when decoding.
        norms = sae.W_dec.norm(dim=1)
        sae.rescale_latents(torch.where(norms > 0, norms, torch.ones_like(norms)))

"""SAEs and their kin on disk: written in SAELens' layout, `cfg.json` and `sae_weights.safetensors`, and read in that of anyone (`formats/`).

SAEs, and transcoders of ReLU and JumpReLU between two hooks, open in SAELens 6 and the tools built on it. What it has no name
for has one of the same form (`topk_skip_transcoder`, `jumprelu_crosscoder`), and `parts`, the widths of the hooks written, where
there are several. Which hooks are read and written, provenance and evaluation sit in the `metadata` of `cfg.json`.
"""

import contextlib
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from saebench.files import hash_files, read_json, replacing, write_json
from saebench.sae.architectures import ARCHITECTURES, SAE, Normalize, Writes, new_sae
from saebench.sae.formats import CONFIG, WEIGHTS, Config, check, found, normalize_of, with_said

SAELENS_VERSION = "6.0.0"  # the version of the layout, which SAELens reads to choose its loader

_KINDS = ("", "transcoder", "skip_transcoder", "crosscoder")


def _name_on_disk(architecture: str, kind: str) -> str:
    """SAELens' where it has one, whose transcoders are ReLU ones unless they say otherwise."""
    if not kind:
        return ARCHITECTURES[architecture].saved_as
    return kind if architecture == "relu" else f"{architecture}_{kind}"


_ON_DISK = {
    _name_on_disk(architecture, kind): (architecture, kind) for kind in _KINDS for architecture in ARCHITECTURES
}


class Ends(NamedTuple):
    """The hooks that a dictionary reads and writes; vectors of several are one behind the other."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]

    @property
    def tied(self) -> bool:
        """Whether it writes what it reads."""
        return self.reads == self.writes

    @property
    def hooks(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(dict.fromkeys(self.reads + self.writes))

    def __str__(self) -> str:
        read, written = (" + ".join(hooks) for hooks in self)
        return read if self.tied else f"{read} → {written}"


def ends_of(folder: Path, config: Config) -> Ends:
    """The hooks that the `cfg.json` of a directory names. Raises ValueError where it names none, or not what is written."""
    metadata = config.get("metadata", {})
    if "reads" in metadata:
        return Ends(tuple(metadata["reads"]), tuple(metadata["writes"]))
    if not metadata.get("hook_name"):
        raise ValueError(
            f"{folder} does not say which hook it reads: give it with --hook, or add metadata.hook_name to its {CONFIG}"
        )
    kind = _ON_DISK.get(config.get("architecture", ""), ("", ""))[1]
    if kind.endswith("transcoder") and not metadata.get("hook_name_out"):
        raise ValueError(f"{folder} does not say which hook it writes: add metadata.hook_name_out to its {CONFIG}")
    if kind == "crosscoder":
        raise ValueError(
            f"{folder} does not say which hooks it reads and writes: add metadata.reads and metadata.writes to its {CONFIG}"
        )
    written = metadata["hook_name_out"] if kind else metadata["hook_name"]
    return Ends((metadata["hook_name"],), (written,))


def kind_of(sae: SAE) -> str:
    """`transcoder`, `skip_transcoder` or `crosscoder`; empty for an SAE."""
    if not sae.tied:
        return "skip_transcoder" if sae.writes.skip else "transcoder"
    return "crosscoder" if len(sae.parts) > 1 else ""


@torch.no_grad()
def fold(
    sae: SAE, scale_D: float | Float[Tensor, " D"] = 1.0, scale_E: float | Float[Tensor, " E"] | None = None
) -> None:
    """Bring a trained SAE into the form that is saved: unit decoder rows, vectors as the model has them.

    `scale_D` and `scale_E` (default: the same) are the factors that what is read and written was multiplied with in training. Reconstructions do
    not change but for them; activations become lengths along unit directions.
    """
    scale_E = scale_D if scale_E is None else scale_E
    whole = (
        float(scale_E[0]) if isinstance(scale_E, Tensor) else scale_E
    )  # the rest is 1 for an SAE, and changes no bit
    sae.fold_mean()
    sae.rescale_hooks(scale_D / whole, scale_E / whole)
    norms = sae.W_dec.norm(dim=1)
    sae.rescale_latents(torch.where(norms > 0, norms, torch.ones_like(norms)))
    sae.rescale_input(whole)


def save_sae(sae: SAE, folder: Path, metadata: dict[str, Any]) -> None:
    """Write the SAE's directory. `metadata` must name `model_name`, `hook_name` and `context_size`; of a transcoder
    `hook_name_out`, too, and where there are several hooks all that it `reads` and `writes`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (value.T if name == "W_skip" else value).detach().cpu().contiguous()
        for name, value in sae.state_dict().items()
    }
    with replacing(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary)
    config = {
        "architecture": _name_on_disk(sae.architecture, kind_of(sae)),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.tied,
        "normalize_activations": sae.normalize,
        "reshape_activations": "hook_z" if str(metadata.get("hook_name")).endswith("hook_z") else "none",
        "metadata": {"sae_lens_version": SAELENS_VERSION, **metadata},
    }
    if not sae.tied:
        config["d_out"] = sae.d_out
    if len(sae.parts) > 1:
        config["parts"] = list(sae.parts)
    if hasattr(sae, "k"):
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    write_json(folder / CONFIG, config)


def read_config(folder: Path | str, *, hook: str | None = None, model: str | None = None) -> Config:
    """What `cfg.json` says of a dictionary, or would say of one in another's format, by its folder or file.

    `hook` and `model` are given of one whose files do not say which it reads, and of which. Raises ValueError where there is none, and where
    its files say another than is given.
    """
    format, weights = found(Path(folder))
    config = format.read(weights).config
    given = {name: value for name, value in (("hook_name", hook), ("model_name", model)) if value is not None}
    for name, value in given.items():
        there = (config.get("metadata") or {}).get(name)
        if there not in (None, value):
            raise ValueError(f"{folder} says {name} {there!r}, and {value!r} is given; leave out what its files say")
    return with_said(config, given) if given else config


def files_of(folder: Path | str) -> list[Path]:
    """The files that a dictionary is in: its weights and, where there are any, what says what they are."""
    _, weights = found(Path(folder))
    beside = [weights.parent / name for name in (CONFIG, "config.json")] + [weights.parent.parent / "hyperparams.json"]
    return [*(file for file in beside if file.exists()), weights]


def weights_of(folder: Path | str) -> list[Path]:
    """The files that a dictionary's weights are in. Raises ValueError where there is no dictionary."""
    format, weights = found(Path(folder))
    return [weights, *format.more(weights)]


def written_here(folder: Path | str) -> bool:
    """Whether a folder is as `save_sae` writes it, so that evaluations and more can be written into it."""
    _, weights = found(Path(folder))
    return (
        weights.name == WEIGHTS
        and (weights.parent / CONFIG).exists()
        and "metadata" in read_json(weights.parent / CONFIG)
    )


def take_in(
    source: Path, saes: Path, *, hook: str | None = None, model: str | None = None, store: Path | None = None
) -> Path:
    """Write a dictionary in another's format into the folder `saes` of a run as ours, named after its path; returns its directory.

    `store` is noted as what it is of. One that was taken in already is left as it is. Raises ValueError where neither
    its files nor `hook` say what it reads.
    """
    said = {"path": str(source.absolute()), "weights": hash_files(weights_of(source))}
    config = read_config(source, hook=hook, model=model)
    ends_of(source, config)
    metadata = config["metadata"] | {"source": said}
    parts = [*source.absolute().parent.parts[1:], source.name if source.is_dir() else source.stem]
    for length in range(1, len(parts) + 1):
        folder = saes / "-".join(parts[-length:])
        if not folder.exists():
            save_sae(load_sae(source), folder, metadata | ({"saebench": {"store": str(store)}} if store else {}))
        elif read_config(folder)["metadata"].get("source") != said:
            continue  # of another folder of this name: one more of its path makes it another
        return folder
    raise ValueError(f"{saes} holds other SAEs under every name of {source}; choose another run")


def update_metadata(folder: Path, **values: Any) -> None:
    """Add entries to the metadata of an SAE on disk."""
    config = read_config(folder)
    config["metadata"] |= values
    write_json(folder / CONFIG, config)


def load_sae(folder: Path | str, *, device: str = "cpu", said: Config | None = None) -> SAE:
    """Load an SAE, transcoder or crosscoder in float32, by its folder or file, in any of the formats that `formats/` reads.

    What is a flag on disk is folded into the weights: no pre-bias, and activations rescaled by
    decoder norms. The reconstruction is that of the package that wrote it. `said` are fields of its configuration that are
    known from elsewhere, such as a list of releases, and take the place of its own. Raises ValueError for a path that holds
    no SAE, an architecture or option this version cannot represent, and weights that do not fit.
    """
    format, weights = found(Path(folder))
    config, tensors = format.read(weights)
    config, folder = with_said(config, said) if said else config, weights.parent
    missing = [name for name in ("architecture", "d_in", "d_sae") if config.get(name) is None]
    if missing:
        raise ValueError(f"{folder / CONFIG} lacks {', '.join(missing)}; it is not the configuration of an SAE")
    if config["architecture"] not in _ON_DISK:
        raise ValueError(
            f"{folder} has architecture {config['architecture']!r}; this version loads {', '.join(_ON_DISK)}"
        )
    architecture, kind = _ON_DISK[config["architecture"]]
    normalize = normalize_of(folder / CONFIG, config)
    if normalize not in get_args(Normalize):
        raise ValueError(f"{folder} normalises its inputs by {normalize!r}, which is not known here")
    check(folder / CONFIG, config)
    if ARCHITECTURES[architecture].takes_k and config.get("k") is None:
        raise ValueError(f"{folder / CONFIG} has no k; a {architecture} SAE cannot be used without it")
    sae = new_sae(
        architecture,
        config["d_in"],
        config["d_sae"],
        k=config.get("k"),
        normalize=cast(Normalize, normalize),
        writes=_writes(folder, config, kind),
    )
    held = tensors()
    if "W_skip" in held:
        held["W_skip"] = held["W_skip"].T
    try:
        sae.load_state_dict({name: value.float() for name, value in held.items()})
    except RuntimeError as error:
        raise ValueError(f"{weights} does not hold the weights of this SAE: {error}") from error
    _fold_flags(sae, config)
    if config.get("norm_scaling_factor") and config.get("normalize_activations") == "expected_average_only_in":
        sae.rescale_hooks(
            config["norm_scaling_factor"], config["norm_scaling_factor"]
        )  # its activations stay, as in SAELens
    with contextlib.suppress(ValueError):  # some name no hook
        sae.ends = ends_of(folder, config)
    return sae.to(device).eval().requires_grad_(False)


def _writes(folder: Path, config: dict[str, Any], kind: str) -> Writes:
    """What `cfg.json` says of it."""
    parts = tuple(config.get("parts", ()))
    if not kind.endswith("transcoder"):
        if (len(parts) > 1) != (kind == "crosscoder"):
            raise ValueError(
                f"{folder / CONFIG} has parts {parts}; expected those of two hooks or more of a crosscoder, and of no SAE"
            )
        return Writes(parts=parts)
    if "d_out" not in config:
        raise ValueError(f"{folder / CONFIG} has no d_out; a transcoder cannot be used without it")
    if config.get("apply_b_dec_to_input", True):
        raise ValueError(
            f"{folder / CONFIG} says apply_b_dec_to_input; expected false of a transcoder, whose b_dec is written alone"
        )
    return Writes(d_out=config["d_out"], skip=kind == "skip_transcoder", parts=parts)


@torch.no_grad()
def _fold_flags(sae: SAE, config: dict[str, Any]) -> None:
    if sae.tied and not config.get("apply_b_dec_to_input", True):
        sae.shift_projections(sae.b_dec @ sae.W_enc)
    if config.get("rescale_acts_by_decoder_norm", False):
        # SAELens selects among pre-activations times ‖d‖ and divides by ‖d‖ again when decoding.
        norms = sae.W_dec.norm(dim=1)
        sae.rescale_latents(torch.where(norms > 0, norms, torch.ones_like(norms)))

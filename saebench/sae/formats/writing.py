"""What the writers of all formats need: what a format cannot express, refused by name, and weights without a pre-bias."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from saebench.files import replacing
from saebench.sae.architectures import SAE, JumpReLUSAE
from saebench.sae.formats.reading import Config, Tensors


class Dictionary(NamedTuple):
    """What is to be written in another's format."""

    sae: SAE
    reads: str
    """the hook"""
    writes: str
    metadata: Config

    @property
    def layer(self) -> str:
        """Of the hook that is read."""
        return self.reads.split(".")[1]


def refuse(to: str, what: str) -> NoReturn:
    raise ValueError(f"{to} cannot express {what}; choose another format with --to, of which saelens has the most")


def check_expressible(
    to: str,
    sae: SAE,
    architectures: Collection[str],
    *,
    saes: bool = True,
    transcoders: bool = False,
    skip: bool = False,
    several: bool = False,
    normalize: Collection[str] = ("none",),
) -> None:
    """Raises ValueError for what a format does not have: the first thing that would make another dictionary of this one."""
    if len(sae.parts) > 1 and not several:
        refuse(to, f"what is written to {len(sae.parts)} hooks")
    if sae.tied and not saes:
        refuse(to, "an SAE (it has transcoders alone)")
    if not sae.tied and not transcoders:
        refuse(to, "a transcoder")
    if sae.architecture not in architectures:
        kind = "an SAE" if sae.tied else "a transcoder"
        refuse(to, f"{kind} of architecture {sae.architecture!r} (it has {', '.join(architectures)})")
    if sae.W_skip is not None and not skip:
        refuse(to, "W_skip, a linear map beside the latents")
    if sae.normalize not in normalize:
        refuse(to, f"inputs normalised by {sae.normalize!r}")


def site_of(to: str, hook: str, sites: dict[str, str]) -> str:
    """What a format calls the place of a hook within its layer. Raises ValueError where it has no name for it."""
    match = re.fullmatch(r"blocks\.\d+\.(.+)", hook)
    if match is None or match[1] not in sites:
        refuse(to, f"the hook {hook!r} (it has names for blocks.N.{', blocks.N.'.join(sites)})")
    return sites[match[1]]


def b_enc_without_pre_bias(sae: SAE) -> Float[Tensor, " F"]:
    """b_enc of the same dictionary of inputs from which nothing is taken off."""
    b_enc: Any = sae.b_enc
    return (b_enc.double() - sae.b_pre.double() @ sae.W_enc.double()).float()


def thresholds(sae: SAE) -> Float[Tensor, " F"]:
    """Those of JumpReLU, and 0 of ReLU; none is below 0, where some formats would let negative activations through."""
    return sae.threshold.clamp(min=0) if isinstance(sae, JumpReLUSAE) else torch.zeros_like(sae.W_dec[:, 0])


def plain(tensors: Tensors) -> Tensors:
    """On the CPU, one behind the other in memory, and of no graph."""
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def save(tensors: Tensors, file: Path) -> Path:
    """Write a `.safetensors` and return it. Raises ValueError where there is one."""
    check_free(file)
    with replacing(file) as temporary:
        save_file(plain(tensors), temporary)
    return file


def check_free(file: Path) -> None:
    """Makes the folder of a file. Raises ValueError where the file is there."""
    if file.exists():
        raise ValueError(f"{file} is there already; choose another --out, or delete it")
    file.parent.mkdir(parents=True, exist_ok=True)

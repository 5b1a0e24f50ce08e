"""Sparse autoencoders: architectures as maths, and their files."""

from saebench.sae.architectures import (
    SAE,
    GatedSAE,
    JumpReLUSAE,
    ReLUSAE,
    SAEOutput,
    TopKSAE,
    Writes,
    initialise,
    new_sae,
    topk_relu,
)
from saebench.sae.encode import encode_sparse, latent_encoder, part, reconstruct_sparse
from saebench.sae.io import (
    Ends,
    check_autoencodes,
    ends_of,
    fold,
    kind_of,
    load_sae,
    read_config,
    save_sae,
    update_metadata,
)

__all__ = [
    "SAE",
    "Ends",
    "GatedSAE",
    "JumpReLUSAE",
    "ReLUSAE",
    "SAEOutput",
    "TopKSAE",
    "Writes",
    "check_autoencodes",
    "encode_sparse",
    "ends_of",
    "fold",
    "initialise",
    "kind_of",
    "latent_encoder",
    "load_sae",
    "new_sae",
    "part",
    "read_config",
    "reconstruct_sparse",
    "save_sae",
    "topk_relu",
    "update_metadata",
]

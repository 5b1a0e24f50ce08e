"""Which latents of other dictionaries feed a latent, and which it feeds, by weights alone.

A latent g that writes d into the stream feeds one that reads it later by d · e, with e the column of its encoder: by how much a unit of g's
activation moves its pre-activation along the direct path. What lies between is ignored: norms with their gains, what layers between
make of d, and whether the two ever fire on one token.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saebench.index.decoder import to_stream
from saebench.models import depth
from saebench.sae import SAE, Ends, ends_of, load_sae, read_config
from saebench.sae.io import CONFIG


class Connection(NamedTuple):
    """A latent of another dictionary, and the weight between the two."""

    sae: str
    """name of its directory, beside that of the other"""
    latent: int
    weight: float


class Connections(NamedTuple):
    """Of one latent, the largest by size first."""

    fed_by: list[Connection]
    feeds: list[Connection]


def connected(folder: Path) -> dict[str, Ends]:
    """The dictionaries beside one that write into the stream before it reads, or read it after it writes, by name.

    They are of the same model, and of the same set where it is in one (`metadata.set`). What cannot be read is left out.
    """
    own, found = read_config(folder), {}
    ends = ends_of(folder, own)
    for path in sorted(folder.parent.glob(f"*/{CONFIG}")):
        try:
            config = read_config(path.parent)
            theirs = ends_of(path.parent, config)
        except ValueError:
            continue
        same = all(config["metadata"].get(name) == own["metadata"].get(name) for name in ("model_name", "set"))
        if same and (_comes_before(theirs, ends) or _comes_before(ends, theirs)):
            found[path.parent.name] = theirs
    return found


def connections(folder: Path, latent: int, size: int = 10) -> Connections:
    """The `size` strongest each way, by a product with the weights of each of `connected`, one after the other.

    Raises ValueError for a latent that is not there.
    """
    sae, ends = load_sae(folder), ends_of(folder, read_config(folder))
    if not 0 <= latent < sae.d_sae:
        raise ValueError(f"latent is {latent}; {folder} has 0 to {sae.d_sae - 1}")
    fed_by: list[Connection] = []
    feeds: list[Connection] = []
    for name, theirs in connected(folder).items():
        other = load_sae(folder.parent / name)
        fed_by += _strongest(name, _weights(other, theirs, sae, ends, read=latent), size)
        feeds += _strongest(name, _weights(sae, ends, other, theirs, written=latent), size)
    return Connections(*(sorted(some, key=lambda one: -abs(one.weight))[:size] for some in (fed_by, feeds)))


def _comes_before(first: Ends, second: Ends) -> bool:
    """Whether something is written before something else is read."""
    return min(map(depth, first.writes)) < max(map(depth, second.reads))


@torch.no_grad()
def _weights(
    first: SAE, first_ends: Ends, second: SAE, second_ends: Ends, *, written: int | None = None, read: int | None = None
) -> Float[Tensor, " n"] | None:
    """Between all latents of `first`, or the one `written`, and those of `second`, or the one `read`; None where nothing leads there."""
    total = None
    columns_GD = second.W_enc.T if read is None else second.W_enc.T[read, None]
    for hook, part_GM in zip(second_ends.reads, columns_GD.chunk(len(second_ends.reads), 1), strict=True):
        rows_FM = to_stream(first, first_ends.writes, before=hook)
        if rows_FM is not None:
            rows_FM = rows_FM if written is None else rows_FM[written, None]
            found = (rows_FM @ part_GM.T).flatten()
            total = found if total is None else total + found
    return total


def _strongest(name: str, weights: Float[Tensor, " n"] | None, size: int) -> list[Connection]:
    if weights is None:
        return []
    best = weights.abs().topk(min(size, len(weights))).indices
    return [Connection(name, int(latent), float(weights[latent])) for latent in best]

"""A map of an SAE's latents: those whose decoder rows are near lie near in two dimensions, by t-SNE, as far as two can hold it.

(van der Maaten and Hinton 2008; openTSNE's Fourier approximation, Linderman et al. 2019.) Legend: F latents, D d_in, N neighbours.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saebench.files import read_json, write_json, writing
from saebench.index.plan import IndexConfig
from saebench.index.reader import FeatureIndex, open_feature_index
from saebench.index.schema import check_identity
from saebench.runlog import interruptible, progress
from saebench.sae import load_sae
from saebench.sae.hub import SaePath
from saebench.sae.sparse import rows_of_a_block

_SCHEMA, _VERSION = "saebench-map", 1
_EARLY, _STEPS, _TOLD = 150, 350, 10  # steps with attraction exaggerated, steps after them, steps between two notes
_REMEDY = "make it again with `saebench map`"


@dataclass(frozen=True, kw_only=True)
class MapConfig:
    """Which SAE to lay out."""

    sae: SaePath
    """SAE directory"""
    index: Path | None = None
    """index file (default: index/NAME.h5 beside the folder saes/ that holds the SAE)"""


class LatentMap(NamedTuple):
    """Where each latent lies."""

    places: np.ndarray
    """`[F, 2]`"""
    recall: float
    """mean share of a latent's 20 nearest decoder rows that are among its 20 nearest on the map"""


def map_path(index: Path) -> Path:
    """`<sae>.map.json` beside the index."""
    return index.with_suffix(".map.json")


def make_map(config: MapConfig) -> Path | None:
    """Lay out the latents of an indexed SAE and write `map_path`; None where Ctrl-C ended it early, and nothing is kept.

    Raises ValueError where openTSNE is not installed, and for an SAE without an index.
    """
    try:
        import openTSNE
        import openTSNE.affinity
        from openTSNE.nearest_neighbors import PrecomputedNeighbors
    except ImportError as error:
        raise ValueError("a map is laid out with openTSNE: pip install 'saebench[map]'") from error
    path = config.index or IndexConfig(sae=config.sae).path
    with open_feature_index(path, sae=config.sae, need_store=False) as index:
        ids_FN, cosines_FN = index.neighbours
    ids_FN, cosines_FN = ids_FN[:, : len(ids_FN) - 1], cosines_FN[:, : len(ids_FN) - 1]
    apart_FN = np.sqrt(np.maximum(2 - 2 * cosines_FN.astype(np.float64), 0))
    near = openTSNE.affinity.PerplexityBasedNN(  # of one thread, so that places are the same again, and it is fast beside others' work
        knn_index=PrecomputedNeighbors(ids_FN, apart_FN), perplexity=(ids_FN.shape[1] - 0.5) / 3, n_jobs=1
    )
    begun_F2 = _principal(load_sae(config.sae).W_dec.detach().float())
    with interruptible() as interrupt, progress(_EARLY + _STEPS, f"map {path.stem}", "step") as bar:

        def step(*_: Any) -> bool:
            bar.update(_TOLD)
            return interrupt.requested

        tsne = openTSNE.TSNE(
            early_exaggeration_iter=_EARLY, n_iter=_STEPS, n_jobs=1, random_state=0, negative_gradient_method="fft",
            callbacks=step, callbacks_every_iters=_TOLD,
        )  # fmt: skip
        places_F2 = np.asarray(tsne.fit(affinities=near, initialization=begun_F2)).round(3)
    if interrupt.requested:
        return None
    body = {"sae": index.identity["sae"], "recall": _recall(ids_FN, places_F2), "places": places_F2.tolist()}
    with writing(map_path(path)):
        write_json(map_path(path), {"schema": _SCHEMA, "schema_version": _VERSION, **body})
    return map_path(path)


def read_map(index: FeatureIndex) -> LatentMap | None:
    """What `make_map` wrote; None where it was not made. Raises ValueError for a file of another SAE, or that holds no map."""
    path = map_path(index.path)
    if not path.exists():
        return None
    found: Any = read_json(path)
    if not isinstance(found, dict) or found.get("schema") != _SCHEMA or found.get("schema_version") != _VERSION:
        raise ValueError(f"{path} is no map of version {_VERSION}: {_REMEDY}")
    check_identity(path, {"sae": str(found.get("sae"))}, {"sae": index.identity["sae"]}, _REMEDY)
    try:
        made = LatentMap(np.array(found["places"], np.float64), float(found["recall"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no places of latents: {_REMEDY}") from error
    if made.places.shape != (index.d_sae, 2):
        raise ValueError(f"{path} holds places {made.places.shape}; expected {(index.d_sae, 2)}: {_REMEDY}")
    return made


def _principal(W_dec_FD: Float[Tensor, "F D"]) -> Float[np.ndarray, "F 2"]:
    """Unit decoder rows along their two widest directions, as small as t-SNE wants to begin with."""
    rows_FD = torch.nn.functional.normalize(W_dec_FD, dim=1)
    rows_FD = rows_FD - rows_FD.mean(0)
    along_F2 = rows_FD @ torch.linalg.eigh(rows_FD.T @ rows_FD).eigenvectors[:, -2:]
    return (along_F2 / along_F2[:, 1].std() * 1e-4).double().numpy()


def _recall(ids_FN: Int[np.ndarray, "F N"], places_F2: Float[np.ndarray, "F 2"]) -> float:
    """Mean share of each latent's neighbours that are as many nearest places."""
    places, found, n = torch.from_numpy(places_F2), 0, ids_FN.shape[1]
    step = rows_of_a_block(len(places), places.device)
    for first in range(0, len(places), step):
        apart_BF = torch.cdist(places[first : first + step], places)
        here = torch.arange(len(apart_BF))
        apart_BF[here, here + first] = torch.inf
        near_BN = apart_BF.topk(n, dim=1, largest=False).indices
        ids_BN = torch.from_numpy(ids_FN[first : first + step])
        found += int((near_BN[:, :, None] == ids_BN[:, None]).sum())
    return found / ids_FN.size

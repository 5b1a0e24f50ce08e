"""What probes read: the latents of an SAE, and what stands beside them that was never trained to be sparse.

Suffixes: N rows, F features, D the width of what is read.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse

from saebench.bench.protocol import Features
from saebench.bench.tasks import Hooks, Reader, Vectors, neurons_hook
from saebench.evaluate.baselines import PCA, joined
from saebench.evaluate.diffing import is_of_two_models
from saebench.evaluate.report import short_names
from saebench.files import hash_files
from saebench.sae import (
    SAE,
    Ends,
    Writes,
    encode_sparse,
    ends_of,
    initialise,
    load_sae,
    new_sae,
    read_config,
    weights_of,
)
from saebench.store import Store
from saebench.store.norms import usual_moments
from saebench.store.source import store_for

_log = logging.getLogger(__name__)

_L0_ROWS = 4096  # held-out rows that an SAE's L0 is of
_ALIKE = 0.1  # of L0, between SAEs that one untrained SAE stands beside


class Reading(NamedTuple):
    """What probes read: an SAE, or a baseline beside those of the same hooks."""

    name: str
    hooks: Hooks
    of: Hooks
    """hooks of the SAEs that it is held against, its own where it is one"""
    encode: Callable[[Vectors], Features]
    identity: dict[str, Any]
    """what decides its features"""
    baseline: bool = True
    dense: bool = False
    """whether a probe reads all of it, whatever k"""


def _sparse(sae: SAE, hooks: Hooks, vectors: Vectors) -> Features:
    code, values = encode_sparse(sae, joined(vectors, hooks).to(sae.W_enc.device))
    return sparse.csr_array(
        (values.cpu().numpy(), code.latents.cpu().numpy(), code.offsets.cpu().numpy()), (code.n_rows, sae.d_sae)
    )


def _whole(hooks: Hooks, vectors: Vectors) -> Features:
    return sparse.csr_array(joined(vectors, hooks).numpy())


def _components(pca: Callable[[], PCA], hooks: Hooks, vectors: Vectors) -> Features:
    fitted = pca()
    x_ND = joined(vectors, hooks).to(fitted.mean_D.device) * fitted.scale_D - fitted.mean_D
    return sparse.csr_array((x_ND @ fitted.components_DD).cpu().numpy())


def untrained_sae(store: Store, ends: Ends, d_sae: int, k: int, seed: int) -> SAE:
    """A TopK dictionary as training begins it, for vectors as the store has them: what they are scaled by in training changes none of its latents."""
    mean_D, mean_E = (
        torch.from_numpy(np.concatenate([usual_moments(store, hook)[0] for hook in hooks])).float() for hooks in ends
    )
    writes = Writes(d_out=None if ends.tied else len(mean_E), parts=tuple(store.d_in(hook) for hook in ends.writes))
    sae = new_sae("topk", len(mean_D), d_sae, k=k, writes=writes)
    initialise(sae, mean_D, torch.Generator().manual_seed(seed), mean_E=mean_E)
    return sae.eval().requires_grad_(False)


def l0_of(sae: SAE, reads: Hooks, store: Store, known: Iterable[int] = ()) -> int:
    """How many latents are active on held-out rows, to the nearest whole number from 1; or what is `known` of other SAEs, if that is within a tenth."""
    rows, active = 0, 0
    for some in store.joint_rows(reads, "validation", first=_L0_ROWS):
        code, _ = encode_sparse(sae, joined(some, reads).to(sae.W_enc.device))
        rows, active = rows + code.n_rows, active + len(code.latents)
    l0 = active / max(rows, 1)
    near = (k for k in known if abs(k - l0) <= _ALIKE * l0)
    return next(near, min(max(1, round(l0)), sae.d_sae))


def _names(folders: Sequence[Path]) -> list[str]:
    """Those of SAEs, with their run's before them where two are called the same. Raises ValueError where that does not tell them apart."""
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [f"{folder.parent.parent.name}/{folder.name}" for folder in (folder.resolve() for folder in folders)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"two SAEs are called {twice[0]!r}; expected names of their own: rename a folder, or give each once"
        )
    return names


def dictionaries_of(store: Store, folders: Sequence[tuple[Path, Ends]], seed: int, device: str) -> list[Reading]:
    """The SAEs of a store, and behind them untrained ones as wide and as sparse."""
    found: list[Reading] = []
    untrained: dict[tuple[Hooks, int, int], Reading] = {}
    several = len({ends.reads for _, ends in folders}) > 1
    for name, (folder, ends) in zip(_names([folder for folder, _ in folders]), folders, strict=True):
        sae = load_sae(folder, device=device)
        weights = {"weights": hash_files(weights_of(folder))}
        found.append(Reading(name, ends.reads, ends.reads, partial(_sparse, sae, ends.reads), weights, False))
        alike = [k for reads, wide, k in untrained if (reads, wide) == (ends.reads, sae.d_sae)]
        if (k := l0_of(sae, ends.reads, store, alike)) in alike:
            continue
        start = f"untrained, {sae.d_sae} latents, k {k}" + (f", {' + '.join(ends.reads)}" if several else "")
        made = untrained_sae(store, Ends(ends.reads, ends.reads), sae.d_sae, k, seed)
        encode = partial(_sparse, made.to(device), ends.reads)
        untrained[ends.reads, sae.d_sae, k] = Reading(start, ends.reads, ends.reads, encode, {"seed": seed})
    return [*found, *untrained.values()]


def readings_of(
    store: Store, folders: Sequence[tuple[Path, Ends]], reader: Callable[[], Reader], seed: int, device: str
) -> list[Reading]:
    """The SAEs of a store, and the baselines of the hooks that they read."""
    several = len({ends.reads for _, ends in folders}) > 1
    found: list[Reading] = []
    for reads in dict.fromkeys(ends.reads for _, ends in folders):
        where = f", {' + '.join(reads)}" if several else ""
        found.append(Reading(f"dense{where}", reads, reads, partial(_whole, reads), {}, dense=True))
        pca = cache(partial(PCA.fit, store, reads, device))
        found.append(Reading(f"PCA{where}", reads, reads, partial(_components, pca, reads), {}))
        hook = neurons_hook(reads[0]) if len(reads) == 1 else None
        if hook is not None and reader().has(hook):
            found.append(Reading(f"neurons{where}", (hook,), reads, partial(_whole, (hook,)), {}))
    sparse_ones = dictionaries_of(store, folders, seed, device)
    n = len(folders)
    return [*sparse_ones[:n], *found, *sparse_ones[n:]]


def called(stores: Collection[Path]) -> dict[Path, tuple[str, str]]:
    """(a name, its path where two are called the same; what stands before the names of what was read from it, nothing where there is one) of each store."""
    return {store: (name, f"{name}: " if len(stores) > 1 else "") for store, name in short_names(stores).items()}


def folders_by_store(run: Path, saes: Sequence[Path], store: Path | None) -> dict[Path, list[tuple[Path, Ends]]]:
    """The directories of SAEs given, or of a run, by the store each was trained on, or all on `store`; those of two models are left out.

    Raises ValueError where there are none, or one does not say its store.
    """
    folders = list(saes) or [path.parent for path in sorted((run / "saes").glob("*/cfg.json"))]
    found: dict[Path, list[tuple[Path, Ends]]] = {}
    for folder in folders:
        ends = ends_of(folder, read_config(folder))
        if is_of_two_models(ends):
            _log.warning("%s is of two models, and is left out: what is read here are the vectors of one", folder)
            continue
        found.setdefault(store_for(folder, store), []).append((folder, ends))
    if not found:
        raise ValueError(f"{run} has no SAEs in saes/ that can be read here; train some, or give --sae")
    return found

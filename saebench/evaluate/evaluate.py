"""Evaluate SAEs on held-out documents: reconstruction, fidelity of the spliced model, baselines.

Everything is measured on the same tokens: kept positions of the store's validation contexts, whose
vectors come from the model's own clean forward pass. At special tokens and in massive rows the vectors are
left alone in every arm, ablations included; positions that start at one of them, or that a special token
follows, are not scored.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saebench.config import Count, to_json
from saebench.evaluate.baselines import PCA, untrained_fvus
from saebench.evaluate.check import look_at_others
from saebench.evaluate.measure import Batch, Measurement, Subject, silent_latents, validation_batches
from saebench.files import hash_files, read_json, write_json
from saebench.metrics import (
    SMALL_DENOMINATOR,
    density_metrics,
    fidelity_metrics,
    massive_metrics,
    near_duplicates,
    reconstruction_metrics,
    resampled,
    total,
    total_variance,
)
from saebench.models import ModelDtype, check_hook, choose_device
from saebench.runlog import progress, provenance
from saebench.sae import check_autoencodes, load_sae, read_config, take_in, update_metadata, weights_of, written_here
from saebench.sae.hub import SaePath
from saebench.store import Store, open_store
from saebench.store.norms import usual_moments
from saebench.store.source import model_of, recorded_store

EVALUATION = "evaluation.json"
_VERSION = 2  # of the figures' definitions: another one evaluates again
MASK = (
    "kept tokens of the validation documents whose vectors are not massive (neither those nor special tokens are scored, and "
    "their vectors are not replaced); losses at those of them that an ordinary token follows in their context"
)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Which SAEs to evaluate, on what."""

    run: Path
    """run directory: evaluates RUN/saes/*, and writes RUN/summary.json and RUN/report.html"""
    sae: tuple[SaePath, ...] = ()
    """SAEs elsewhere to evaluate as well, folders, files or hf:OWNER/REPO[@REVISION][/FOLDER]: of SAELens as they lie, of any other format as a copy in RUN/saes"""
    hook: str | None = None
    """hook that those of --sae read, where their files do not say"""
    model: str | None = None
    """model that those of --sae are of, where their files do not say"""
    store: Path | None = None
    """activation store (default: the one each SAE was trained on)"""
    tokens: Count = 1_000_000
    """held-out tokens to use at most"""
    dead_rows: Count = 1_000_000
    """rows in which a latent must fire once not to count as dead (held-out and training rows, where the store has as many)"""
    batch: Count = 16
    """contexts in a forward pass"""
    resamples: Count = 1000
    """bootstrap samples of documents behind each interval"""
    model_dtype: ModelDtype | None = None
    """how the model computes (default: as it did when the store was made)"""
    device: str | None = None
    """cuda or cpu (default: cuda where it is at hand)"""
    trust_remote_code: bool = False
    """run code that comes with a hub model"""
    force: bool = False
    """evaluate again what was evaluated with the same settings already"""


def evaluate(config: EvalConfig) -> list[Path]:
    """Evaluate every SAE of a run; results go into each SAE's `evaluation.json` and metadata.

    Returns the SAE directories. Clean and ablated losses are computed once per store and hook.
    Raises ValueError when there is nothing to evaluate or SAE, store and model do not belong together.
    """
    own = [path.parent for path in sorted((config.run / "saes").glob("*/cfg.json"))]
    folders = list(dict.fromkeys([*own, *(_in_reach(config, sae) for sae in config.sae)]))
    if not folders:
        raise ValueError(
            f"{config.run} has no SAEs in saes/; train some with `saebench train --out {config.run}`, or give --sae"
        )
    groups: dict[tuple[Path, str], list[Path]] = {}
    for folder in folders:
        metadata = read_config(folder).get("metadata", {})
        store = config.store or recorded_store(folder)
        if "hook_name" not in metadata:
            raise ValueError(f"{folder} does not say which hook it reads: add metadata.hook_name to its cfg.json")
        if store is None:
            raise ValueError(
                f"{folder} does not say what it was trained on; give the store to evaluate it on with --store"
            )
        groups.setdefault((Path(store), metadata["hook_name"]), []).append(folder)
    for (path, hook), members in groups.items():
        store = open_store(path)
        todo = [folder for folder in members if config.force or not _is_current(config, folder, store)]
        for folder in todo:
            look_at_others(folder, store, config.device)
        if todo:
            _evaluate_hook(config, store, hook, todo)
    return folders


def _in_reach(config: EvalConfig, sae: Path) -> Path:
    """Where the figures of an SAE can be written beside it: where it lies, or a copy."""
    if written_here(sae):
        return sae
    return take_in(sae, config.run / "saes", hook=config.hook, model=config.model, store=config.store)


def _identity(config: EvalConfig, folder: Path, store: Store) -> dict[str, Any]:
    settings = {name: to_json(config)[name] for name in ("tokens", "dead_rows", "resamples")}
    return {
        **settings,
        "model_dtype": config.model_dtype or store.manifest["identity"]["model_dtype"],
        "version": _VERSION,
        "store": store.hash,
        "weights": hash_files([weights_of(folder)]),
    }


def _is_current(config: EvalConfig, folder: Path, store: Store) -> bool:
    path = folder / EVALUATION
    return path.exists() and read_json(path)["identity"] == _identity(config, folder, store)


@torch.inference_mode()
def _evaluate_hook(config: EvalConfig, store: Store, hook: str, folders: list[Path]) -> None:
    device = choose_device(config.device, float64=True)
    model = model_of(store, device, config.model_dtype, trust_remote_code=config.trust_remote_code)
    check_hook(model, hook)
    subjects = [Subject(folder, load_sae(folder, device=device)) for folder in folders]
    for subject in subjects:
        check_autoencodes(subject.sae, subject.folder)
        if subject.sae.d_in != store.d_in(hook):
            raise ValueError(
                f"{subject.folder} takes vectors of {subject.sae.d_in}, {hook} in {store.folder} has {store.d_in(hook)}"
            )
    mean_D = torch.from_numpy(usual_moments(store, hook)[0]).float().to(device)
    pca = PCA.fit(store, hook, device)
    measured = Measurement(model, hook, mean_D, pca, subjects, store.norms(hook).bound)
    tokens = min(config.tokens, store.rows("validation"))
    with progress(tokens, f"evaluate {hook}") as bar:
        for batch in validation_batches(store, config.tokens, config.batch):
            measured.add(Batch(*(column.to(device) for column in batch)))
            bar.update(batch.tokens.numel())
    rows = int(total(measured.shared.table())["rows"])
    silent, seen = silent_latents(store, hook, subjects, max(0, config.dead_rows - rows))
    untrained = _untrained(store, hook, subjects, rows, device)
    shared, *own = resampled(
        [sums.table() for sums in (measured.shared, *(s.sums for s in subjects))], config.resamples, 0
    )
    for subject, samples, silent_F, fvu in zip(subjects, own, silent, untrained, strict=True):
        dead = {"silent": silent_F, "window": rows + seen}
        _write(config, store, subject, measured, shared | samples, dead, fvu)


def _untrained(store: Store, hook: str, subjects: list[Subject], rows: int, device: str) -> list[float]:
    """FVU of an untrained SAE of each one's width, seed and L0."""
    groups: dict[tuple[int, int], list[int]] = {}
    for place, subject in enumerate(subjects):
        seed = read_config(subject.folder)["metadata"].get("saebench", {}).get("identity", {}).get("seed", 0)
        groups.setdefault((subject.sae.d_sae, seed), []).append(place)
    fvus = [0.0] * len(subjects)
    for (d_sae, seed), places in groups.items():
        l0s = [float(total(subjects[place].sums.table())["l0"]) / rows for place in places]
        for place, fvu in zip(places, untrained_fvus(store, hook, d_sae, l0s, seed, rows, device), strict=True):
            fvus[place] = fvu
    return fvus


def _write(
    config: EvalConfig,
    store: Store,
    subject: Subject,
    measured: Measurement,
    resampled_sums: dict[str, np.ndarray],
    dead: dict[str, Any],
    untrained: float,
) -> None:
    """Turn the sums, and those of resampled documents, into metrics with intervals, and save them beside the SAE."""
    shared = measured.shared
    table = {**shared.table(), **subject.sums.table()}
    sums = total(table)
    metrics = {name: _number(value) for name, value in _metrics(sums).items()}
    intervals = {
        # One document says nothing of how documents differ.
        name: [_number(q) for q in np.quantile(values, (0.025, 0.975))] if len(shared.index) > 1 else [None, None]
        for name, values in _metrics(resampled_sums).items()
    }
    rows, l0 = int(sums["rows"]), float(sums["l0"] / sums["rows"])
    massive = int(sums.get("massive_rows", 0))
    metrics |= density_metrics(subject.fires_F.cpu(), rows)
    metrics |= {
        "dead_fraction": float(dead["silent"].double().mean()),
        "dead_window": dead["window"],
        "duplicate_fraction": near_duplicates(subject.sae.W_dec) / subject.sae.d_sae,
        "n_tokens_eval": rows,
        "massive_rows": massive,
    }
    small = [
        arm
        for arm in ("zero", "mean")
        if (sums[f"ce_{arm}"] - sums["ce_clean"]) / sums["positions"] < SMALL_DENOMINATOR
    ]
    variance = float(total_variance(sums))
    baselines = {"pca_fvu": measured.pca.fvu(l0, variance), "untrained_fvu": untrained}
    write_json(
        subject.folder / EVALUATION,
        {
            "identity": _identity(config, subject.folder, store),
            "metrics": metrics,
            "intervals": intervals,
            "interval_method": f"95%, {config.resamples} bootstrap samples of {len(shared.index)} documents",
            "baselines": baselines,
            "small_denominators": small,
            "mask": MASK,
            "sums": {name: float(value) for name, value in sums.items() if not name.endswith("vector")}
            | {
                "massive_rows": massive,
                "total_variance": variance,
                "latents": subject.sae.d_sae,
                "dead_latents": int(dead["silent"].sum()),
                "dense_latents": int((subject.fires_F > 0.01 * rows).sum()),
                "fires": int(subject.fires_F.sum()),
            },
            "provenance": provenance(),
        },
    )
    update_metadata(subject.folder, l0=l0, evaluation={**metrics, "baselines": baselines})


def _metrics(sums: dict[str, Any]) -> dict[str, Any]:
    return {**reconstruction_metrics(sums), **massive_metrics(sums), **fidelity_metrics(sums)}


def _number(value: Any) -> float | None:
    """A JSON number; None where a ratio has no value."""
    return float(value) if np.isfinite(value) else None

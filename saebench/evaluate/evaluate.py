"""Evaluate SAEs on held-out documents: reconstruction, fidelity of the spliced model, baselines.

Everything is measured on the same tokens: kept positions of the store's validation contexts, whose
vectors come from the model's own clean forward pass. At special tokens the vectors are left alone in
every arm, ablations included, and positions that start at one are not scored.

B contexts, L positions, D d_in, F latents, N kept tokens of a batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saebench.config import Count, to_json
from saebench.evaluate.baselines import PCA, untrained_fvu
from saebench.files import hash_files, read_json, write_json
from saebench.metrics import (
    SMALL_DENOMINATOR,
    Sums,
    density_metrics,
    fidelity_metrics,
    loss_and_kl,
    next_token_loss,
    reconstruction_metrics,
    reconstruction_terms,
    resampled,
    total,
    total_variance,
)
from saebench.models import LanguageModel, ModelDtype, capture, choose_device, load_model, spliced_logits
from saebench.runlog import progress, provenance
from saebench.sae import SAE, load_sae, read_config, update_metadata
from saebench.store import Store, open_store
from saebench.store.schema import MANIFEST

EVALUATION = "evaluation.json"
_VERSION = 1  # of the figures' definitions: another one evaluates again
_ROWS = 8192  # rows encoded at once, to bound memory at wide SAEs
MASK = (
    "kept tokens of the validation documents (special tokens are not scored and their vectors are not replaced); "
    "losses at kept positions that have a next token in their context"
)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Which SAEs to evaluate, on what."""

    run: Path
    """run directory: evaluates RUN/saes/*, and writes RUN/summary.json and RUN/report.html"""
    sae: tuple[Path, ...] = ()
    """SAE directories elsewhere to evaluate as well, for instance ones made by SAELens"""
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
    """how the model computes (default: bfloat16 on GPUs that have it, else float32)"""
    device: str | None = None
    """cuda or cpu (default: cuda where it is at hand)"""
    trust_remote_code: bool = False
    """run code that comes with a hub model"""
    force: bool = False
    """evaluate again what was evaluated with the same settings already"""


class Batch(NamedTuple):
    """Validation contexts: tokens, document and keep flag of every position."""

    tokens: Int[Tensor, "B L"]
    doc_id: Int[Tensor, "B L"]
    keep: Bool[Tensor, "B L"]

    @property
    def scored(self) -> Bool[Tensor, "B P"]:
        """Positions whose next-token loss counts; P = L - 1."""
        return self.keep[:, :-1]


def validation_batches(store: Store, tokens: int, contexts: int) -> Iterator[Batch]:
    """The store's validation contexts in order, up to `tokens` of them."""
    left = max(1, tokens // store.context)
    for shard in store.of_split("validation"):
        columns = [torch.from_numpy(shard.column(name).copy()) for name in ("tokens", "doc_id", "keep")]
        shaped = [column.view(-1, store.context)[:left] for column in columns]
        left -= len(shaped[0])
        for start in range(0, len(shaped[0]), contexts):
            token, doc, keep = (column[start : start + contexts] for column in shaped)
            yield Batch(token.long(), doc.long(), keep)


Replacement = Callable[[Float[Tensor, "N D"]], Float[Tensor, "N D"]]


def splice(
    replace: Replacement, keep: Bool[Tensor, "B L"]
) -> Callable[[Float[Tensor, "B L D"]], Float[Tensor, "B L D"]]:
    """A hook that replaces kept positions and leaves special tokens as they are."""

    def replaced(x_BLD: Tensor) -> Tensor:
        out_BLD = x_BLD.clone()
        out_BLD[keep] = replace(x_BLD[keep]).to(x_BLD.dtype)
        return out_BLD

    return replaced


class _Subject:
    """One SAE under evaluation, and the sums that belong to it alone."""

    def __init__(self, folder: Path, sae: SAE) -> None:
        self.folder = folder
        self.sae = sae
        self.norms_F = sae.W_dec.norm(dim=1)
        self.sums = Sums()
        self.fires_F = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.W_dec.device)

    def reconstruct(self, x_ND: Float[Tensor, "N D"]) -> tuple[Tensor, Tensor, Tensor]:
        """(x̂ `[N, D]`, L0 `[N]`, decoder-weighted L1 `[N]`); counts what fires."""
        parts = []
        for rows in x_ND.split(_ROWS):
            out = self.sae(rows)
            active = out.acts != 0
            self.fires_F += active.sum(0)
            parts.append((out.x_hat, active.sum(1), out.acts.abs() @ self.norms_F))
        x_hat, l0, l1 = (torch.cat(column) for column in zip(*parts, strict=True))
        return x_hat, l0, l1


def evaluate(config: EvalConfig) -> list[Path]:
    """Evaluate every SAE of a run; results go into each SAE's `evaluation.json` and metadata.

    Returns the SAE directories. Clean and ablated losses are computed once per store and hook.
    Raises ValueError when there is nothing to evaluate or SAE, store and model do not belong together.
    """
    folders = [path.parent for path in sorted((config.run / "saes").glob("*/cfg.json"))] + list(config.sae)
    if not folders:
        raise ValueError(
            f"{config.run} has no SAEs in saes/; train some with `saebench train --out {config.run}`, or give --sae"
        )
    groups: dict[tuple[Path, str], list[Path]] = {}
    for folder in folders:
        metadata = read_config(folder).get("metadata", {})
        store = config.store or metadata.get("saebench", {}).get("store")
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
        if todo:
            _evaluate_hook(config, store, hook, todo)
    return folders


def _identity(config: EvalConfig, folder: Path, store: Store) -> dict[str, Any]:
    settings = {name: to_json(config)[name] for name in ("tokens", "dead_rows", "resamples", "model_dtype")}
    return {
        **settings,
        "version": _VERSION,
        "store": hash_files([store.folder / MANIFEST]),
        "weights": hash_files([folder / "sae_weights.safetensors"]),
    }


def _is_current(config: EvalConfig, folder: Path, store: Store) -> bool:
    path = folder / EVALUATION
    return path.exists() and read_json(path)["identity"] == _identity(config, folder, store)


@torch.inference_mode()
def _evaluate_hook(config: EvalConfig, store: Store, hook: str, folders: list[Path]) -> None:
    made_with = store.manifest["identity"]["model"]
    model = load_model(
        made_with["id"],
        device=choose_device(config.device, float64=True),
        dtype=config.model_dtype,
        revision=made_with["revision"],
        trust_remote_code=config.trust_remote_code,
    )
    if model.weights_hash != made_with["weights"]:
        raise ValueError(
            f"model {model.id!r} has weights {model.weights_hash}, store {store.folder} was made with {made_with['weights']}: "
            "use the model it was made with, or harvest again"
        )
    device = str(model.device)
    subjects = [_Subject(folder, load_sae(folder, device=device)) for folder in folders]
    for subject in subjects:
        if subject.sae.d_in != store.d_in(hook):
            raise ValueError(
                f"{subject.folder} takes vectors of {subject.sae.d_in}, {hook} in {store.folder} has {store.d_in(hook)}"
            )
    mean_D = torch.tensor(store.statistics(hook)["mean"], device=device)
    pca = PCA.fit(store, hook, device)
    shared = Sums()
    tokens = min(config.tokens, store.rows("validation"))
    with progress(tokens, f"evaluate {hook}") as bar:
        for batch in validation_batches(store, config.tokens, config.batch):
            batch = Batch(*(column.to(device) for column in batch))
            _evaluate_batch(model, hook, batch, mean_D, subjects, shared, pca)
            bar.update(batch.tokens.numel())
    rows = int(total(shared.table())["rows"])
    silent, seen = _silent_latents(store, hook, subjects, max(0, config.dead_rows - rows))
    for subject, silent_F in zip(subjects, silent, strict=True):
        _write(config, store, hook, subject, shared, pca, {"silent": silent_F, "window": rows + seen})


def _evaluate_batch(
    model: LanguageModel, hook: str, batch: Batch, mean_D: Tensor, subjects: list[_Subject], shared: Sums, pca: PCA
) -> None:
    tokens, keep, scored = batch.tokens, batch.keep, batch.scored
    x_ND = capture(model, tokens, [hook])[hook][keep].float()
    docs_N, docs_P = batch.doc_id[keep], batch.doc_id[:, :-1][scored]

    def run(replace: Replacement) -> Tensor:
        return spliced_logits(model, tokens, hook, splice(replace, keep))

    def ce_and_kl(replace: Replacement) -> tuple[Tensor, Tensor]:
        loss, kl = loss_and_kl(clean, run(replace), tokens)
        return loss[scored], kl[:, :-1][scored]

    clean = run(lambda x: x).float().log_softmax(-1)
    ce_zero, kl_zero = ce_and_kl(torch.zeros_like)
    shared.add(docs_N, {"rows": torch.ones_like(docs_N), "squared_norm": x_ND.double().pow(2).sum(1), "vector": x_ND})
    shared.add(
        docs_P,
        {
            "positions": torch.ones_like(docs_P),
            "ce_clean": next_token_loss(clean, tokens)[scored],
            "ce_zero": ce_zero,
            "ce_mean": ce_and_kl(lambda x: mean_D.expand_as(x))[0],
            "kl_zero": kl_zero,
        },
    )
    pca.observe(x_ND)
    for subject in subjects:
        x_hat_ND, l0_N, l1_N = subject.reconstruct(x_ND)
        ce_spliced, kl = ce_and_kl(lambda x, x_hat_ND=x_hat_ND: x_hat_ND)
        subject.sums.add(docs_N, reconstruction_terms(x_ND, x_hat_ND, l0_N, l1_N))
        subject.sums.add(docs_P, {"ce_spliced": ce_spliced, "kl": kl})


def _silent_latents(store: Store, hook: str, subjects: list[_Subject], rows: int) -> tuple[list[Tensor], int]:
    """Which latents fired neither on the held-out rows nor on up to `rows` training rows; and how many those are.

    An SAE is left alone once all its latents have fired.
    """
    silent = [subject.fires_F == 0 for subject in subjects]
    rows = min(rows, store.rows("train", kept=True))
    with progress(rows, "count dead latents", "row") as bar:
        for x_ND in store.kept_rows(hook, "train", rows, _ROWS):
            waiting = [
                (subject, silent_F) for subject, silent_F in zip(subjects, silent, strict=True) if silent_F.any()
            ]
            if not waiting:
                break
            for subject, silent_F in waiting:
                silent_F &= (subject.sae.encode(x_ND.to(silent_F.device)) == 0).all(0)
            bar.update(len(x_ND))
    return silent, rows


def _write(
    config: EvalConfig, store: Store, hook: str, subject: _Subject, shared: Sums, pca: PCA, dead: dict[str, Any]
) -> None:
    """Turn the sums into metrics with intervals, and save them beside the SAE."""
    table = {**shared.table(), **subject.sums.table()}
    sums = total(table)
    metrics = {name: _number(value) for name, value in _metrics(sums).items()}
    samples = _metrics(resampled(table, config.resamples, seed=0))
    intervals = {
        # One document says nothing of how documents differ.
        name: [_number(q) for q in np.quantile(values, (0.025, 0.975))] if len(shared.index) > 1 else [None, None]
        for name, values in samples.items()
    }
    rows, l0 = int(sums["rows"]), float(sums["l0"] / sums["rows"])
    metrics |= density_metrics(subject.fires_F.cpu(), rows)
    metrics |= {
        "dead_fraction": float(dead["silent"].double().mean()),
        "dead_window": dead["window"],
        "n_tokens_eval": rows,
    }
    small = [
        arm
        for arm in ("zero", "mean")
        if (sums[f"ce_{arm}"] - sums["ce_clean"]) / sums["positions"] < SMALL_DENOMINATOR
    ]
    variance = float(total_variance(sums))
    seed = read_config(subject.folder)["metadata"].get("saebench", {}).get("identity", {}).get("seed", 0)
    baselines = {
        "pca_fvu": pca.fvu(l0, variance),
        "untrained_fvu": untrained_fvu(store, hook, subject.sae.d_sae, l0, seed, rows),
    }
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
            "sums": {name: float(value) for name, value in sums.items() if name != "vector"}
            | {
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
    return {**reconstruction_metrics(sums), **fidelity_metrics(sums)}


def _number(value: Any) -> float | None:
    """A JSON number; None where a ratio has no value."""
    return float(value) if np.isfinite(value) else None

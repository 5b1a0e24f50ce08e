"""From the sums of a pass to what `evaluation.json` says: metrics, their intervals, baselines, and what they are ratios of."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saebench.evaluate.compare import FIGURES, LEAST_DOCUMENTS, half_of
from saebench.evaluate.measure import Measurement, Subject
from saebench.metrics import (
    SMALL_DENOMINATOR,
    density_metrics,
    fidelity_metrics,
    massive_metrics,
    near_duplicates,
    ratio,
    reconstruction_metrics,
    resampled,
    total,
    total_variance,
)
from saebench.runlog import provenance

MASK = (
    "kept tokens of the validation documents whose vectors are not massive (neither those nor special tokens are scored, and "
    "their vectors are not replaced); losses at those of them that an ordinary token follows in their context"
)


def resampled_metrics(measured: Measurement, resamples: int) -> list[dict[str, np.ndarray]]:
    """The metrics of each subject on every bootstrap sample of documents, the same samples for all."""
    hooks, own = list(measured.shared), [sums for subject in measured.subjects for sums in subject.sums.values()]
    drawn = iter(resampled([sums.table() for sums in (*measured.shared.values(), *own)], resamples, 0))
    shared = {hook: next(drawn) for hook in hooks}
    return [_mean_of_hooks(_metrics(shared[hook] | next(drawn)) for hook in hooks) for _ in measured.subjects]


def figures(
    subject: Subject,
    measured: Measurement,
    draws: dict[str, np.ndarray],
    silent_F: Tensor,
    window: int,
    untrained: dict[str, list[float]],
) -> dict[str, Any]:
    """Turn the sums of each hook into metrics, with intervals from those of resampled documents (`draws`); those of several hooks are means over them."""
    hooks, sums = subject.ends.writes, _totals(subject, measured)
    variances = {hook: float(total_variance(of)) for hook, of in sums.items()}
    first, documents = sums[hooks[0]], len(measured.shared[hooks[0]].index)
    rows, l0, massive = int(first["rows"]), float(first["l0"] / first["rows"]), int(first.get("massive_rows", 0))
    own = {hook: _metrics(of) for hook, of in sums.items()}
    fires_F = torch.cat([member.fires_F for member in subject.members]).cpu()
    duplicates = sum(near_duplicates(member.sae.W_dec) for member in subject.members)
    metrics = _numbers(_mean_of_hooks(own.values())) | density_metrics(fires_F, rows)
    metrics |= {
        "dead_fraction": float(silent_F.double().mean()),
        "dead_window": window,
        "duplicate_fraction": duplicates / len(fires_F),
        "n_tokens_eval": rows,
        "n_documents_eval": documents,
        "massive_rows": massive,
    }
    baselines = dict(untrained)
    if (fitted := measured.baseline) is not None:
        errors = zip(fitted.errors(l0), variances.values(), strict=True)
        baselines = {fitted.name: [float(ratio(error, variance)) for error, variance in errors], **untrained}
    small = [
        arm
        for arm in ("zero", "mean")
        if any((of[f"ce_{arm}"] - of["ce_clean"]) / of["positions"] < SMALL_DENOMINATOR for of in sums.values())
    ]
    saved = {hook: _saved(of) | {"massive_rows": massive} for hook, of in sums.items()}
    counts = {
        "latents": len(fires_F),
        "dead_latents": int(silent_F.sum()),
        "dense_latents": int((fires_F > 0.01 * rows).sum()),
        "fires": int(fires_F.sum()),
    }
    found = {
        "metrics": metrics,
        "intervals": _intervals(metrics, draws, documents),
        "interval_method": f"95%, Student's t with {documents - 1} degrees of freedom, {len(draws['l0'])} bootstrap samples of {documents} documents",
        "baselines": _numbers({name: np.mean(values) for name, values in baselines.items()}),
        "small_denominators": small,
        "mask": MASK,
        "sums": counts if len(hooks) > 1 else next(iter(saved.values())) | counts,
        "provenance": provenance(),
    }
    if len(hooks) > 1 or measured.baseline is None:
        found["hooks"] = {
            hook: {
                "metrics": _numbers(own[hook]),
                "baselines": _numbers({name: values[place] for name, values in baselines.items()}),
                "sums": saved[hook],
            }
            for place, hook in enumerate(hooks)
        }
    return found


def refitted_figures(
    subject: Subject,
    measured: Measurement,
    draws: dict[str, np.ndarray],
    plain: dict[str, Any],
    plain_draws: dict[str, np.ndarray],
) -> dict[str, Any]:
    """Metrics of a refitted subject, with intervals, and the `change` of each figure from what it is with the encoder's
    coefficients (`plain`): (value, half of the 95% interval, paired over documents)."""
    sums, documents = _totals(subject, measured), len(measured.shared[subject.ends.writes[0]].index)
    metrics = _numbers(_mean_of_hooks(_metrics(of) for of in sums.values()))
    change: dict[str, list[float | None]] = {}
    for name in FIGURES:
        half = _half(draws[name] - plain_draws[name], documents)
        value, before = metrics[name], plain[name]
        change[name] = [None, None] if value is None or before is None else [value - before, half]
    found = {"metrics": metrics, "intervals": _intervals(metrics, draws, documents), "change": change}
    return found | {"sums": {hook: _saved(of) for hook, of in sums.items()}}


def _totals(subject: Subject, measured: Measurement) -> dict[str, dict[str, Any]]:
    """The sums of each hook written."""
    return {hook: total({**measured.shared[hook].table(), **own.table()}) for hook, own in subject.sums.items()}


def _metrics(sums: dict[str, Any]) -> dict[str, Any]:
    """All that are ratios of sums."""
    return {**reconstruction_metrics(sums), **massive_metrics(sums), **fidelity_metrics(sums)}


def _mean_of_hooks(of_hooks: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Of the same metrics of several hooks."""
    every = list(of_hooks)
    return {name: np.mean([metrics[name] for metrics in every], axis=0) for name in every[0]}


def _intervals(
    metrics: dict[str, float | None], draws: dict[str, np.ndarray], documents: int
) -> dict[str, list[float | None]]:
    """95% of each metric."""
    halves = {name: _half(values, documents) for name, values in draws.items()}
    return {
        name: [None, None] if half is None or (value := metrics[name]) is None else [value - half, value + half]
        for name, half in halves.items()
    }


def _half(draws: np.ndarray, documents: int) -> float | None:
    """Half of the 95% interval of what bootstrap samples have; None of few documents, or where a sample has no value."""
    if documents < LEAST_DOCUMENTS or not np.isfinite(draws).all():
        return None
    return half_of(float(np.var(draws, ddof=1)), documents)


def _saved(sums: dict[str, Any]) -> dict[str, float]:
    """What is kept of the sums of a hook."""
    kept = {name: float(value) for name, value in sums.items() if not name.endswith("vector")}
    return kept | {"total_variance": float(total_variance(sums))}


def _numbers(metrics: dict[str, Any]) -> dict[str, float | None]:
    return {name: _number(value) for name, value in metrics.items()}


def _number(value: Any) -> float | None:
    """A JSON number; None where a ratio has no value."""
    return float(value) if np.isfinite(value) else None

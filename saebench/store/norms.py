"""How long the rows of a store are, which tokens carry the longest, and whether a few rows dominate."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saebench.pieces import TokenBytes, show_bytes
from saebench.store.reader import Store
from saebench.store.schema import MASSIVE, Moments, bins_beyond, norm_at, norm_quantile

DOMINANT = 0.05  # of the variance: a fiftieth of it is what a heavy tail may have
QUANTILES = (0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 1.0)
_TOP = 0.001  # of the rows


class Carrier(NamedTuple):
    """A token of the longest rows."""

    token: int
    text: str
    rows: int
    """of the longest that are of this token"""
    norm: float
    """the greatest of them"""
    positions: tuple[int, int]
    """least and greatest position in the context"""


@dataclass(frozen=True, kw_only=True)
class NormReport:
    """Norms at one hook over the kept training rows: some figures of all of them, some of a sample."""

    rows: int
    quantiles: dict[float, float]
    """share of all rows -> the norm that they stay under, to half a percent"""
    edges: np.ndarray
    """of the histogram's bins, `[n + 1]`, a quarter octave each"""
    counts: np.ndarray
    """rows in each bin, `[n]`"""
    massive: int
    """of all rows, those longer than MASSIVE times the median, which training, evaluation and index leave out"""
    sampled: int
    """rows that the figures below are of"""
    longest: int
    """of them, a thousandth, at least one"""
    massive_share: float
    """of the variance, that massive rows hold"""
    top_share: float
    """of the other rows' variance, that the thousandth of them farthest from the mean holds"""
    carriers: list[Carrier]
    """tokens of the longest rows, most frequent first"""
    left_out_norm: float | None
    """median norm of rows that are never trained on (BOS and its kin), where attention sinks usually are"""

    @property
    def dominated(self) -> bool:
        return self.top_share > DOMINANT


def norm_report(store: Store, hook: str, sample: int = 100_000) -> NormReport:
    """Quantiles come from the stored histogram; tokens and variance from `sample` rows spread evenly over the store."""
    histogram = store.norm_histogram(hook)
    rows, tokens, positions, keep = _sample(store, hook, sample)
    norms, mean = rows.norm(dim=1), torch.tensor(store.statistics(hook)["mean"])
    left_out = norms[~keep]
    kept, norms, tokens, positions = rows[keep], norms[keep], tokens[keep], positions[keep]
    n_top = max(int(len(kept) * _TOP), 1)
    distances, usual = (kept - mean).square().sum(1).double(), norms <= store.norms(hook).bound
    others = (kept[usual] - kept[usual].mean(0)).square().sum(1).double()  # massive rows move the mean of all
    top = norms.topk(n_top).indices
    first, last = (np.flatnonzero(histogram)[[0, -1]] // 16).tolist()
    return NormReport(
        rows=int(histogram.sum()),
        quantiles={q: norm_quantile(histogram, q) for q in QUANTILES},
        edges=np.array([norm_at(16 * step) for step in range(first, last + 2)]),
        counts=histogram.reshape(-1, 16).sum(1)[first : last + 1],
        massive=store.norms(hook).massive,
        sampled=len(kept),
        longest=n_top,
        massive_share=float(distances[~usual].sum() / distances.sum()),
        top_share=float(others.topk(n_top).values.sum() / others.sum()),
        carriers=_carriers(store, norms[top].numpy(), tokens[top].numpy(), positions[top].numpy()),
        left_out_norm=float(left_out.median()) if len(left_out) else None,
    )


def rows_beyond(histogram: np.ndarray, multiple: float) -> int:
    """Rows whose norm is above `multiple` times the median, to a bin of half a percent."""
    return int(histogram[bins_beyond(multiple * norm_quantile(histogram, 0.5))].sum())


def usual_moments(store: Store, hook: str) -> tuple[np.ndarray, float]:
    """(mean `[d_in]`, mean squared norm) of kept training rows that are not massive: exact where there are none, else of a sample."""
    norms, statistics = store.norms(hook), store.statistics(hook)
    if not norms.massive:
        return np.array(statistics["mean"]), statistics["mean_squared_norm"]
    return moments_within(store, hook, norms.bound)


def moments_within(store: Store, hook: str, longest: float, sample: int = 500_000) -> tuple[np.ndarray, float]:
    """(mean `[d_in]`, mean squared norm) of kept training rows of a norm of at most `longest`, from a sample spread evenly."""
    total = Moments.zero(store.d_in(hook))
    for rows, _, _, keep in _columns(store, hook, sample):
        total = total.plus(Moments.of(rows[keep & (rows.norm(dim=1) <= longest)].numpy()))
    return total.total / max(total.rows, 1), total.total_squared_norm / max(total.rows, 1)


def _sample(store: Store, hook: str, limit: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    vectors, tokens, positions, keep = (torch.cat(column) for column in zip(*_columns(store, hook, limit), strict=True))
    return vectors, tokens, positions, keep


def _columns(store: Store, hook: str, limit: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(vectors, tokens, positions, keep) of stretches of rows, evenly spread over the training shards."""
    for shard, start, stop in store.spread("train", limit):
        tokens, position, keep = (
            torch.from_numpy(shard.column(name, start, stop)) for name in ("tokens", "position", "keep")
        )
        yield shard.rows(hook, start, stop).float(), tokens, position, keep


def _carriers(store: Store, norms: np.ndarray, tokens: np.ndarray, positions: np.ndarray) -> list[Carrier]:
    pieces = TokenBytes(store.tokenizer())
    found: list[Carrier] = []
    for token, count in Counter(tokens.tolist()).most_common():
        mine = tokens == token
        span = int(positions[mine].min()), int(positions[mine].max())
        found.append(Carrier(token, show_bytes(pieces[token]), count, float(norms[mine].max()), span))
    return found


def show(hook: str, report: NormReport) -> list[str]:
    """A report as lines of text."""
    median = report.quantiles[0.5]
    quantiles = "  ".join(f"{100 * q:g}% {norm:.4g}" for q, norm in report.quantiles.items())
    bars = "".join(
        "▁▂▃▄▅▆▇█"[int(8 * (count / report.counts.max()) ** 0.5 - 1e-9)] if count else " " for count in report.counts
    )
    carriers = ", ".join(
        f"{carrier.text!r} {carrier.rows} (to {carrier.norm / median:.1f} ×, positions {'–'.join(map(str, dict.fromkeys(carrier.positions)))})"
        for carrier in report.carriers[:6]
    )
    lines = [
        f"    norms    {quantiles}",
        f"             {report.edges[0]:.3g} {bars} {report.edges[-1]:.3g}  (bins of a quarter octave; height: √rows)",
        f"    massive  {report.massive:,} of {report.rows:,} rows are longer than {MASSIVE:g} × the median and are left out by training, "
        f"evaluation and index; they hold {100 * report.massive_share:.1f}% of the variance"
        + (f". BOS and its kin: {report.left_out_norm / median:.1f} ×" if report.left_out_norm is not None else ""),
        f"    longest  {report.longest:,} of {report.sampled:,} sampled rows: {carriers}",
        f"    variance {100 * report.top_share:.1f}% of that of the other rows is in 0.1% of them",
    ]  # fmt: skip
    if report.dominated:
        lines.append(
            f"    warning: a few more rows dominate the variance at {hook}, and would dominate the loss: "
            f"`saebench train --exclude-outliers {MASSIVE / 2:g}` leaves out rows longer than {MASSIVE / 2:g} × the median"
        )
    return lines


def describe(store: Store, *, norms: bool = False) -> str:
    """What is in a store, for people; with `norms`, a report on each hook's."""
    manifest, made = store.manifest, store.manifest["identity"]
    size = sum(entry["bytes"] for entry in manifest["shards"])
    lines = [
        f"{store.folder}: {len(store.shards)} shards, {size / 1e6:,.0f} MB, contexts of {store.context} tokens, {manifest['dtype']}",
        f"  model    {made['model']['id']} in {made['model_dtype']} (weights {made['model']['weights'][:12]})",
        f"  text     {made['text']['dataset']}: {manifest['documents']:,} documents"
        + (", all of it" if manifest["exhausted"] else ""),
    ]
    lines += [
        f"  {split:<10} {store.rows(split):>12,} rows, {store.rows(split, kept=True):>12,} kept"
        for split in ("train", "validation")
    ]
    for hook in store.hooks:
        statistics = store.statistics(hook)
        lines.append(
            f"  {hook}  d_in {store.d_in(hook)}, median norm {statistics['median_norm']:.4g}, "
            f"root mean square norm {statistics['mean_squared_norm'] ** 0.5:.4g}"
        )
        if norms:
            lines += show(hook, norm_report(store, hook))
    return "\n".join(lines)

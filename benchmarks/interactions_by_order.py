"""Strengths by order of the interactions behind a model's predictions, at several points of its training.

    python scripts/train_demo_model.py --work runs/demo-model --out runs/demo-model/end --keep 0 100 1000
    python benchmarks/interactions_by_order.py --model runs/demo-model/step-{0,100,1000} runs/demo-model/end --contexts 50 --plot orders.png

The same contexts of held-out modules for all models, which share a tokenizer. At each, the log-probability of the token that follows in the
text is split into AND-OR interactions of the n tokens before the last. Of those of one order: the share of Σ|I| over all, medians and quartiles
over contexts; and the sums of the salient ones, positive and negative apart, means. Tokens are left out of attention. What the papers on two phases
(arXiv 2405.10262, 2407.19198) find: strengths of middle orders at random before training, then low orders alone, then higher ones that do not generalise.
"""

import argparse
import logging
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from saebench.interactions import Interactions, interactions, log_probability, mask_of
from saebench.models import LanguageModel, load_model
from saebench.text import TextConfig, open_documents, split_of


class Place(NamedTuple):
    """A context, and the token that follows it."""

    ids: np.ndarray
    following: int
    pieces: list[bytes]
    """what both say"""


def places(model: LanguageModel, number: int, length: int) -> list[Place]:
    """Contexts of so many tokens, each from where chance says in the head of another held-out module."""
    config, random, found = TextConfig(), np.random.default_rng(0), []
    for document in open_documents(config):
        if split_of(document.key, config.validation_fraction) != "validation":
            continue
        bos, *ids = model.tokens_of((document.text or "a")[:400])
        if len(ids) <= length:
            continue
        start = int(random.integers(len(ids) - length))
        taken = ids[start : start + length + 1]
        found.append(Place(np.array([bos, *taken[:-1]]), taken[-1], [model.pieces[one] for one in taken]))
        if len(found) == number:
            break
    return found


def by_order(found: Interactions) -> np.ndarray:
    """`[3, n]` by order, from 1: the shares of all interactions, and of the salient ones the sums of the positive and of the negative."""
    salient = np.zeros((2, len(found.units)))
    for order, up, down in found.by_order():
        salient[:, order - 1] = up, -down
    return np.stack([found.shares(), *salient])


def measured(name: str, contexts: list[Place], n: int) -> tuple[np.ndarray, float, float]:
    """(`[C, 3, n]` of `by_order`, mean nats of the token that follows, the same with all n masked)."""
    model = load_model(name, device="cpu", dtype="float32")
    mask, rows, nats = mask_of(model, "unattended"), [], []
    for place in contexts:
        if [model.pieces[int(one)] for one in (*place.ids[1:], place.following)] != place.pieces:
            raise ValueError(f"{name} has another tokenizer than the last model; expected models of one training")
        scalar = log_probability(model, place.following)
        found = interactions(model, place.ids, scalar, mask, n=n, reach=n, step=lambda *_: None)
        rows.append(by_order(found))
        nats.append((-found.whole, -found.empty))
    whole, empty = np.mean(nats, 0).tolist()
    return np.stack(rows), whole, empty


def plotted(found: dict[str, np.ndarray]) -> go.Figure:
    """Shares by order, and below the sums of the salient interactions, bars in the order of the models."""
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.08)
    for (name, rows), colour in zip(found.items(), sample_colorscale("Viridis_r", len(found) + 1)[1:], strict=True):
        low, middle, high = np.percentile(rows[:, 0], (25, 50, 75), axis=0)
        bars: dict[str, Any] = {"name": name, "legendgroup": name, "offsetgroup": name, "marker": {"color": colour}}
        x = list(range(1, len(middle) + 1))
        figure.add_bar(
            x=x, y=middle.tolist(), row=1, col=1, **bars,
            error_y={"type": "data", "symmetric": False, "array": (high - middle).tolist(), "arrayminus": (middle - low).tolist(), "thickness": 1, "width": 2},
        )  # fmt: skip
        for sums in (rows[:, 1].mean(0), -rows[:, 2].mean(0)):
            figure.add_bar(x=x, y=sums.tolist(), row=2, col=1, showlegend=False, **bars)
    legend, margin = {"orientation": "h", "y": 1.06}, {"l": 70, "r": 20, "t": 30, "b": 55}
    figure.update_layout(
        template="plotly_white", barmode="relative", width=900, height=640, legend=legend, margin=margin
    )
    figure.update_xaxes(title="order: tokens in a set", dtick=1, row=2)
    figure.update_xaxes(dtick=1, row=1)
    figure.update_yaxes(title="share of Σ|I|, median and quartiles", tickformat=".0%", row=1)
    figure.update_yaxes(title="nats, + and −: salient, mean", row=2)
    return figure


def picture(figure: go.Figure, path: Path) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 920, "height": 660})
        page.set_content(figure.to_html(config={"staticPlot": True}))
        page.locator(".main-svg").first.wait_for()
        page.screenshot(path=str(path))
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", required=True, help="models of one tokenizer, the earliest first")
    parser.add_argument("--contexts", type=int, default=50)
    parser.add_argument("--length", type=int, default=24, help="tokens of a context")
    parser.add_argument("--n", type=int, default=8, help="tokens masked, those before the last")
    parser.add_argument("--plot", type=Path, help="PNG, by Chromium")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    contexts = places(load_model(options.model[-1], device="cpu", dtype="float32"), options.contexts, options.length)
    heading = " | ".join(map(str, range(1, options.n + 1)))
    print(
        f"{len(contexts)} contexts\n\n| model | nats | all masked | {heading} | salient +, − of orders 1, 2, 3+ |\n|{'---|' * (options.n + 4)}"
    )
    found = {}
    for name in options.model:
        rows, whole, empty = measured(name, contexts, options.n)
        found[Path(name).name] = rows
        cells = " | ".join(f"{share:.1%}" for share in np.median(rows[:, 0], 0))
        up, down = ([part[0], part[1], part[2:].sum()] for part in rows.mean(0)[1:])
        signed = ", ".join(f"{one:.2f} −{other:.2f}" for one, other in zip(up, down, strict=True))
        print(f"| {Path(name).name} | {whole:.2f} | {empty:.2f} | {cells} | {signed} |", flush=True)
    if options.plot is not None:
        figure = plotted(found)
        picture(figure, options.plot)


if __name__ == "__main__":
    main()

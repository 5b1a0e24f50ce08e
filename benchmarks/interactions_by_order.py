"""Strengths by order of the interactions behind a model's predictions, at several points of its training.

    python scripts/train_demo_model.py --work runs/demo-model --out runs/demo-model/end --keep 100 400 1600
    python benchmarks/interactions_by_order.py --model runs/demo-model/step-100 runs/demo-model/step-400 runs/demo-model/end --contexts 50 --plot orders.png

The same contexts of held-out modules for all models, which share a tokenizer. At each, the log-probability of the token that follows in the
text is split into AND-OR interactions of the n tokens before the last; those of one order are summed by size, positive and negative apart, of
salient ones and of all. Shares are of the sum over all orders, medians and quartiles over contexts; tokens left out of attention. What the papers on two phases
(arXiv 2405.10262, 2407.19198) find: strengths of middle orders at random before training, then low orders alone, then higher ones that do not generalise.
"""

import argparse
import logging
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from saebench.interactions import Interactions, interactions, log_probability, mask_of
from saebench.interactions.mobius import orders
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
    """`[3, n]` sums by order, from 1: sizes of all interactions, and of the salient ones the positive and the negative."""
    n = len(found.units)
    count = np.tile(orders(n), 2)
    strengths = np.concatenate([found.split.ands, np.where(orders(n) > 1, found.split.ors, 0.0)])
    every = np.bincount(count, np.abs(strengths), n + 1)[1:]
    salient = np.zeros((2, n))
    for order, up, down in found.by_order():
        salient[:, order - 1] = up, -down
    return np.stack([every, *salient])


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


def shares(rows: np.ndarray) -> np.ndarray:
    """`[C, n]` of the sizes of all interactions, by order."""
    return rows[:, 0] / rows[:, 0].sum(1, keepdims=True)


def plotted(found: dict[str, np.ndarray]) -> go.Figure:
    figure = go.Figure()
    colours = ("#56B4E9", "#0072B2", "#009E73", "#E69F00", "#D55E00")
    for (name, rows), colour in zip(found.items(), colours, strict=False):
        low, middle, high = np.percentile(shares(rows), (25, 50, 75), axis=0)
        figure.add_bar(
            x=list(range(1, len(middle) + 1)), y=middle.tolist(), name=name, marker={"color": colour},
            error_y={"type": "data", "symmetric": False, "array": (high - middle).tolist(), "arrayminus": (middle - low).tolist(), "thickness": 1, "width": 2},
        )  # fmt: skip
    figure.update_layout(
        template="plotly_white",
        barmode="group",
        width=900,
        height=420,
        legend={"orientation": "h", "y": 1.1},
        margin={"l": 70, "r": 20, "t": 30, "b": 55},
    )
    figure.update_xaxes(title="order: tokens in a set", dtick=1)
    figure.update_yaxes(title="share of Σ|I|, median and quartiles", tickformat=".0%")
    return figure


def picture(figure: go.Figure, path: Path) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 920, "height": 440})
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
        cells = " | ".join(f"{share:.1%}" for share in np.median(shares(rows), 0))
        up, down = ([part[0], part[1], part[2:].sum()] for part in rows.mean(0)[1:])
        signed = ", ".join(f"{one:.2f} −{other:.2f}" for one, other in zip(up, down, strict=True))
        print(f"| {Path(name).name} | {whole:.2f} | {empty:.2f} | {cells} | {signed} |", flush=True)
    if options.plot is not None:
        figure = plotted(found)
        picture(figure, options.plot)


if __name__ == "__main__":
    main()

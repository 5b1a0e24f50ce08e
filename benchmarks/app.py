"""How fast the app answers, measured in a real browser.

    python benchmarks/app.py RUN [--sae NAME] [--latent N] [--large]

RUN holds an indexed SAE whose model is at hand. --large makes and indexes, the first time, an untrained one of 65,536 latents in
RUN-65536 and times its table too. Times are taken in the page, from the
click to the change that it brings, medians of several. Prints one JSON line for each figure; --out writes the table.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from index import synthetic
from playwright.sync_api import Browser, Page, sync_playwright

from saebench.browse.serve import served
from saebench.index import IndexConfig, build_index
from saebench.sae import read_config
from saebench.store import open_store

CHROMIUM = {
    "executable_path": "/usr/bin/chromium",
    "args": ["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
}
LINES: list[dict[str, Any]] = []
# Click the first match of one selector, and resolve when a predicate on the page holds.
CLICK = """([selector, predicate]) => new Promise((resolve, reject) => {
  const deep = (root, found) => { root.querySelectorAll('*').forEach((e) => { if (e.shadowRoot) { found.push(e.shadowRoot); deep(e.shadowRoot, found); } }); return found; };
  const roots = () => [document, ...deep(document, [])];
  const find = (css) => { for (const root of roots()) { const e = root.querySelector(css); if (e) return e; } return null; };
  const holds = new Function('find', `return ${predicate}`);
  const target = find(selector) || [...document.querySelectorAll('button')].find((b) => b.innerText.startsWith(selector));
  if (!target) { reject(new Error('nothing to click: ' + selector)); return; }
  const start = performance.now();
  target.click();
  const look = () => { if (holds(find)) resolve(performance.now() - start); else if (performance.now() - start > 60000) reject(new Error('timeout: ' + predicate)); else setTimeout(look, 4); };
  look();
})"""


TARGETS = {
    "first page, from a warm server": 3000, "open a latent, to its examples": 300, "sort 65,536 latents": 500,
    "search 65,536 latents": 500, "first steered token": 1000,
}  # fmt: skip
"""Milliseconds that were aimed at."""


def report(what: str, milliseconds: list[float]) -> None:
    line = {"what": what, "median_ms": round(statistics.median(milliseconds)), "worst_ms": round(max(milliseconds))}
    LINES.append(line)
    print(json.dumps(line), flush=True)


def as_table(command: str) -> str:
    """What was measured, as a file of results."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    rows = [
        f"| {line['what']} | {line['median_ms']} | {line['worst_ms']} | {TARGETS.get(line['what'], '')} |"
        for line in LINES
    ]
    head = ["| from the click to what it brings, in the browser | median ms | worst ms | aim |", "|---|---|---|---|"]
    about = f"{os.cpu_count()} cores ({platform.machine()}), no GPU, headless Chromium on the same machine; commit {commit}. Server and browser share the cores."
    return "\n".join(["# How fast the app answers", "", about, "", f"    {command}", "", *head, *rows, ""])


def opened(browser: Browser, address: str, selector: str) -> tuple[Page, float]:
    page = browser.new_page(viewport={"width": 1440, "height": 1000})
    start = time.perf_counter()
    page.goto(address)
    page.locator(selector).first.wait_for(timeout=120_000)
    return page, (time.perf_counter() - start) * 1000


def first_page(browser: Browser, address: str, times: int) -> None:
    found = []
    for n in range(times + 1):
        page, milliseconds = opened(browser, address, "tr[data-pick]")
        found += [milliseconds] if n else []  # the first warms the server
        page.close()
    report("first page, from a warm server", found)


def latents(browser: Browser, address: str, times: int) -> None:
    page, _ = opened(browser, f"{address}/features", "tr[data-pick]")
    opening, following = [], []
    for n in range(times):
        page.wait_for_timeout(800)
        row = f"tr[data-pick='latent:{n}']"
        ready = "find('.example') && (find('h1') || {}).innerText === 'Latent %d'"
        opening.append(page.evaluate(CLICK, [row, ready % n]))
        page.wait_for_timeout(800)
        following.append(page.evaluate(CLICK, ["Next", f"(find('h1') || {{}}).innerText === 'Latent {n + 1}'"]))
        page.wait_for_timeout(800)
        page.evaluate(CLICK, ["All latents", "find('tr[data-pick]') && !find('.example')"])
    page.close()
    report("open a latent, to its examples", opening[1:])
    report("next latent, to its heading", following[1:])


def table(browser: Browser, address: str, times: int, what: str) -> None:
    page, _ = opened(browser, f"{address}/features", "tr[data-pick]")
    sorting = []
    for n in range(times + 1):
        name = ("max", "density", "mean")[n % 3]
        page.wait_for_timeout(600)
        ready = f"find('th[aria-sort] button') && find('th[aria-sort] button').dataset.pick === 'sort:{name}'"
        sorting.append(page.evaluate(CLICK, [f"button[data-pick='sort:{name}']", ready]))
    report(f"sort {what}", sorting[1:])
    filtering = []
    box = page.get_by_role("textbox", name="Search")
    for text in ("return", "zz1", "string", "zz1", "import")[: times + 1]:  # what is found is another each time
        before = page.locator("[data-testid='stMainBlockContainer']").inner_text()
        box.fill(text)
        start = time.perf_counter()
        box.press("Enter")
        while page.locator("[data-testid='stMainBlockContainer']").inner_text() == before:
            time.sleep(0.005)
        filtering.append((time.perf_counter() - start) * 1000)
        page.wait_for_timeout(800)
    report(f"search {what}", filtering[1:])
    page.close()


def steering(browser: Browser, address: str, latent: int, times: int) -> None:
    page, _ = opened(browser, f"{address}/steering?turns={latent}:add:0.5n&prompt=def+", "text=Of the norm")
    found, whole = [], []
    for _ in range(times + 1):
        page.wait_for_timeout(1500)
        start = time.perf_counter()
        found.append(
            page.evaluate(
                CLICK,
                [
                    "Generate",
                    "find('.sb-arm .sb-t') && [...document.querySelectorAll('button')].find((b) => b.innerText.startsWith('Generate')).disabled",
                ],
            )
        )
        page.locator("text=first token").wait_for(timeout=120_000)
        whole.append((time.perf_counter() - start) * 1000)
    page.close()
    report("first steered token", found[1:])
    report("48 tokens in four arms, with KL", whole[1:])


def large_run(run: Path, name: str) -> Path:
    """A run with an untrained SAE of 65,536 latents, indexed on few rows of the store that `name` was trained on."""
    made = run.with_name(f"{run.name}-65536")
    folder = made / "saes" / "untrained"
    metadata = read_config(run / "saes" / name)["metadata"]
    store = metadata.pop("saebench")["store"]
    if not (folder / "cfg.json").exists():
        synthetic(folder, open_store(store), metadata["hook_name"], 65_536, metadata)
    build_index(IndexConfig(sae=folder, store=Path(store), tokens=65_536, sample=20_000))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--latent", type=int, default=100)
    parser.add_argument("--sae", default="topk-k48")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--out", type=Path, help="file for the table")
    parser.add_argument("--times", type=int, default=5)
    arguments = parser.parse_args()
    large = large_run(arguments.run, arguments.sae) if arguments.large else None
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**CHROMIUM)  # type: ignore[arg-type]
        with served(arguments.run) as address:
            first_page(browser, address, arguments.times)
            latents(browser, address, arguments.times + 1)
            table(browser, address, 4, "2,048 latents")
            steering(browser, address, arguments.latent, arguments.times)
        if large:
            with served(large) as address:
                table(browser, address, 4, "65,536 latents")
        browser.close()
    if arguments.out:
        arguments.out.write_text(as_table("python " + " ".join(sys.argv)))


if __name__ == "__main__":
    sys.exit(main())

"""Make docs/screenshots: every page of the app on a run, light and dark.

python scripts/screenshots.py runs/demo [--out docs/screenshots] [--sae topk-k48] [--latent 803]
"""

import argparse
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from saebench.browse.serve import served

SIZE = {"width": 1280, "height": 960}


def pages(sae: str, latent: int, text: str) -> dict[str, tuple[str, str]]:
    """For each picture the address, and what is on the page when it is whole."""
    return {
        "overview": ("/", ".js-plotly-plot .point"),
        "features": (f"/features?sae={sae}&sort=name_f1.desc", "tr[data-pick]"),
        "latent": (f"/features?sae={sae}&latent={latent}", ".example"),
        "prompt": (f"/prompt?sae={sae}&text={text}&rank=Quantile&density=at+most+1%25", "tr[data-pick]"),
        "steering": (
            f"/steering?sae={sae}&turns={latent}:add:0.5n&prompt=def+&max_new_tokens=40&n=2",
            "text=Of the norm",
        ),
        "compare": (f"/compare?sae={sae}", ".js-plotly-plot .gl-canvas, .js-plotly-plot canvas"),
    }


def settled(page: Page, selector: str) -> None:
    page.locator(selector).first.wait_for(timeout=120_000)
    page.locator('[data-testid="stApp"][data-test-script-state="notRunning"]').wait_for(timeout=120_000)
    page.wait_for_timeout(1200)


def small(path: Path) -> None:
    """128 colours are enough for a page, and a third of the size."""
    with Image.open(path) as image:
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/screenshots"))
    parser.add_argument("--sae", default="topk-k48")
    parser.add_argument("--latent", type=int, default=100)
    parser.add_argument("--text", default="import os%0A%0Adef area(width, height):%0A    return width * height")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with served(arguments.run) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport=SIZE, color_scheme=scheme)  # type: ignore[arg-type]
            for name, (path, selector) in pages(arguments.sae, arguments.latent, arguments.text).items():
                page.goto(address + path)
                settled(page, selector)
                if name == "steering":
                    page.get_by_role("button", name="Generate").click()
                    settled(page, "text=first token")
                out = arguments.out / f"{name}-{scheme}.png"
                page.screenshot(path=out)
                small(out)
                print(out)
            page.close()
        browser.close()


if __name__ == "__main__":
    main()

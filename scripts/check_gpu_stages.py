"""Run every stage on a GPU and on the CPU, on the embedded model, and hold their results against each other.

    python scripts/check_gpu_stages.py --out /tmp/stages

Prints a JSON line per command with its seconds, and one per comparison; exits 1 when a command fails or results are further
apart than devices round. `--devices cpu cpu` tries the script itself. What was harvested and trained, on the first device, is
what both evaluate, index, steer and trace.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np

PROMPT = "def main(path, name):\n    with open(path"
KINDS = {
    "sae": ["--hook", "blocks.2.hook_resid_post", "--arch", "topk,batchtopk,matryoshka,gated,relu,jumprelu"],
    "transcoder": ["--layers", "0,1,2,3", "--arch", "topk"],
    "clt": ["--arch", "batchtopk"],
    "crosscoder": ["--hook", "blocks.1.hook_resid_post,blocks.3.hook_resid_post", "--arch", "batchtopk"],
}
TOLERANCE = {"l0": 0.02, "fvu": 1e-4, "delta_ce": 2e-3, "loss_recovered_zero": 2e-4}
ANY_ORDER = "sample/"  # entries of a row lie as the device's top k gave them


class Check:
    """Runs commands and counts what is wrong."""

    def __init__(self) -> None:
        self.failed = 0

    def run(self, *arguments: object) -> str:
        """What a command prints; the last lines of its errors where it fails."""
        command, started = [str(part) for part in arguments], time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "saebench.cli", *command], text=True, capture_output=True)
        self.failed += done.returncode != 0
        line = {"command": " ".join(command)[:100], "seconds": round(time.perf_counter() - started, 1)}
        print(json.dumps(line | ({"error": done.stderr[-400:]} if done.returncode else {})), flush=True)
        return done.stdout

    def compare(self, name: str, found: Any, ok: bool) -> None:
        self.failed += not ok
        print(json.dumps({"check": name, "found": found, "ok": ok}), flush=True)


def figures(run: Path) -> dict[str, dict[str, float]]:
    paths = sorted(run.glob("saes/*/evaluation.json"))
    return {path.parent.name: json.loads(path.read_text())["metrics"] for path in paths}


def datasets(path: Path) -> dict[str, np.ndarray]:
    """Of an index, all that does not lie in an order of its own."""
    found: dict[str, np.ndarray] = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return {name: np.asarray(value) for name, value in found.items() if not name.startswith(ANY_ORDER)}


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """Largest difference over the largest value; of what is no number the share that is unequal. Infinite for other shapes."""
    if one.shape != other.shape:
        return float("inf")
    if one.dtype.kind == "f" and one.size:
        difference = np.abs(np.nan_to_num(one.astype(float)) - np.nan_to_num(other.astype(float)))
        return float(difference.max() / max(np.abs(np.nan_to_num(one)).max(), 1e-30))
    return float(np.mean(one != other)) if one.size else 0.0


def links(path: Path) -> dict[tuple[str, str], float]:
    return {(link["source"], link["target"]): link["weight"] for link in json.loads(path.read_text())["links"]}


def check_evaluation(check: Check, run: Path, devices: list[str]) -> None:
    found = []
    for device in devices:
        check.run("eval", "--run", run, "--tokens", "20k", "--device", device, "--force")
        found.append(figures(run))
    for name, tolerance in TOLERANCE.items():
        most = max(abs(found[0][sae][name] - found[1][sae][name]) for sae in found[0])
        check.compare(f"eval, {name}", most, most <= tolerance)


def check_circuits(check: Check, run: Path, devices: list[str]) -> None:
    cfg = next(run.glob("saes/*/cfg.json"))
    name = json.loads(cfg.read_text())["metadata"]["set"]
    check.run("eval", "--run", run, "--set", name, "--tokens", "20k", "--device", devices[0])
    edges = []
    for number, device in enumerate(devices):
        options = ("--name", f"on-{number}", "--device", device)
        check.run("circuits", "--run", run, "--set", name, "--prompt", PROMPT, *options)
        edges.append(links(run / "circuits" / f"on-{number}.json"))
    both = edges[0].keys() & edges[1].keys()
    most = max(abs(edges[0][key] - edges[1][key]) for key in both) / max(map(abs, edges[0].values()))
    same = len(both) / max(map(len, edges))
    check.compare(f"circuits of {name}", {"edges in both": same, "weights": most}, same > 0.99 and most < 1e-4)


def check_index_and_steering(check: Check, sae: Path, store: Path, out: Path, devices: list[str]) -> None:
    indexes, texts = [out / f"index-{number}.h5" for number in range(2)], []
    for index, device in zip(indexes, devices, strict=True):
        on = ("--sae", sae, "--store", store, "--device", device)
        check.run("index", *on, "--out", index)
        asked = ("--latent", 10, "--strength", 2, "--prompt", "def main(", "--n", 2, "--max-new-tokens", 12)
        said = check.run("steer", *on, "--index", index, *asked, "--temperature", 0)
        texts.append([line for line in said.splitlines() if not line.startswith("took")])
        check.run("steer", "rank", *on, "--index", index, "--top", 5)
    one, other = (datasets(index) for index in indexes)
    check.compare("index, what it holds", sorted(one.keys() ^ other.keys()), one.keys() == other.keys())
    worst = max((apart(one[name], other[name]), name) for name in one.keys() & other.keys())
    check.compare("index", worst, worst[0] <= 1e-3)
    check.compare("steered texts at temperature 0", [len(text) for text in texts], texts[0] == texts[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", default="200k")
    parser.add_argument("--devices", nargs=2, default=["cuda", "cpu"])
    args = parser.parse_args()
    check, out, first = Check(), args.out, args.devices[0]
    text = ("--model", "embedded", "--tokens", args.tokens, "--validation-tokens", "30k")
    check.run("harvest", *text, "--layers", "0,1,2,3", "--kinds", "resid_post,mlp", "--out", out / "store")
    for kind, options in KINDS.items():
        common = ("--store", out / "store", "--d-sae", 1024, "--k", 32, "--tokens", args.tokens, "--batch", 1024)
        level = ("--target-l0", 32) if kind == "sae" else ()
        check.run("train", "--kind", kind, *options, *common, *level, "--out", out / kind, "--device", first)
    check_evaluation(check, out / "sae", args.devices)
    for kind in ("transcoder", "clt"):
        check_circuits(check, out / kind, args.devices)
    check_index_and_steering(check, out / "sae/saes/topk-k32", out / "store", out, args.devices)
    check.run(
        "bench", "stability", "--run", out / "sae", "--sae", f"{out}/sae/saes/topk-k32,{out}/sae/saes/batchtopk-k32"
    )
    check.run(
        "bench", "synthetic", "--out", out / "known", "--samples", "200k", "--arch", "topk,relu", "--device", first
    )
    print(json.dumps({"failed": check.failed}))
    return int(check.failed > 0)


if __name__ == "__main__":
    sys.exit(main())

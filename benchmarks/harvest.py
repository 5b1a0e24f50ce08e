"""Time a harvest against the bare forward pass of the Hugging Face module, cut after the deepest layer.

    python benchmarks/harvest.py MODEL_DIR --layers 6 [--layers 2,4,6 …] --tokens N --context 256 --batch 16 [--peers VENV]
    python benchmarks/harvest.py DIR --make gpt2      # a GPT-2-small-shaped checkpoint of random weights, and stop

Prints a JSON line per --layers. The harvest (text, forward, shards safe on disk) and the bare module (a copy of
its own, in its default attention, without hooks or a KV cache, its layers after the deepest cut off, nothing kept) take turns on
the same batches, --chunks times, so that other programs disturb both; figures are those of the median turn. Of more than one --layers, each takes its turn too.
`cpu_ratio` is the ratio in seconds of CPU time, which a busy machine disturbs less and from which the writer's work is
not hidden; `seconds_over_first` is what these layers took against the first --layers. `write_stall_s` is how long the model waited for the writer, that of the last shard of each turn included.

With --peers, SAELens' cache runner (`CacheActivationsRunner`) caches one layer of the same checkpoint on the same contexts, in
the same turns, in that virtual environment (`pip install torch==2.13.0 sae-lens`); benchmarks/caches.py is its side.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from operator import truediv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from saebench.config import parse_count
from saebench.harvest.plan import Plan, plans
from saebench.harvest.run import open_model, run_model
from saebench.harvest.settings import HarvestConfig
from saebench.models import EMBEDDED_MODEL_PATH, default_dtype
from saebench.store import StoreWriter
from saebench.text import TextConfig

CACHE = Path(__file__).with_name("caches.py")


def make_gpt2(folder: Path) -> None:
    """Random weights in the shape of GPT-2 small, with the embedded model's tokenizer."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(GPT2Config(bos_token_id=0, eos_token_id=0))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED_MODEL_PATH).save_pretrained(folder)


def bare_forward(folder: Path, deepest: int, device: str) -> Callable[[torch.Tensor], None]:
    """The Hugging Face module up to and with block `deepest`."""
    dtype = getattr(torch, default_dtype(device))
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    base = loaded.eval().to(device).base_model
    blocks = "h" if hasattr(base, "h") else "layers"
    setattr(base, blocks, getattr(base, blocks)[: deepest + 1])

    @torch.inference_mode()
    def run(tokens: torch.Tensor) -> None:
        base(tokens.to(device), use_cache=False)
        if device != "cpu":
            torch.cuda.synchronize()

    return run


class Harvest:
    """One set of layers, harvested turn by turn into a store of its own."""

    def __init__(self, args: argparse.Namespace, layers: tuple[int, ...], out: Path) -> None:
        shard_contexts = -(-args.tokens // (args.context * args.chunks))
        self.config = HarvestConfig(
            model=str(args.model), layers=layers, tokens=args.tokens, validation_tokens=1, context=args.context,
            batch=args.batch, shard_contexts=shard_contexts, device=args.device, dtype=args.dtype, out=out,
        )  # fmt: skip
        self.model = open_model(self.config, args.device)
        widths = dict.fromkeys(self.config.hooks, self.model.d_model)
        out.mkdir()
        self.writer = StoreWriter(out, {}, widths, self.config.stored_as)
        self.plans = plans(self.config, TextConfig(dataset=args.dataset), self.model.encoder, [])
        self.bare = bare_forward(args.model, max(layers), args.device)
        self.seconds: list[float] = []
        self.bare_seconds: list[float] = []
        self.cpu: list[tuple[float, float]] = []
        self.tokens = 0
        self.stall = 0.0

    def turn(self, *, counted: bool) -> Plan:
        """The next training shard through the harvest and through the bare module."""

        def next_plan() -> Iterator[Plan]:
            # Its text is read and packed here, in the time of the harvest.
            found.append(next(plan for plan in self.plans if plan.split == "train"))
            yield found[-1]._replace(number=len(self.writer.shards))

        found: list[Plan] = []
        started, cpu = time.perf_counter(), time.process_time()
        stall = run_model(self.config, self.model, self.writer, next_plan())
        harvested, cpu_harvested = time.perf_counter(), time.process_time()
        contexts = found[0].contexts
        for start in range(0, len(contexts), self.config.per_pass):
            rows = [context.tokens for context in contexts[start : start + self.config.per_pass]]
            self.bare(torch.from_numpy(np.stack(rows)).long())
        ended = time.perf_counter()
        if counted:
            self.cpu.append((cpu_harvested - cpu, time.process_time() - cpu_harvested))
            self.seconds.append(harvested - started)
            self.bare_seconds.append(ended - harvested)
            self.tokens += len(contexts) * self.config.context
            self.stall += stall
        return found[0]

    def line(self, first: "Harvest") -> dict[str, Any]:
        """Of the median turn; ratios are the medians of the turns' own, whose parts saw about the same disturbances."""
        seconds, bare = statistics.median(self.seconds), statistics.median(self.bare_seconds)
        tokens = self.tokens / len(self.seconds)
        return {
            "tokens_per_s": round(tokens / seconds),
            "forward_tokens_per_s": round(tokens / bare),
            "ratio": round(statistics.median(b / a for a, b in zip(self.seconds, self.bare_seconds, strict=True)), 3),
            "mb_per_s": round(self.writer.shards[-1]["bytes"] / seconds / 1e6, 2),
            "write_stall_s": round(self.stall, 3),
            "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "layers": list(self.config.layers),
            "cpu_ratio": round(statistics.median(b / a for a, b in self.cpu), 3),
            "seconds_over_first": round(statistics.median(map(truediv, self.seconds, first.seconds)), 3),
            "turns_s": [[round(a, 2), round(b, 2)] for a, b in zip(self.seconds, self.bare_seconds, strict=True)],
        }


class Peer:
    """SAELens' cache runner in its own environment, told to cache a shard's contexts at a time."""

    def __init__(self, args: argparse.Namespace, layer: int, folder: Path) -> None:
        self.folder = folder
        self.context = args.context
        command = [args.peers / "bin/python", CACHE, args.model, str(layer), str(args.batch), args.dtype, folder]
        self.process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.tokens, self.seconds = 0, list[float]()
        self.ready = json.loads(self._answer())

    def turn(self, plan: Plan, *, counted: bool) -> None:
        path = self.folder.with_suffix(".npy")
        np.save(path, np.stack([context.tokens for context in plan.contexts]))
        assert self.process.stdin
        print(path, file=self.process.stdin, flush=True)
        answer = json.loads(self._answer())
        if counted:
            self.tokens += len(plan.contexts) * self.context
            self.seconds.append(answer["seconds"])

    def _answer(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"SAELens' runner ended with {self.process.wait()}")
        return line

    def line(self) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()
        return {
            "package": "saelens",
            **self.ready,
            "tokens_per_s": round(self.tokens / len(self.seconds) / statistics.median(self.seconds)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--make", choices=("gpt2",))
    parser.add_argument("--layers", action="append", type=lambda text: tuple(map(int, text.split(","))), default=[])
    parser.add_argument("--tokens", type=parse_count, default=131_072)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--chunks", type=int, default=8, help="turns")
    parser.add_argument("--dataset", default="embedded")
    parser.add_argument("--peers", type=Path, help="virtual environment that has sae-lens")
    args = parser.parse_args()
    if args.make:
        make_gpt2(args.model)
        return
    with tempfile.TemporaryDirectory() as scratch:
        harvests = [Harvest(args, layers, Path(scratch) / str(i)) for i, layers in enumerate(args.layers or [(6,)])]
        peer = Peer(args, max(harvests[0].config.layers), Path(scratch) / "saelens") if args.peers else None
        for chunk in range(args.chunks):
            plan = None
            for each in harvests:
                plan = each.turn(counted=chunk > 0)  # the first warms up
            if peer and plan:
                peer.turn(plan, counted=chunk > 0)
            print(f"turn {chunk + 1} of {args.chunks}", file=sys.stderr)
        for each in harvests:
            print(json.dumps(each.line(harvests[0])), flush=True)
        if peer:
            print(json.dumps(peer.line()), flush=True)


if __name__ == "__main__":
    main()

"""Check on a CUDA machine that every GPU path computes what its CPU twin does, and time it.

    python scripts/check_gpu.py

Prints a JSON line per check with the largest error relative to the largest value, and one per timing;
exits 1 when an error is beyond its tolerance, 2 without a GPU.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from saebench.harvest import HarvestConfig, harvest
from saebench.models import ModelDtype, capture, hook_name, load_model
from saebench.sae import initialise, new_sae
from saebench.sae.sparse import Encoder, gather_dot, gather_sum
from saebench.store import Store
from saebench.store.schema import StoreDtype
from saebench.text import TextConfig
from saebench.train.gradients import exact_gradients
from saebench.train.objectives import Context, bandwidth
from saebench.train.recipes import RECIPES

SHAPES = ((64, 512, 8, 128), (768, 24_576, 32, 2048))  # d_in, d_sae, k, rows
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def check(name: str, found: Tensor, expected: Tensor, tolerance: float) -> bool:
    error = (found.cpu().float() - expected.float()).abs().max().item() / max(expected.abs().max().item(), 1e-30)
    print(json.dumps({"check": name, "error": error, "tolerance": tolerance, "ok": error <= tolerance}))
    return error <= tolerance


def median_ms(run: Callable[[], object], times: int = 20) -> float:
    for _ in range(3):
        run()
    seconds = []
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end))
    return statistics.median(seconds)


def check_kernels(d_in: int, d_sae: int, k: int, rows: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, d_in, generator=generator)
    table = torch.randn(d_sae, d_in, generator=generator)
    code, values = Encoder(x, table.T / d_in**0.5, torch.zeros(d_sae)).topk(k)
    bounds, sorted_rows, order = code.by_latent
    fine = True
    for dtype, tolerance in TOLERANCE.items():
        label = f"{d_in}x{d_sae} k={k} {str(dtype).removeprefix('torch.')}"
        low_x, low_table = x.to(dtype), table.to(dtype)
        sums = (code.offsets, code.latents, values, low_table)
        columns = (bounds, sorted_rows, values[order], low_x)
        dots = (code.offsets, code.latents, low_x, low_table)
        for name, kernel, operands in (
            ("decode", gather_sum, sums), ("weight gradient", gather_sum, columns), ("products", gather_dot, dots),
        ):  # fmt: skip
            found = kernel(*(operand.cuda() for operand in operands))
            expected = kernel(*(o.float() if o.is_floating_point() else o for o in operands))
            fine &= check(f"{name} {label}", found, expected, tolerance)
    return fine


def check_steps(d_in: int, d_sae: int, k: int, rows: int) -> bool:
    """Selection in float32 may differ where two latents are nearly equal, so gradients are compared as a whole."""
    fine = True
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, d_in, generator=generator)
    torch.backends.cuda.matmul.allow_tf32 = False
    for architecture, recipe in RECIPES.items():
        sae = new_sae(recipe.sae.architecture, d_in, d_sae, k=k)
        initialise(sae, torch.zeros(d_in), generator, recipe.gains)
        if architecture == "jumprelu":
            sae.get_parameter("threshold").data.fill_(bandwidth(d_in))
        dead = torch.arange(0, d_sae, 50) if recipe.takes_k else torch.empty(0, dtype=torch.int64)
        expected = exact_gradients(recipe.gradients, sae, x, Context(torch.tensor(0.3), dead, k))
        context = Context(torch.tensor(0.3).cuda(), dead.cuda(), k)
        found = exact_gradients(recipe.gradients, sae.cuda(), x.cuda(), context)
        for name, value in expected.of.items():
            difference = (found.of[name].cpu() - value).norm().item() / max(value.norm().item(), 1e-30)
            ok = difference <= 1e-2
            fine &= ok
            print(json.dumps({"check": f"{architecture} d{name} {d_in}x{d_sae}", "error": difference, "ok": ok}))
    return fine


def check_harvest() -> bool:
    """Rows that a copy stream brought into pinned buffers are those that the model gave, and about those of a CPU."""
    text, fine = TextConfig(), True
    with tempfile.TemporaryDirectory() as scratch:

        def rows(device: str, model_dtype: ModelDtype, dtype: StoreDtype) -> tuple[Store, Tensor]:
            out = Path(scratch) / f"{device}-{model_dtype}-{dtype}"
            made = harvest(
                HarvestConfig(
                    layers=(1, 2), tokens=100_000, batch=8, shard_contexts=64, device=device, dtype=dtype,
                    model_dtype=model_dtype, out=out,
                ),
                text,
            )  # fmt: skip
            assert made is not None
            return made, torch.cat([shard.rows(hook_name(2)) for shard in made.shards])

        on_cpu, on_gpu = (rows(device, "float32", "float16")[1] for device in ("cpu", "cuda"))
        fine &= check("harvest float32", on_gpu, on_cpu, TOLERANCE[torch.bfloat16])
        # The store's dtype is the model's: later layers must not write over what is being copied.
        made, found = rows("cuda", "bfloat16", "bfloat16")
        model = load_model("embedded", device="cuda", dtype="bfloat16")
        tokens = [shard.column("tokens").reshape(-1, made.context).copy() for shard in made.shards]
        batches = [batch.cuda() for part in tokens for batch in torch.from_numpy(part).long().split(8)]
        expected = [capture(model, batch, [hook_name(2)])[hook_name(2)].flatten(0, 1).cpu() for batch in batches]
        fine &= check("harvest bfloat16, to the last bit", found, torch.cat(expected), 0.0)
    return fine


def time_kernels(d_in: int, d_sae: int, k: int, rows: int) -> None:
    x, table = torch.randn(rows, d_in, device="cuda"), torch.randn(d_sae, d_in, device="cuda")
    code, values = Encoder(x, table.T, torch.zeros(d_sae, device="cuda"), bf16=True).topk(k)
    bounds, sorted_rows, order = code.by_latent
    gathered = rows * k * d_in * 4
    for name, run, moved in (
        ("encoder and selection", lambda: Encoder(x, table.T, table.new_zeros(d_sae), bf16=True).topk(k), None),
        ("decode", lambda: gather_sum(code.offsets, code.latents, values, table), gathered),
        ("weight gradient", lambda: gather_sum(bounds, sorted_rows, values[order], x), gathered),
        ("products", lambda: gather_dot(code.offsets, code.latents, x, table), gathered),
    ):
        ms = median_ms(run)
        line = {"time": name, "d": d_in, "f": d_sae, "k": k, "rows": rows, "ms": round(ms, 3)}
        print(json.dumps(line | ({"gathered_gb_per_s": round(moved / ms / 1e6)} if moved else {})))


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device here; the tests check the same kernels through Triton's interpreter", file=sys.stderr)
        return 2
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__}))
    fine = all([check_kernels(*shape) for shape in SHAPES] + [check_steps(64, 512, 8, 256), check_harvest()])
    time_kernels(768, 24_576, 32, 16_384)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())

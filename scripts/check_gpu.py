"""Check on a CUDA machine that every GPU path computes what its CPU twin does, and time it.

    python scripts/check_gpu.py

Prints a JSON line per check with the largest error relative to the largest value, and one per timing;
exits 1 when an error is beyond its tolerance, 2 without a GPU.
"""

import gc
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saebench.harvest import HarvestConfig, harvest
from saebench.models import ModelDtype, capture, hook_name, load_model
from saebench.sae import initialise, new_sae
from saebench.sae.refit import refit
from saebench.sae.sparse import Encoder, SparseCode, forget_scratch, gather_dot, gather_sum
from saebench.store import Store
from saebench.store.schema import Moments, StoreDtype
from saebench.store.shuffle import shuffled_batches
from saebench.text import TextConfig
from saebench.train.gradients import exact_gradients
from saebench.train.member import LOOK_EVERY, Member
from saebench.train.memory import need_of
from saebench.train.objectives import Context, bandwidth
from saebench.train.recipes import RECIPES
from saebench.train.spec import Spec

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
    there = SparseCode(code.offsets.cuda(), code.latents.cuda(), d_sae)
    found = refit(there, values.cuda(), x.cuda(), table.cuda())
    return check(f"refit {d_in}x{d_sae} k={k}", found, refit(code, values, x, table), 1e-3) and fine


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


def new_member(architecture: str, d_in: int, d_sae: int, k: int, n_steps: int = 10_000) -> Member:
    level: dict[str, Any] = {"k": k} if RECIPES[architecture].takes_k else {"l1": 1.0}
    spec = Spec(name=architecture, architecture=architecture, d_sae=d_sae, lr=1e-4, seed=0, **level)
    return Member(spec, torch.zeros(d_in), dead_steps=10**6, n_steps=n_steps, device="cuda")


@torch.no_grad()
def sparse_member(architecture: str, x: Tensor, d_sae: int, k: int) -> Member:
    """Past its warm-up: k latents are active on the mean row."""
    member = new_member(architecture, x.shape[1], d_sae, k)
    if not RECIPES[architecture].takes_k:
        least = member.sae.project(x).flatten().topk(k * len(x), sorted=False).values.min()
        name = {"jumprelu": "threshold", "gated": "b_gate", "relu": "b_enc"}[architecture]
        member.sae.get_parameter(name).fill_(least if name == "threshold" else -least)
        member.sparsity.l0.fill_(k)
    for step in range(2):
        member.step(x, step * LOOK_EVERY)  # looks, so that there is room for the pairs of the next steps
    return member


def check_no_waits(d_in: int, d_sae: int, k: int, rows: int) -> bool:
    """Between looks no step reads from the device."""
    fine, x = True, torch.randn(rows, d_in, device="cuda")
    for architecture in RECIPES:
        member, said = sparse_member(architecture, x, d_sae, k), ""
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(LOOK_EVERY + 1, LOOK_EVERY + 4):
                member.step(x, step)
        except RuntimeError as error:
            said = str(error).splitlines()[0]
        torch.cuda.set_sync_debug_mode("default")
        ok = not said and "steps_left_out" not in member.log_line(0)
        fine &= ok
        print(json.dumps({"check": f"{architecture} waits for nothing", "ok": ok} | ({"error": said} if said else {})))
    return fine


def check_room(d_in: int, d_sae: int, k: int, rows: int) -> bool:
    """Gradients where there is room for the active pairs and more are those of a search that waits."""
    fine, x = True, torch.randn(rows, d_in, device="cuda")
    for architecture, recipe in RECIPES.items():
        if recipe.takes_k:
            continue
        sae = sparse_member(architecture, x, d_sae, k).sae
        context = Context(torch.tensor(0.3).cuda(), torch.empty(0, dtype=torch.int64).cuda(), None)
        waited = exact_gradients(recipe.gradients, sae, x, context)
        assert waited.fullest is not None
        found = exact_gradients(recipe.gradients, sae, x, context, most=2 * int(waited.fullest))
        for name, value in waited.of.items():
            fine &= check(f"{architecture} d{name} with room", found.of[name], value.cpu(), 1e-5)
    return fine


def check_plan(d_in: int, d_sae: int, k: int, rows: int) -> bool:
    """What a step takes at most is what the plan says, or up to three times less."""
    fine, x = True, torch.randn(rows, d_in, device="cuda")
    for architecture in RECIPES:
        forget_scratch()
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        member = new_member(architecture, d_in, d_sae, k)
        for step in range(3):
            member.step(x, step)  # with all latents at first, where there is no k
        most = torch.cuda.max_memory_allocated() - before
        need = need_of(member.spec, d_in, rows, torch.device("cuda"))
        planned = need.held + need.passing
        ok = most <= planned <= 3 * most
        fine &= ok
        line = {"check": f"{architecture} memory", "most_mb": most >> 20, "planned_mb": planned >> 20, "ok": ok}
        print(json.dumps(line))
        del member
    return fine


def check_harvest() -> bool:
    """Rows that a copy stream brought into pinned buffers are those that the model gave, and about those of a CPU; so are the
    batches that go back to the GPU, and the moments that it has summed."""
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
        for store in (made, rows("cuda", "float32", "int8")[0]):
            of = store.manifest["dtype"]
            kept = [
                shard.rows(hook_name(2))[torch.from_numpy(shard.column("keep"))] for shard in store.of_split("train")
            ]
            want, have = Moments.of(torch.cat(kept).float().numpy()).to_json(), store.statistics(hook_name(2))
            for name in ("rows", "mean", "mean_squared_norm", "median_norm"):
                fine &= check(f"{name} of {of}", torch.tensor(have[name]), torch.tensor(want[name]), 1e-6)
            streams = [
                shuffled_batches(store, hook_name(2), 1000, seed=0, buffer_rows=20_000, device=device)
                for device in ("cpu", "cuda")
            ]
            pairs = [[next(stream)[0] for stream in streams] for _ in range(150)]  # as fast as they come
            same = all(torch.equal(one, other.cpu()) for one, other in pairs)
            fine &= same
            print(json.dumps({"check": f"batches of {of}, to the last bit", "ok": same}))
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


def time_steps(d_in: int, d_sae: int, k: int, rows: int) -> None:
    x = torch.randn(rows, d_in, device="cuda")
    matmul: Any = torch.backends.cuda.matmul
    for dtype in ("float32", "tf32", "bfloat16"):
        matmul.allow_tf32 = dtype != "float32"
        for architecture, recipe in RECIPES.items():
            for dense in (False,) if recipe.takes_k else (False, True):
                member = sparse_member(architecture, x, d_sae, k)
                member.bf16, member._dense, steps = (
                    dtype == "bfloat16",
                    dense,
                    iter(range(LOOK_EVERY + 1, 2 * LOOK_EVERY)),
                )
                weights, inputs = member.sae.W_enc.detach(), x
                if member.bf16:
                    weights, inputs = weights.bfloat16(), x.bfloat16()
                product = median_ms(lambda weights=weights, inputs=inputs: inputs @ weights)
                step = median_ms(lambda member=member, steps=steps: member.step(x, next(steps)))
                line = {
                    "time": f"{architecture} step",
                    "dense": dense,
                    "dtype": dtype,
                    "d": d_in,
                    "f": d_sae,
                    "rows": rows,
                }
                print(
                    json.dumps(
                        line
                        | {"ms": round(step, 3), "product_ms": round(product, 3), "ratio": round(step / product, 2)}
                    )
                )
    matmul.allow_tf32 = False


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device here; the tests check the same kernels through Triton's interpreter", file=sys.stderr)
        return 2
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__}))
    checks = [check_kernels(*shape) for shape in SHAPES]
    checks += [check_steps(64, 512, 8, 256), check_room(64, 512, 8, 256), check_no_waits(768, 24_576, 32, 4096)]
    checks += [check_plan(768, 24_576, 32, 4096), check_plan(512, 8192, 64, 16_384), check_harvest()]
    time_kernels(768, 24_576, 32, 16_384)
    time_steps(768, 24_576, 32, 4096)
    return 0 if all(checks) else 1


if __name__ == "__main__":
    sys.exit(main())

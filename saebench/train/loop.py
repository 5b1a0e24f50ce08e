"""The training loop: a grid of SAEs off one shuffled stream of activations."""

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saebench.config import differences, to_json
from saebench.files import locked
from saebench.harvest.window import delete_windows
from saebench.models import choose_device, model_path
from saebench.runlog import MetricsLog, interruptible, progress, provenance
from saebench.sae import fold, read_config, save_sae
from saebench.store import Cursor, Store, open_store, shuffled_batches
from saebench.store.norms import moments_within, rows_beyond
from saebench.store.schema import MASSIVE
from saebench.store.shuffle import ShardsOf
from saebench.train.checkpoint import Checkpoint, begun_as, full_disk_is_a_value_error
from saebench.train.member import Member, Spec
from saebench.train.rolling import Rolling, Stopped, Whole, window_shards
from saebench.train.settings import TrainConfig, grid

log = logging.getLogger(__name__)

LOG_EVERY = 50  # steps
CHECKPOINT_SECONDS = 60.0  # at least, and so many that checkpoints take no more than this share of the time:
CHECKPOINT_SHARE = 0.05
MARGIN = 1.2  # batches that a window must have, since how many rows of it are kept is an estimate
FEW = 10_000  # held-out rows, fewer than which leave the figures of an evaluation wide apart


class Stream(NamedTuple):
    """The rows of one hook: endless batches, and what brings them to E‖x‖² = D."""

    batches: Iterator[tuple[Tensor, Cursor]]
    scale: float
    mean_D: Tensor


def train(
    config: TrainConfig, *, model_device: str | None = None, trust_remote_code: bool = False
) -> list[Path] | None:
    """Train the grid; returns the SAEs' directories, or None when Ctrl-C ended it early.

    The same call continues a run that was interrupted or killed, and skips SAEs that are done. Of a rolling run,
    `model_device` is where the harvester's model runs (default: the first of cuda, mps and cpu at hand).
    Raises ValueError for a store, hook or checkpoint that does not fit; and, once the others are
    trained and saved, for SAEs whose loss stopped being finite.
    """
    store = open_store(config.store)
    hooks = config.hook or (_only_hook(store),)
    device = choose_device(config.device, float64=True)
    folder = config.out / "saes"
    specs = grid(config, store.d_in(hooks[0]), hooks)
    window = _window_shards(config, store, hooks)
    with locked(config.out), _tf32(config.dtype == "tf32"), contextlib.ExitStack() as held:
        multiples = {hook: _multiple(config, store, hook, specs, folder, window) for hook in hooks}
        identity = {spec.name: _identity(config, spec, store, multiples, window) for spec in specs}
        todo = [spec for spec in specs if not _done(folder / spec.name, identity[spec.name])]
        checkpoint = Checkpoint(folder, identity)
        if not todo:
            if window and checkpoint.exists:  # killed as it was about to end
                held.enter_context(locked(store.folder, other="--store"))
                delete_windows(store.folder)
            checkpoint.remove()
            log.info("%s: all %d SAEs are trained already", folder, len(specs))
            return [folder / spec.name for spec in specs]

        means = {hook: _input_scale(store, hook, multiples[hook]) for hook in hooks}
        members = [
            Member(spec, means[spec.hook][1], config.dead_steps, config.n_steps, device, config.dtype == "bfloat16")
            for spec in todo
        ]
        first, cursors, seconds = checkpoint.restore(members)
        logs = {spec.name: MetricsLog(folder / spec.name / "metrics.jsonl", first) for spec in todo}
        active = [member for member in members if member.diverged is None]
        total, done = config.n_steps * config.batch, first * config.batch
        clock = Clock(seconds, done)
        interrupt = held.enter_context(interruptible())
        bar = held.enter_context(progress(total, f"train {len(active)} SAEs", "row", done))
        source = Whole(store)
        if window:
            source = Rolling(
                store, window, total, cursors.values(), lambda: interrupt.requested,
                device=model_device, trust_remote_code=trust_remote_code,
            )  # fmt: skip
        held.enter_context(source)
        streams = {
            hook: Stream(_batches(config, store, hook, multiples, window, cursors, source.shards), *means[hook])
            for hook in {spec.hook: None for spec in todo}
        }
        for step in range(first, config.n_steps):
            try:
                # All hooks' before the first SAE takes a step: what cannot be had leaves all of them where they are.
                drawn = source.drawn(lambda: {hook: next(stream.batches) for hook, stream in streams.items()})
            except (Stopped, ValueError) as end:
                checkpoint.save(members, step, cursors, clock.total)
                if isinstance(end, ValueError):
                    raise
                log.warning("stopped before step %d of %d; the same command continues", step + 1, config.n_steps)
                return None
            for hook, (rows, cursor) in drawn.items():
                cursors[hook] = cursor
                x_BD = rows.to(device, torch.float32) * streams[hook].scale
                for member in active:
                    if member.spec.hook == hook:
                        member.step(x_BD, step)
            bar.update(config.batch)
            last = step + 1 == config.n_steps
            if (step + 1) % LOG_EVERY == 0 or last:
                _log(active, logs, bar, step, config.batch, clock)
                active = [member for member in active if member.diverged is None]
            due = clock.save_is_due or source.left(cursors.values())
            if last or due or not active or interrupt.requested:
                with clock.saving():
                    checkpoint.save(members, step + 1, cursors, clock.total)
                source.release(cursors.values())
            if not active:
                break
            if interrupt.requested and not last:
                log.warning("stopped after step %d of %d; the same command continues", step + 1, config.n_steps)
                return None

        bar.close()
        epochs = total / source.offered(cursors.values())
        for member in active:
            multiple = multiples[member.spec.hook]
            facts = _facts(
                config, store, member, identity[member.spec.name], clock.total / len(members), epochs, multiple
            )
            fold(member.sae, streams[member.spec.hook].scale)
            with full_disk_is_a_value_error(f"{folder / member.spec.name} (its checkpoint is safe)"):
                save_sae(member.sae, folder / member.spec.name, facts)
        source.delete()
        _warn_of_missed_targets(active)
        _refuse_diverged(members, checkpoint)
        checkpoint.remove()
    return [folder / spec.name for spec in specs]


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Whether products on a GPU may be in TF32, for a while: what comes after it in the process is not to be."""
    matmul: Any = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, allowed
    try:
        yield
    finally:
        matmul.allow_tf32 = before


class Clock:
    """Seconds of a run, across interruptions, and since its last checkpoint; rows a second since the last log line."""

    def __init__(self, before: float, rows: int) -> None:
        self.before = before
        self.started = self.last_save = self.last_line = time.monotonic()
        self.save_took = 0.0
        self.rows = rows

    @property
    def total(self) -> float:
        return self.before + time.monotonic() - self.started

    @property
    def save_is_due(self) -> bool:
        return time.monotonic() - self.last_save > max(CHECKPOINT_SECONDS, self.save_took / CHECKPOINT_SHARE)

    def rate(self, rows: int) -> float:
        """Rows a second since this was last asked, `rows` counted from the start of the run."""
        now, before, earlier = time.monotonic(), self.rows, self.last_line
        self.rows, self.last_line = rows, now
        return (rows - before) / (now - earlier)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.last_save = time.monotonic()
        self.save_took = self.last_save - began


def _multiple(
    config: TrainConfig, store: Store, hook: str, specs: list[Spec], folder: Path, window: int | None
) -> float | None:
    """How many times the median norm is too long for a row at a hook; None where no row is left out.

    What is not said is as the run was begun, which may have been before massive rows were left out.
    """
    begun = begun_as(folder)
    mine = [begun[spec.name] for spec in specs if spec.hook == hook and spec.name in begun]
    before = mine[0].get("exclude_outliers") if mine else None
    if config.exclude_outliers is None and mine:
        return before
    asked = MASSIVE if config.exclude_outliers is None else config.exclude_outliers
    # Windows may have such rows where their head has none.
    if asked == math.inf or asked == before or window or rows_beyond(store.norm_histogram(hook), asked):
        return None if asked == math.inf else asked
    return None


def _longest(store: Store, hook: str, multiple: float | None) -> float:
    """The norm of the longest row to train on."""
    return (multiple or math.inf) * store.statistics(hook)["median_norm"]


def _input_scale(store: Store, hook: str, multiple: float | None) -> tuple[float, Tensor]:
    """(the factor that brings E‖x‖² to D, the mean of the rows times it), both of the rows trained on."""
    statistics = store.statistics(hook)
    mean, squared = np.array(statistics["mean"]), statistics["mean_squared_norm"]
    if multiple is not None:
        histogram = store.norm_histogram(hook)
        log.info(
            "%s: %s of %s rows are left out, longer than %g × the median norm of %.4g",
            hook, f"{rows_beyond(histogram, multiple):,}", f"{int(histogram.sum()):,}",
            multiple, statistics["median_norm"],
        )  # fmt: skip
        mean, squared = moments_within(store, hook, _longest(store, hook, multiple))
    scale = math.sqrt(store.d_in(hook) / squared)
    return scale, torch.tensor(mean, dtype=torch.float32) * scale


def _batches(
    config: TrainConfig, store: Store, hook: str, multiples: dict[str, float | None], window: int | None,
    cursors: dict[str, Cursor], shards: ShardsOf,
) -> Iterator[tuple[Tensor, Cursor]]:  # fmt: skip
    start = cursors.get(hook, Cursor())
    memory = int(config.memory_gb * 2**30 / len(multiples))
    # In a rolling run a row is left out at every hook if at one, so that no hook gets ahead of the others' windows.
    apart = multiples if window else {hook: multiples[hook]}
    longest = {name: _longest(store, name, multiple) for name, multiple in apart.items() if multiple is not None}
    return shuffled_batches(
        store, hook, config.batch, seed=config.seed[0], memory=memory, start=start, longest=longest, shards=shards
    )


def _window_shards(config: TrainConfig, store: Store, hooks: Sequence[str]) -> int | None:
    """Shards of a window of a rolling run; None where there are to be none."""
    if config.rolling is None:
        return None
    if store.manifest["exhausted"]:
        log.warning("%s holds all of its text: there are no windows to follow, it is trained on as it is", store.folder)
        return None
    size = window_shards(store, config.rolling)
    made = store.manifest["identity"]
    kept = size * made["shard_contexts"] * made["context"] * store.rows("train", kept=True) / store.rows("train")
    if kept < MARGIN * config.batch:  # a batch may then need three windows at once
        raise ValueError(
            f"batch is {config.batch} and a window of {size} shards has about {kept:.0f} rows to train on; expected at least "
            f"{MARGIN} batches in a window: use a larger --rolling, or a smaller --batch"
        )
    if (held_out := store.rows("validation")) < FEW:
        log.warning(
            "%s has %s held-out rows, those of its own stretch of text: figures on so few are not to be trusted; a larger "
            "--rolling, or -- --validation-fraction, gives more", store.folder, f"{held_out:,}",
        )  # fmt: skip
    return size


def _only_hook(store: Store) -> str:
    if len(store.hooks) > 1:
        raise ValueError(f"{store.folder} has several hooks; choose one with --hook: {', '.join(store.hooks)}")
    return store.hooks[0]


def _identity(
    config: TrainConfig, spec: Spec, store: Store, multiples: dict[str, float | None], window: int | None
) -> dict[str, Any]:
    """Everything that decides the weights of one SAE."""
    shared = {
        **{name: to_json(config)[name] for name in ("tokens", "batch", "dtype")},
        "memory_gb": config.memory_gb / len(multiples),
        "order": config.seed[0],
        "dead_steps": config.dead_steps,
        "store": store.hash,
    }
    if (multiple := multiples[spec.hook]) is not None:
        shared["exclude_outliers"] = multiple
    if window:
        shared["window_shards"] = window
        if len(multiples) > 1 and any(multiples.values()):
            shared["left_out_at"] = sorted(multiples)
    return {**spec.to_json(), **shared}


def _done(folder: Path, identity: dict[str, Any]) -> bool:
    """Whether this SAE was trained already. Raises ValueError when the folder has another of its name."""
    if not (folder / "cfg.json").exists():
        return False
    if changed := differences(read_config(folder)["metadata"]["saebench"]["identity"], identity):
        raise ValueError(
            f"{folder} holds an SAE trained with other settings: {'; '.join(changed)}. Choose another --out"
        )
    return True


def _refuse_diverged(members: list[Member], checkpoint: Checkpoint) -> None:
    """Raises ValueError naming SAEs whose loss or gradient was not finite, the step, and where their last good weights are."""
    for member in members:
        if member.diverged is not None:
            raise ValueError(
                f"{member.spec.name} stopped at step {member.diverged + 1}, when its loss was no longer finite; its weights "
                f"of before are in {checkpoint.latest(member)}. The other SAEs are not affected. "
                "Lower --lr, or look at the store with `saebench store info`"
            )


def _warn_of_missed_targets(members: list[Member]) -> None:
    for member in members:
        l0, target = float(member.sparsity.l0), member.spec.target_l0
        if target is not None and abs(l0 / target - 1) > 0.1:
            log.warning(
                "%s ended at L0 %.1f, not %g: train on more --tokens, so that λ has time to settle",
                member.spec.name,
                l0,
                target,
            )


def _log(members: list[Member], logs: dict[str, MetricsLog], bar: Any, step: int, batch: int, clock: Clock) -> None:
    """A line per SAE, and a warning for one that has just diverged."""
    common = {
        "step": step + 1,
        "tokens": (step + 1) * batch,
        "seconds": clock.total,
        "tokens_per_s": clock.rate((step + 1) * batch),
    }
    for member in members:
        if member.diverged is not None:
            log.warning(
                "the loss of %s is no longer finite at step %d; the others go on", member.spec.name, member.diverged + 1
            )
            continue
        line = member.log_line(step)
        logs[member.spec.name].write(**common, **line)
        bar.set_postfix_str(f"{member.spec.name}: L0 {line['l0']:.1f}, FVU {line['fvu']:.3f}", refresh=False)


def _facts(
    config: TrainConfig, store: Store, member: Member, identity: dict[str, Any], seconds: float, epochs: float,
    multiple: float | None,
) -> dict[str, Any]:  # fmt: skip
    """Metadata of a saved SAE: what SAELens' tools read, and under `saebench` how it came about."""
    made = store.manifest["identity"]
    return {
        # Vectors of one's own need not say what they are of.
        "model_name": model_path(made["model"]["id"]) if "model" in made else None,
        "model_class_name": "HookedTransformer",
        "hook_name": member.spec.hook,
        "hook_head_index": None,
        "context_size": store.context,
        "prepend_bos": store.prepends_bos,
        "seqpos_slice": [None],
        "dataset_path": made.get("text", {}).get("dataset"),
        "exclude_special_tokens": True,
        "neuronpedia_id": None,
        "training_architecture": member.spec.architecture,
        "saebench": {
            "identity": identity,
            "store": str(config.store),
            "longest_row": None if multiple is None else _longest(store, member.spec.hook, multiple),
            "tokens_trained": config.n_steps * config.batch,
            "epochs": epochs,
            "seconds": seconds,
            "lambda": None if member.spec.k else float(member.sparsity.log_coefficient.exp()),
            "provenance": provenance(),
        },
    }

"""The training loop: a grid of SAEs off one shuffled stream of activations."""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saebench.files import locked
from saebench.harvest.ranks import World, joined
from saebench.harvest.window import delete_windows
from saebench.models import choose_device
from saebench.runlog import MetricsLog, interruptible, progress
from saebench.sae import SAE, fold, save_sae
from saebench.sae.sparse import forget_scratch
from saebench.store import Store
from saebench.store.pair import open_pair
from saebench.train.checkpoint import Checkpoint, full_disk_is_a_value_error
from saebench.train.gradients import together
from saebench.train.identity import Run
from saebench.train.member import LOOK_EVERY, Member, Spec
from saebench.train.memory import check_memory
from saebench.train.ranks import PATIENCE, Ranks, Wish, check_alike, told
from saebench.train.rolling import Stopped, rows_offered, source_of
from saebench.train.settings import TrainConfig
from saebench.train.shares import Share

log = logging.getLogger(__name__)

LOG_EVERY = LOOK_EVERY
CHECKPOINT_SECONDS = 60.0  # at least, and so many that checkpoints take no more than this share of the time:
CHECKPOINT_SHARE = 0.05


def train(
    config: TrainConfig, *, model_device: str | None = None, trust_remote_code: bool = False
) -> list[Path] | None:
    """Train the grid; returns the SAEs' directories, or None when Ctrl-C ended it early.

    The same call continues a run that was interrupted or killed, and skips SAEs that are done. Under torchrun the processes
    share the work, and each comes back with all directories. Of a rolling run, `model_device` is where the harvester's model
    runs (default: the first of cuda, mps and cpu at hand).
    Raises ValueError for a store, hook or checkpoint that does not fit; and, once the others are
    trained and saved, for SAEs whose loss stopped being finite.
    """
    with (
        joined("training", "the last checkpoint is", PATIENCE) as world,
        _products(config.dtype),
        contextlib.ExitStack() as held,
    ):
        check_alike(world, told(config))
        store = world.agreed(lambda: _opened(config, world))
        device = world.agreed(lambda: choose_device(world.device(config.device), float64=True))
        world.agreed(lambda: held.enter_context(locked(config.out)) if world.leads else None)
        run = world.agreed(lambda: Run.of(config, store))
        ranks = world.agreed(lambda: Ranks(world, config, run.specs))
        made = {"device": model_device, "trust_remote_code": trust_remote_code}
        return _train(run, ranks, device, made)


def _train(run: Run, ranks: Ranks, device: str, made: dict[str, Any]) -> list[Path] | None:
    """`train`, of a run whose folder is held; `made` is how a harvester's model runs."""
    config, store, world = run.config, run.store, ranks.world
    check_alike(world, run.identity)
    checkpoint = Checkpoint(run.folder, run.identity, world, ranks.share)
    todo = world.agreed(run.to_do)
    if not todo:
        world.agreed(lambda: _clear_away(run, checkpoint) if world.leads else None)
        return run.folders
    mine = [spec for spec in todo if spec.team in ranks.own]
    with contextlib.ExitStack() as held:
        world.agreed(lambda: _check_memory(run, mine, ranks, device))
        if world.leads:
            run.say_how_well_it_shuffles()
        hooks = dict.fromkeys(hook for spec in mine for hook in spec.ends.hooks)
        inputs = world.agreed(lambda: {hook: run.inputs(hook) for hook in hooks})
        members = [_member(run, spec, inputs, device, ranks.share) for spec in mine]
        first, cursors, seconds = world.agreed(lambda: checkpoint.restore(members))
        speaks = ranks.share.world.leads  # writes what is known of its SAEs
        spoken = mine if speaks else []
        logs = {spec.name: MetricsLog(run.folder / spec.name / "metrics.jsonl", first) for spec in spoken}
        active = [member for member in members if member.diverged is None]
        total, done = config.n_steps * config.batch, first * config.batch
        clock = Clock(seconds, done)
        interrupt = held.enter_context(interruptible())
        shown = f"train {len(active)} SAEs" + f", of {len(todo)} with those of other processes" * (mine != todo)
        bar = held.enter_context(progress(total, shown, "row", done, shown=world.leads))
        source = source_of(store, run.window, total, cursors.values(), lambda: interrupt.requested, **made)
        held.enter_context(source)
        teams, streams = _teams(active), [stream for stream in run.streams if stream[0] in inputs]
        batches = [
            source.served(run.batches(stream, cursors.get(stream[0]), source.shards, device)) for stream in streams
        ]
        cursors = {hook: cursor for hook, cursor in cursors.items() if hook in inputs}
        for step in range(first, config.n_steps):
            # All hooks' before the first SAE takes a step: what cannot be had leaves all of them where they are.
            drawn, failure = [], None
            try:
                drawn = [next(rows) for rows in batches]
            except (Stopped, ValueError) as end:
                if world.size == 1:
                    checkpoint.save(members, step, cursors, clock.total)
                    return _stopped(step, config, end)
                failure = end
            wish = ranks.agree(step, Wish(clock.save_is_due, interrupt.requested, not active), failure)
            if wish.idle:
                checkpoint.save(members, step, cursors, clock.total)
                break
            cursors |= {hook: cursor for rows, cursor in drawn for hook in rows}
            rows = {
                hook: ranks.share.rows_of(vectors).float() * inputs[hook][0]
                for rows, _ in drawn
                for hook, vectors in rows.items()
            }
            for team in teams:
                team_step(team, rows, step)
            bar.update(config.batch)
            last = step + 1 == config.n_steps
            if (step + 1) % LOG_EVERY == 0 or last:
                active = _log(active, logs, bar, step, config.batch, clock)
                teams = _teams(active)
            if last or wish.save or wish.stop or source.left(cursors.values()):
                with clock.saving():
                    checkpoint.save(members, step + 1, cursors, clock.total)
                source.release(cursors.values())
            if wish.stop and not last:
                return _stopped(step + 1, config)
        bar.close()
        epochs = total / rows_offered(store, run.window, cursors.values())
        whole = [(member, ranks.share.whole(member.sae)) for member in active]
        if speaks:
            _warn_of_missed_targets(active)
        else:
            whole = []
        seconds = clock.total / max(len(members), 1)
        world.agreed(lambda: [_save(run, member, sae, inputs, seconds, epochs) for member, sae in whole])
        source.delete()
        world.agreed(lambda: _refuse_diverged(members, checkpoint))
        if world.leads:
            checkpoint.remove()
    return run.folders


Inputs = dict[str, tuple[float, Tensor]]
"""For each hook, what its vectors are multiplied by, and the mean of what that makes of them."""


def _opened(config: TrainConfig, world: World) -> Store:
    if world.size > 1 and config.rolling is not None:
        raise ValueError(
            f"rolling is {config.rolling} in {world.size} processes; expected one: windows are deleted behind it. "
            "Harvest the store first, which torchrun does in several"
        )
    return open_pair(config.store, config.beside)


def _member(run: Run, spec: Spec, inputs: Inputs, device: str, share: Share) -> Member:
    config, (reads, writes) = run.config, spec.ends
    means = [[inputs[hook][1] for hook in hooks] for hooks in (reads, writes)]
    if spec.joint:  # each hook has one bias, that of its own layer's member
        means[1][1:] = [torch.zeros_like(mean) for mean in means[1][1:]]
    return Member(
        spec, _joined(means[0]), config.dead_steps(spec), config.n_steps, device, config.dtype == "bfloat16",
        mean_E=None if spec.ends.tied else _joined(means[1]), parts=run.widths(writes), share=share,
    )  # fmt: skip


def _check_memory(run: Run, specs: list[Spec], ranks: Ranks, device: str) -> None:
    widths = [sum(run.widths(spec.ends.reads + spec.ends.writes)) // 2 for spec in specs]
    parts = [replace(spec, d_sae=spec.d_sae // ranks.share.n_latents(1)) for spec in specs]
    if specs:
        batch = run.config.batch // ranks.share.n_rows(1)
        check_memory(parts, widths, batch, device, run.buffer_bytes, ranks.world.neighbours)


def _teams(members: list[Member]) -> list[list[Member]]:
    teams: dict[str, list[Member]] = {}
    for member in members:
        teams.setdefault(member.spec.team, []).append(member)
    for team in teams.values():
        for member in team:
            member.company = team
    return list(teams.values())


def team_step(team: list[Member], rows: dict[str, Tensor], step: int) -> None:
    """A step of all of them on the rows of each hook, scaled."""
    member, ends = team[0], team[0].spec.ends
    if not member.spec.joint:
        y_BE = None if ends.tied else _joined([rows[hook] for hook in ends.writes])
        member.step(_joined([rows[hook] for hook in ends.reads]), step, y_BE)
        return
    variances = {hook: member.share.variance_of(rows[hook]) for hook in ends.writes}
    steps = []
    for member in team:
        (read,), (own, *others) = member.spec.ends
        y_BE = _joined([rows[own], *(torch.zeros_like(rows[hook]) for hook in others)])
        variance = torch.stack([variances[hook] for hook in (own, *others)]).sum()
        steps.append(member.steps(rows[read], step, y_BE, variance))
    together(steps, [member.spec.ends.writes for member in team], {hook: rows[hook].shape[1] for hook in variances})
    diverged = torch.stack(
        [member.diverged_at for member in team]
    ).max()  # with one of them all of what is written is lost
    for member in team:
        member.diverged_at = torch.where(member.diverged_at < 0, diverged, member.diverged_at)


def _joined(vectors: list[Tensor]) -> Tensor:
    """Those of several hooks one behind the other; those of one as they are."""
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors, dim=-1)


@contextlib.contextmanager
def _products(dtype: str) -> Iterator[None]:
    """Products on a GPU may be in TF32 for a while, and keep memory from step to step; what comes after is as before."""
    matmul: Any = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, dtype != "float32"
    try:
        yield
    finally:
        matmul.allow_tf32 = before
        forget_scratch()


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


def _clear_away(run: Run, checkpoint: Checkpoint) -> None:
    """What a run leaves that was killed as it was about to end."""
    if run.window and checkpoint.exists:
        with locked(run.store.folder, other="--store"):
            delete_windows(run.store.folder)
    checkpoint.remove()
    log.info("%s: all %d SAEs are trained already", run.folder, len(run.identity))


def _stopped(steps: int, config: TrainConfig, end: Exception | None = None) -> None:
    """Ends a run of which a checkpoint was just saved: by the user's wish, or the error for which no rows came."""
    if isinstance(end, ValueError):
        raise end
    log.warning("stopped after step %d of %d; the same command continues", steps, config.n_steps)


def _save(run: Run, member: Member, sae: SAE, inputs: Inputs, seconds: float, epochs: float) -> None:
    """The SAE as its own, of inputs as the model has them."""
    folder = run.folder / member.spec.name
    facts = run.facts(member, seconds, epochs)
    scales = [_scale(run, inputs, hooks) for hooks in member.spec.ends]
    fold(sae.cpu(), *scales)
    with full_disk_is_a_value_error(f"{folder} (its checkpoint is safe)"):
        save_sae(sae, folder, facts)


def _scale(run: Run, inputs: Inputs, hooks: tuple[str, ...]) -> float | Tensor:
    """What vectors of these hooks are multiplied by: a number, or one for each of their coordinates."""
    if len(hooks) == 1:
        return inputs[hooks[0]][0]
    return torch.tensor([inputs[hook][0] for hook in hooks]).repeat_interleave(torch.tensor(run.widths(hooks)))


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


def _log(
    members: list[Member], logs: dict[str, MetricsLog], bar: Any, step: int, batch: int, clock: Clock
) -> list[Member]:
    """A line per SAE, and a warning for one that has just diverged; returns the others, which go on."""
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
        if member.spec.name in logs:
            logs[member.spec.name].write(**common, **line)
        bar.set_postfix_str(f"{member.spec.name}: L0 {line['l0']:.1f}, FVU {line['fvu']:.3f}", refresh=False)
    return [member for member in members if member.diverged is None]

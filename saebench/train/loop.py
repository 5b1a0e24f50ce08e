"""The training loop: a grid of SAEs off one shuffled stream of activations."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from saebench.files import locked
from saebench.harvest.ranks import World, joined
from saebench.harvest.window import delete_windows
from saebench.models import choose_device
from saebench.runlog import Interrupt, MetricsLog, interruptible, progress
from saebench.sae import SAE, fold, save_sae
from saebench.sae.sparse import forget_scratch
from saebench.store import Cursor, Store
from saebench.store.pair import open_pair
from saebench.train.checkpoint import Checkpoint, full_disk_is_a_value_error
from saebench.train.clock import Clock
from saebench.train.identity import Run
from saebench.train.member import LOOK_EVERY, Member
from saebench.train.memory import check_memory
from saebench.train.ranks import PATIENCE, Ranks, Wish, check_alike, told
from saebench.train.rolling import Rolling, Stopped, Whole, rows_offered, source_of
from saebench.train.settings import TrainConfig
from saebench.train.spec import Spec
from saebench.train.teams import Inputs, member_of, scale_of, team_step, teams_of

log = logging.getLogger(__name__)

LOG_EVERY = LOOK_EVERY


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
        run = world.agreed(lambda: Run.of(config, store, world.size))
        ranks = world.agreed(lambda: Ranks(world, config, run.specs, run.partitions))
        made = {"device": model_device, "trust_remote_code": trust_remote_code}
        return _train(run, ranks, device, made)


def _train(run: Run, ranks: Ranks, device: str, made: dict[str, Any]) -> list[Path] | None:
    """`train`, of a run whose folder is held; `made` is how a harvester's model runs."""
    config, world = run.config, ranks.world
    check_alike(world, run.identity)
    checkpoint = Checkpoint(run.folder, run.identity, world, ranks.share)
    todo = world.agreed(run.to_do)
    if not todo:
        world.agreed(lambda: _clear_away(run, checkpoint) if world.leads else None)
        return run.folders
    mine = [spec for spec in todo if spec.team in ranks.own]
    world.agreed(lambda: _check_memory(run, mine, ranks, device))
    if world.leads:
        run.say_how_well_it_shuffles()
    course = _Course(run, ranks, checkpoint, mine, device)
    total, done = config.n_steps * config.batch, course.first * config.batch
    shown = f"train {len(course.active)} SAEs" + f", of {len(todo)} with those of other processes" * (mine != todo)
    with interruptible() as interrupt, progress(total, shown, "row", done, shown=world.leads) as bar:
        starts = course.cursors.values()
        with source_of(run.store, run.window, total, starts, lambda: interrupt.requested, **made) as source:
            # Held here until the source has ended: what is read ahead may wait for a window that is not to come.
            batches = course.batches(source, device)
            if not course.run_to_end(batches, source, interrupt, bar):
                return None
            bar.close()
            course.save_saes()
            source.delete()
            world.agreed(lambda: _refuse_diverged(course.members, checkpoint))
            if world.leads:
                checkpoint.remove()
    return run.folders


Batches = list[Iterator[tuple[dict[str, Tensor], dict[str, Cursor]]]]
"""Of each stream the rows of its hooks, with the cursors after them."""


class _Course:
    """What this process trains of a run, from the first step, or that of the checkpoint, to the last."""

    def __init__(self, run: Run, ranks: Ranks, checkpoint: Checkpoint, specs: list[Spec], device: str) -> None:
        self.run, self.ranks, self.checkpoint = run, ranks, checkpoint
        world = ranks.world
        hooks = dict.fromkeys(hook for spec in specs for hook in spec.ends.hooks)
        leads = ranks.share.world.leads  # what the others of its circle need is read once
        found: Inputs = world.agreed(lambda: {hook: run.inputs(hook) for hook in hooks} if leads else {})
        self.inputs: Inputs = ranks.share.world.gather(found)[0]
        self.own = ranks.share.partitions(run.partitions)
        self.members = [member_of(run, spec, self.inputs, device, ranks.share) for spec in specs]
        self.first, cursors, seconds = world.agreed(lambda: checkpoint.restore(self.members))
        self.cursors = cursors
        """where the next batch of each hook begins, by `Run.place`"""
        spoken = specs if ranks.share.world.leads else []
        self.logs = {spec.name: MetricsLog(run.folder / spec.name / "metrics.jsonl", self.first) for spec in spoken}
        self.active = [member for member in self.members if member.diverged is None]
        self.clock = Clock(seconds, self.first * run.config.batch)

    def run_to_end(self, batches: Batches, source: Whole | Rolling, interrupt: Interrupt, bar: Any) -> bool:
        """Take the steps that are left. Returns whether they were: the user may stop it before that, with a checkpoint."""
        config, ranks, clock = self.run.config, self.ranks, self.clock
        teams = teams_of(self.active)
        for step in range(self.first, config.n_steps):
            # All hooks' before the first SAE takes a step: what cannot be had leaves all of them where they are.
            drawn, failure = [], None
            try:
                drawn = [next(rows) for rows in batches]
            except (Stopped, ValueError) as end:
                if ranks.world.size == 1:
                    self._save(step)
                    return _stopped(step, config, end)
                failure = end
            wish = ranks.agree(step, Wish(clock.save_is_due, interrupt.requested, not self.active), failure)
            if wish.idle:
                self._save(step)
                break
            self.cursors |= {place: cursor for _, cursors in drawn for place, cursor in cursors.items()}
            rows = {hook: self._input(hook, vectors) for rows, _ in drawn for hook, vectors in rows.items()}
            for team in teams:
                team_step(team, rows, step)
            bar.update(config.batch)
            last = step + 1 == config.n_steps
            if (step + 1) % LOG_EVERY == 0 or last:
                self._log(bar, step)
                teams = teams_of(self.active)
            if last or wish.save or wish.stop or source.left(self.cursors.values()):
                with clock.saving():
                    self._save(step + 1)
                source.release(self.cursors.values())
            if wish.stop and not last:
                return _stopped(step + 1, config)
        return True

    def save_saes(self) -> None:
        """Each as its own, of inputs as the model has them."""
        run, share = self.run, self.ranks.share
        epochs = self.run.config.n_steps * run.config.batch / rows_offered(run.store, run.window, self.cursors.values())
        whole = [(member, share.whole(member.sae)) for member in self.active]
        if share.world.leads:
            _warn_of_missed_targets(self.active)
        else:
            whole = []
        seconds = self.clock.total / max(len(self.members), 1)
        self.ranks.world.agreed(
            lambda: [_save(run, member, sae, self.inputs, seconds, epochs) for member, sae in whole]
        )

    def batches(self, source: Whole | Rolling, device: str) -> Batches:
        """Of each stream of which something is trained here."""
        streams = [stream for stream in self.run.streams if stream[0] in self.inputs]
        starts, own = self.cursors, self.own
        mine = {self.run.place(hook, n) for hook in self.inputs for n in own}
        self.cursors = {place: cursor for place, cursor in starts.items() if place in mine}
        return [source.served(self.run.batches(stream, own, starts, source.shards, device)) for stream in streams]

    def _input(self, hook: str, vectors: Tensor) -> Tensor:
        if len(self.own) == self.run.partitions:
            vectors = self.ranks.share.rows_of(vectors)
        return vectors.float() * self.inputs[hook][0]

    def _save(self, step: int) -> None:
        self.checkpoint.save(self.members, step, self.cursors, self.clock.total)

    def _log(self, bar: Any, step: int) -> None:
        """A line per SAE, and a warning for one that has just diverged, which does not go on."""
        rows = (step + 1) * self.run.config.batch
        common = {"step": step + 1, "tokens": rows, "seconds": self.clock.total, "tokens_per_s": self.clock.rate(rows)}
        for member in self.active:
            if member.diverged is not None:
                log.warning(
                    "the loss of %s is no longer finite at step %d; the others go on",
                    member.spec.name, member.diverged + 1,
                )  # fmt: skip
                continue
            line = member.log_line(step)
            if member.spec.name in self.logs:
                self.logs[member.spec.name].write(**common, **line)
            bar.set_postfix_str(f"{member.spec.name}: L0 {line['l0']:.1f}, FVU {line['fvu']:.3f}", refresh=False)
        self.active = [member for member in self.active if member.diverged is None]


def _opened(config: TrainConfig, world: World) -> Store:
    if world.size > 1 and config.rolling is not None:
        raise ValueError(
            f"rolling is {config.rolling} in {world.size} processes; expected one: windows are deleted behind it. "
            "Harvest the store first, which torchrun does in several"
        )
    return open_pair(config.store, config.beside)


def _check_memory(run: Run, specs: list[Spec], ranks: Ranks, device: str) -> None:
    widths = [sum(run.widths(spec.ends.reads + spec.ends.writes)) // 2 for spec in specs]
    parts = [replace(spec, d_sae=spec.d_sae // ranks.share.n_latents(1)) for spec in specs]
    if specs:
        batch = run.config.batch // ranks.share.n_rows(1)
        buffers = run.buffer_bytes * len(ranks.share.partitions(run.partitions)) // run.partitions
        check_memory(parts, widths, batch, device, buffers, ranks.world.neighbours)


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


def _clear_away(run: Run, checkpoint: Checkpoint) -> None:
    """What a run leaves that was killed as it was about to end."""
    if run.window and checkpoint.exists:
        with locked(run.store.folder, other="--store"):
            delete_windows(run.store.folder)
    checkpoint.remove()
    log.info("%s: all %d SAEs are trained already", run.folder, len(run.identity))


def _stopped(steps: int, config: TrainConfig, end: Exception | None = None) -> Literal[False]:
    """Ends a run of which a checkpoint was just saved: by the user's wish, or the error for which no rows came."""
    if isinstance(end, ValueError):
        raise end
    log.warning("stopped after step %d of %d; the same command continues", steps, config.n_steps)
    return False


def _save(run: Run, member: Member, sae: SAE, inputs: Inputs, seconds: float, epochs: float) -> None:
    """The SAE as its own, of inputs as the model has them."""
    folder = run.folder / member.spec.name
    facts = run.facts(member, seconds, epochs)
    scales = [scale_of(run, inputs, hooks) for hooks in member.spec.ends]
    fold(sae.cpu(), *scales)
    with full_disk_is_a_value_error(f"{folder} (its checkpoint is safe)"):
        save_sae(sae, folder, facts)


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

"""Build a feature index: one pass over a store, in units that may come in any order."""

import itertools
import logging
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import torch

from saebench.evaluate import look_at_others
from saebench.files import writing
from saebench.index.decoder import geometry, logit_effects, to_stream
from saebench.index.evidence import (
    Evidence,
    Sample,
    Summary,
    Unit,
    passages,
    sample,
    summarise,
)
from saebench.index.memory import give_back
from saebench.index.plan import IndexConfig, Piece, Plan, plan_of
from saebench.index.publish import Gathered, Groups, Publisher, left_before, nothing_yet, rows_done
from saebench.index.schema import identity_of
from saebench.models import Unembedding, unembedding
from saebench.pieces import TokenBytes
from saebench.runlog import Interrupt, interruptible, progress
from saebench.sae import encode_sparse
from saebench.store.schema import MASSIVE
from saebench.store.source import model_of

log = logging.getLogger(__name__)
_ON_A_GPU = 2  # workers, each with memory of its own there


def build_index(config: IndexConfig, *, looked: bool = False) -> Path | None:
    """Index an SAE; returns the file, or None when Ctrl-C ended it early. One of others is looked at first, unless it was already.

    The same call continues a build that was interrupted or killed; the result is the same, whatever
    the number of workers. Until it is complete the file holds what is known so far.
    Raises ValueError when SAE, store and hooks do not belong together.
    """
    path = config.path
    with writing(path):
        plan = plan_of(config)
        identity = identity_of(config.sae, plan.store)
        settings = {"tokens": config.tokens, "sample": config.sample, "logits": config.logits, "rules": config.rules}
        labellers = config.labellers() if config.rules else []
        if labellers:
            settings["labellers"] = [f"{labeller.name} {labeller.version}" for labeller in labellers]
        if any(plan.store.norms(hook).massive for hook in plan.ends.reads):
            settings["massive"] = MASSIVE  # where there are none, an index of before they were left out is the same
        before = left_before(path, {"identity": identity, "settings": settings})
        if before == "complete":
            log.info("%s is complete already", path)
            return path
        if before is None and not looked:
            look_at_others(config.sae, plan.store, config.device, config.hook)
        gathered, static = before or (nothing_yet(plan), _static(config, plan))
        publish = Publisher(config, plan, static, identity, settings)
        total = sum(piece.n_rows for piece in plan.pieces)
        bar = progress(total, f"index {config.sae.name}", "row", rows_done(plan, gathered))
        with interruptible() as interrupt, bar:
            for number, summary, part in _results(plan, gathered, config.workers, interrupt):
                if summary is not None:
                    gathered.evidence.add(summary)
                gathered.samples[plan.pieces[number].shard.split].append(part)
                gathered.done[number] = True
                bar.update(plan.pieces[number].n_rows)
                publish.sometimes(gathered)
        publish(gathered)
        if not gathered.done.all():
            log.warning("stopped after %d of %d rows; the same command continues", rows_done(plan, gathered), total)
            return None
    return path


def _results(
    plan: Plan, gathered: Gathered, workers: int | None, interrupt: Interrupt
) -> Iterator[tuple[int, Summary | None, Sample]]:
    """The pieces not yet done, in the order in which they are finished; a few are under way at once."""
    n_workers = workers or (_ON_A_GPU if plan.sae.W_enc.is_cuda else torch.get_num_threads())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each worker computes alone, so that rounding does not depend on their number
    todo = iter([number for number, finished in enumerate(gathered.done) if not finished])
    with ThreadPoolExecutor(n_workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        running: dict[Future, int] = {}
        try:
            while True:
                wanted = 2 * n_workers - len(running) if not interrupt.requested else 0
                running |= {
                    pool.submit(_reduce, plan, plan.pieces[n], gathered.evidence): n
                    for n in itertools.islice(todo, wanted)
                }
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), *future.result()
        finally:
            for future in running:
                future.cancel()
            torch.set_num_threads(threads)


def _reduce(plan: Plan, piece: Piece, so_far: Evidence) -> tuple[Summary | None, Sample]:
    unit = _read(plan, piece)
    summary = summarise(unit, plan.scale, so_far) if piece.shard.split == "train" else None
    return summary, sample(unit, plan.below[piece.shard.split])


def _read(plan: Plan, piece: Piece) -> Unit:
    stop = piece.start + piece.n_rows
    keep, positions, tokens, docs = (
        piece.shard.column(name, piece.start, stop) for name in ("keep", "position", "tokens", "doc_id")
    )
    texts = passages(tokens, positions, docs, keep)
    kept = np.flatnonzero(keep)
    read = [
        piece.shard.rows(hook, piece.start, stop)[torch.from_numpy(kept)].to(plan.sae.W_dec.device, torch.float32)
        for hook in plan.ends.reads
    ]
    usual = torch.stack([x.norm(dim=1) <= bound for x, bound in zip(read, plan.bounds, strict=True)]).all(0)
    x_RD = torch.cat(read, 1)
    code, values = encode_sparse(plan.sae, x_RD[usual])
    massive = code.latents[:0] if bool(usual.all()) else encode_sparse(plan.sae, x_RD[~usual])[0].latents
    usual = usual.cpu().numpy()
    keep = keep.copy()
    keep[kept[~usual]] = False
    return Unit(
        piece.first_row, piece.n_rows, plan.store.context, kept[usual][code.rows.cpu().numpy()],
        code.latents.cpu().numpy().astype(np.min_scalar_type(plan.sae.d_sae - 1)), values.cpu().numpy(), keep, positions,
        texts, massive.cpu().numpy(),
    )  # fmt: skip


def _static(config: IndexConfig, plan: Plan) -> Groups:
    """What does not depend on the store's rows."""
    groups: Groups = {"decoder": geometry(plan.sae)}
    written = to_stream(plan.sae, plan.ends.writes) if config.logits else None
    if written is None and config.logits:
        log.info(
            "what attention or an MLP reads has no direct effect on the logits: %s is indexed without", config.sae.name
        )
    elif written is not None:
        known = TokenBytes(plan.store.tokenizer()).known
        groups["logits"] = logit_effects(written, _unembedding(plan), known)
        give_back()
    return groups


def _unembedding(plan: Plan) -> Unembedding:
    """The store's own, or the model's where the store is of before it was kept."""
    device = plan.sae.W_dec.device
    if plan.store.has_unembedding:
        W_U, gamma, centred, scale = plan.store.unembedding()
        return Unembedding(W_U.to(device, torch.float32), gamma.to(device), centred, scale)
    return unembedding(model_of(plan.store, str(device), "float32"))

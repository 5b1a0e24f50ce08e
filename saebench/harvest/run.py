"""The harvest itself: a model over planned shards, by one process or several."""

import contextlib
import dataclasses
import logging
import math
import shutil
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from saebench.files import locked
from saebench.harvest.pipeline import BackgroundWriter
from saebench.harvest.plan import Plan, plans
from saebench.harvest.ranks import World, joined
from saebench.harvest.settings import HarvestConfig, bytes_per_row, identity_of, settled, text_of
from saebench.models import LanguageModel, capturer, check_hook, head, last_states, load_model, unembedding, widths_of
from saebench.models.randomised import randomised
from saebench.runlog import interruptible, progress
from saebench.store import Store, StoreWriter, open_store
from saebench.store.feed import prefetched, sent
from saebench.text import SPLITS, Context, TextConfig, fingerprint, pinned

log = logging.getLogger(__name__)

_TASTE, _TASTED = 4, 256  # contexts and positions on which a model is asked what it makes of the text


def harvest(config: HarvestConfig, text: TextConfig, spare: int = 0) -> Store | None:
    """Make, continue or reopen the store in `config.out`; None when Ctrl-C ended it early.

    The store of a rolling training needs a disk with room for `spare` rows more, those of the windows behind it.
    Under torchrun the processes share the work, and each comes back with the store. Raises ValueError for a
    model, hook or data set that does not exist, for a data set with nothing in one of the splits, for a disk
    too small, and for a store made with other settings.
    """
    text, begun = text_of(config, text)
    source = fingerprint(text, begun)
    other = "--store" if spare else "--out"
    with joined() as world, contextlib.ExitStack() as held:
        world.agreed(lambda: held.enter_context(locked(config.out, other=other)) if world.leads else None)
        if (seed := config.random_weights) is not None:
            drawn = world.agreed(lambda: _random_model(config, seed) if world.leads else None) or _beside(config)
            config = dataclasses.replace(config, model=str(drawn), model_revision=None, random_weights=None)
        model = world.agreed(lambda: open_model(config, world.device(config.device)))
        told = settled(config, model)
        identity = identity_of(told, text, model, source)

        def open_writer() -> StoreWriter:
            widths = widths_of(model, config.hooks)
            return StoreWriter(config.out, identity, widths, told.stored_as, leads=world.leads)

        # The others open the store as the leader has left it.
        leading = world.agreed(lambda: open_writer() if world.leads else None)
        following = world.agreed(lambda: None if world.leads else open_writer())
        writer = leading or following
        assert writer
        if writer.manifest["complete"]:
            log.info("%s is complete already", config.out)
            return open_store(config.out)
        return fill(told, pinned(text, source), model, writer, world, spare)


def _beside(config: HarvestConfig) -> Path:
    """Where a model of random weights lies."""
    return config.out.with_name(f"{config.out.name}-model")


def _random_model(config: HarvestConfig, seed: int) -> Path:
    return randomised(
        config.model, seed, _beside(config), revision=config.model_revision, trust_remote_code=config.trust_remote_code
    )


def open_model(config: HarvestConfig, device: str | None) -> LanguageModel:
    """The model. Raises ValueError where it cannot give what is asked for."""
    model = load_model(
        config.model,
        device=device,
        dtype=config.model_dtype,
        revision=config.model_revision,
        trust_remote_code=config.trust_remote_code,
    )
    for hook in config.hooks:
        check_hook(model, hook)
    if config.context > model.max_context:
        raise ValueError(f"context is {config.context}, model {model.id!r} takes at most {model.max_context} tokens")
    bos = model.encoder.bos
    if bos is not None and bos >= model.n_vocab:
        raise ValueError(
            f"the tokenizer of model {model.id!r} opens contexts with token {bos}, beyond the model's "
            f"{model.n_vocab} embeddings: set a bos_token that the model knows and save the tokenizer again"
        )
    return model


def fill(
    config: HarvestConfig, text: TextConfig, model: LanguageModel, writer: StoreWriter, world: World, spare: int = 0
) -> Store | None:
    """Write the shards that a store still lacks, and complete it; None when Ctrl-C ended that early."""
    expected = _expected_rows(config, text.validation_fraction)
    done = sum(entry["rows"] for entry in writer.shards)

    def prepare() -> frozenset[int]:
        if world.leads:
            _check_disk(config, model, expected - done, spare)
            writer.add_tokenizer(model.tokenizer_files)
            _add_unembedding(writer, model)
        return writer.present

    present = world.agreed(prepare)  # and no process writes before all have looked
    share, before, name = expected // world.size, done // world.size, f"harvest {config.out.name}"
    with interruptible() as interrupt, progress(share, name, initial=before, shown=world.leads) as bar:

        def written(rows: int) -> None:
            bar.update(rows)
            if world.leads:
                shown = bar.format_dict
                rate = (bar.n - shown["initial"]) / max(shown["elapsed"], 1e-9)
                bar.set_postfix_str(f"{rate * _bytes_per_row(config, model) / 1e6:.1f} MB/s", refresh=False)

        def planned() -> Generator[Plan, None, None]:
            for plan in prefetched(plans(config, text, model.encoder, writer.shards)):
                if plan.number == 0:
                    _warn_of_nonsense(model, plan.contexts[:_TASTE])
                if plan.number % world.size == world.rank and plan.number not in present:
                    yield plan

        with contextlib.closing(planned()) as ahead:  # also of an error, whose text need not be packed to its end
            stall = run_model(config, model, writer, ahead, written, lambda: interrupt.requested)
    log.info("the model waited %.1f s for the disk", stall)
    stopped = any(world.gather(interrupt.requested))
    if stopped:
        log.warning("stopped after a whole shard; the same command continues")
        return None
    world.agreed(lambda: _finish(config, text, writer) if world.leads else None)
    return open_store(config.out)


def run_model(
    config: HarvestConfig,
    model: LanguageModel,
    writer: StoreWriter,
    planned: Iterable[Plan],
    written: Callable[[int], None] = lambda rows: None,
    stopped: Callable[[], bool] = lambda: False,
) -> float:
    """Harvest the shards planned, or as many as begin before `stopped`; returns the seconds that the model waited for the disk.

    `written` is told of every batch's rows as they are written, in another thread.
    """
    forward = capturer(model, config.hooks)
    with BackgroundWriter(writer, config.per_pass, model.device, written) as background:
        for plan in planned:
            background.begin(plan)
            for start in range(0, len(plan.contexts), config.per_pass):
                batch = plan.contexts[start : start + config.per_pass]
                _check_vocabulary(batch, model)
                tokens, keep = (
                    torch.from_numpy(np.stack([getattr(c, name) for c in batch])) for name in ("tokens", "keep")
                )
                landing = background.landing()
                landing.begin(sent(keep.flatten(), model.device))
                forward(sent(tokens.long(), model.device), landing.take)
                background.put(landing)
            if stopped():
                break
    return background.stall


def _expected_rows(config: HarvestConfig, fraction: float) -> int:
    """Training rows asked for, and the held-out rows that come with them."""
    return int(config.tokens + min(config.validation_tokens, config.tokens * fraction / (1 - fraction)))


def _bytes_per_row(config: HarvestConfig, model: LanguageModel) -> int:
    return bytes_per_row(widths_of(model, config.hooks).values(), config.stored_as)


def _check_disk(config: HarvestConfig, model: LanguageModel, rows: int, spare: int) -> None:
    rows += spare
    need, free = rows * _bytes_per_row(config, model) / 1e6, shutil.disk_usage(config.out).free / 1e6
    log.info("%s needs about %s MB more on disk; %s MB are free", config.out, f"{need:,.0f}", f"{free:,.0f}")
    if need > free:
        raise ValueError(
            f"{config.out} needs about {need:,.1f} MB for {rows:,} rows and the disk has {free:,.1f} MB free: "
            f"ask for {'a smaller --rolling' if spare else 'fewer --tokens'} or fewer --layers, use a smaller --dtype, or choose "
            f"another {'--store' if spare else '--out'}"
        )


def _add_unembedding(writer: StoreWriter, model: LanguageModel) -> None:
    """Once: what a manifest already vouches for stays, also where another device would round it otherwise."""
    if writer.has_unembedding:
        return
    try:
        found = unembedding(model)
    except ValueError as error:  # only the index needs it
        log.info("%s", error)
        return
    writer.add_unembedding(found.W_U, found.gamma, centred=found.centred, scale=found.scale)


@torch.inference_mode()
def _warn_of_nonsense(model: LanguageModel, contexts: Sequence[Context]) -> None:
    """Say so where the model predicts the text worse than by a guess among all tokens: it is then not what it was trained on."""
    _check_vocabulary(contexts, model)
    tokens, keep = (torch.from_numpy(np.stack([getattr(c, name) for c in contexts])) for name in ("tokens", "keep"))
    tokens = tokens.long().to(model.device)
    wanted = (keep[:, :-1] & keep[:, 1:]).to(model.device)
    states, following = last_states(model, tokens)[:, :-1][wanted], tokens[:, 1:][wanted]
    if not len(following):
        return
    some = torch.linspace(0, len(following) - 1, min(_TASTED, len(following)), device=model.device).long()
    log_p = head(model, states[some]).float().log_softmax(-1)
    loss = float(-log_p.gather(1, following[some, None]).mean())
    if loss > math.log(model.n_vocab):
        log.warning(
            "%s predicts this text worse than a guess among its %d tokens (%.2f against %.2f nats): is the tokenizer its own, "
            "and the text what it was made for?", model.id, model.n_vocab, loss, math.log(model.n_vocab),
        )  # fmt: skip


def _check_vocabulary(contexts: Sequence[Context], model: LanguageModel) -> None:
    for context in contexts:
        if (beyond := np.flatnonzero((context.tokens < 0) | (context.tokens >= model.n_vocab))).size:
            name, token = context.documents[int(context.doc_id[beyond[0]])], int(context.tokens[beyond[0]])
            said = None if model.tokenizer is None else model.tokenizer.convert_ids_to_tokens(token)
            raise ValueError(
                f"document {name} has token {token}{'' if said is None else f' ({said!r})'}, model {model.id!r} knows 0 to {model.n_vocab - 1}: "
                + (
                    "the data set was tokenized for another model"
                    if said is None
                    else "it was added to the tokenizer, and not to the model. Leave it out of the text, or resize the model's embedding"
                )
            )


def _finish(config: HarvestConfig, text: TextConfig, writer: StoreWriter) -> None:
    writer.adopt()  # the last shards of the other processes, which ended after this one's
    rows = {split: sum(entry["rows"] for entry in writer.shards if entry["split"] == split) for split in SPLITS}
    if missing := [split for split in SPLITS if not rows[split]]:
        raise ValueError(
            f"dataset {text.dataset!r} is too small: it ended before a document fell into the {missing[0]} split "
            f"(validation_fraction {text.validation_fraction}); give more documents, or another --validation-fraction, and delete {config.out}"
        )
    if rows["train"] < config.tokens:
        log.warning(
            "the data set ended after %s training tokens of the %s asked for",
            f"{rows['train']:,}",
            f"{config.tokens:,}",
        )
    writer.complete({"rows": rows, "exhausted": rows["train"] < config.tokens})
    log.info("%s: %s training and %s held-out rows", config.out, f"{rows['train']:,}", f"{rows['validation']:,}")

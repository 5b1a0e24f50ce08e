"""Which contexts go into which shard: decided by the text alone, so that every process comes to the same."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from saebench.harvest.settings import HarvestConfig
from saebench.text import SPLITS, Context, Encoder, Split, TextConfig, open_documents, pack


class Plan(NamedTuple):
    """A shard to come: its number, contexts of one split, and where that split's text goes on."""

    number: int
    split: Split
    contexts: list[Context]
    cursor: tuple[int, int]


def plans(
    config: HarvestConfig, text: TextConfig, encoder: Encoder, shards: Sequence[dict[str, Any]]
) -> Iterator[Plan]:
    """The shards that follow `shards`, entries of a manifest."""
    cursors: dict[Split, tuple[int, int]] = dict.fromkeys(SPLITS, (0, 0))
    done: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    for entry in shards:
        cursors[entry["split"]] = tuple(entry["cursor"])
        done[entry["split"]] += entry["rows"] // config.context
    limits: dict[Split, int] = {
        "train": -(-config.tokens // config.context),
        "validation": -(-config.validation_tokens // config.context),
    }
    # A split that has its fill needs no more text, so the place to go on from is the others'.
    start = min((cursors[split][0] for split in SPLITS if done[split] < limits[split]), default=cursors["train"][0])
    documents = open_documents(text, start)
    contexts = pack(documents, encoder, config.context, text.validation_fraction, cursors)
    return deal(contexts, config.per_shard, limits, done, cursors["train"], len(shards))


def deal(
    contexts: Iterator[Context],
    per_shard: int,
    limits: dict[Split, int],
    done: dict[Split, int],
    train_cursor: tuple[int, int],
    first: int = 0,
) -> Iterator[Plan]:
    """Deal contexts into shards, numbered from `first` on, until the training split has its fill or the text ends.

    `done` contexts of each split are in earlier shards, the last training one of which ended at
    `train_cursor`. Held-out contexts are taken up to their limit from the same stretch of text, or
    beyond it from the first held-out document where the stretch has none.
    """
    count, numbers = dict(done), itertools.count(first)
    pending: dict[Split, list[Context]] = {split: [] for split in SPLITS}
    for context in contexts:
        full = count["train"] >= limits["train"]
        if full and count["validation"] and context.cursor[0] >= train_cursor[0]:
            break  # the text beyond the last training context belongs to nobody
        if count[context.split] >= limits[context.split]:
            continue
        pending[context.split].append(context)
        count[context.split] += 1
        if context.split == "train":
            train_cursor = context.cursor
        if len(pending[context.split]) == per_shard or count[context.split] == limits[context.split]:
            yield Plan(next(numbers), context.split, pending[context.split], context.cursor)
            pending[context.split] = []
    for split in SPLITS:
        if pending[split]:
            yield Plan(next(numbers), split, pending[split], pending[split][-1].cursor)

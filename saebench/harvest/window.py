"""Windows: stores of their own that follow a head's training text, made in turn by a process that keeps the model.

A window is a function of the head, of how many shards it has, and of its number. What lies on disk of it may
therefore be deleted at any time: made again, it has the same bytes. After the text's last context comes its first.

    python -m saebench.harvest.window HEAD SHARDS [--device cuda:1] [--trust-remote-code] [--answers FILE_NUMBER]

reads numbers of windows from its input, a line each, and answers each with a line of JSON once that window is
whole, or with an error. It ends at once when its input does, as it does when the other process has died.
"""

import argparse
import json
import logging
import os
import queue
import shutil
import sys
import threading
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from saebench.harvest.extend import ExtendConfig, open_as_made, settings_of
from saebench.harvest.plan import Plan
from saebench.harvest.run import run_model
from saebench.harvest.settings import HarvestConfig
from saebench.models import widths_of
from saebench.store import Store, StoreWriter, open_store
from saebench.store.manifest import read_manifest
from saebench.store.schema import MANIFEST
from saebench.text import SPLITS, Context, Encoder, TextConfig, open_documents, pack, pinned, split_of

ROLLING = "rolling"  # the folder of the windows, in that of their head


class Place(NamedTuple):
    """Where in the text the next training context begins, and what came before it."""

    cursor: tuple[int, int]
    fresh: int
    """kept training rows so far, of the text's first pass: each was there once"""
    passes: int
    """times that the text had ended"""


def folder_of(head: Path, number: int) -> Path:
    return head / ROLLING / f"{number:08d}"


def identity_of_window(head: Store, number: int, shards: int) -> dict[str, Any]:
    """Everything that decides the contents of a window, counted from 1."""
    made = head.manifest["identity"]
    rows = shards * made["shard_contexts"] * made["context"]
    window = {"head": head.hash, "number": number, "shards": shards}
    return made | {"tokens": rows, "validation_tokens": 0, "window": window}


def window_manifest(head: Store, number: int, shards: int) -> dict[str, Any] | None:
    """That of a window on disk, whole or not; None where there is none, or another's."""
    folder = folder_of(head.folder, number)
    try:
        manifest = read_manifest(folder)
    except ValueError:  # what cannot be read is made again
        return None
    return manifest if manifest["identity"] == identity_of_window(head, number, shards) else None


def delete(folder: Path) -> None:
    """Delete a window, all of it or none that could be read."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def delete_windows(head: Path) -> None:
    """Leave a head, which this process holds, as the ordinary store that it was."""
    for folder in (head / ROLLING).glob("[0-9]*"):
        delete(folder)
    shutil.rmtree(head / ROLLING, ignore_errors=True)


def contexts_behind(
    config: HarvestConfig, text: TextConfig, encoder: Encoder, place: Place
) -> Iterator[tuple[Context, Place]]:
    """Training contexts from a place on, without end, each with the place after it."""
    (_, fresh, passes), start = place, place.cursor
    while True:
        documents = open_documents(text, start[0])
        mine = (d for d in documents if split_of(d.key, text.validation_fraction) == "train")
        cursors = dict.fromkeys(SPLITS, start)
        context = None
        for context in pack(mine, encoder, config.context, text.validation_fraction, cursors):
            fresh += 0 if passes else int(context.keep.sum())
            yield context, Place(context.cursor, fresh, passes)
        if context is None and start == (0, 0):
            raise ValueError(f"dataset {text.dataset!r} has no training text any more: restore it")
        start, passes = (0, 0), passes + 1


class Windows:
    """Makes windows of `shards` shards behind a finished store, in whatever order they are asked for.

    Raises ValueError where model, tokenizer or text are no longer those of the head.
    """

    def __init__(self, head: Store, shards: int, device: str | None = None, trust_remote_code: bool = False) -> None:
        self.head = head
        self.shards = shards
        made = head.manifest["identity"]
        further = ExtendConfig(tokens=1, device=device, trust_remote_code=trust_remote_code)
        self.config, text = settings_of(head.folder, made, further)
        self.model = open_as_made(head.folder, made | {"tokens": self.config.tokens}, self.config, text)
        self.text = pinned(text, made["text"]["fingerprint"])
        self.next = 0
        """the window that `contexts` stands before; 0 for none"""
        self.place = Place((0, 0), 0, 0)
        self.contexts: Iterator[tuple[Context, Place]] = iter(())

    def make(self, number: int) -> Place:
        """Make or continue a window; returns the place after it."""
        self._seek(number)
        self.next = 0
        widths = widths_of(self.model, self.config.hooks)
        identity = identity_of_window(self.head, number, self.shards)
        writer = StoreWriter(folder_of(self.head.folder, number), identity, widths, self.config.stored_as)
        writer.add_tokenizer(self.model.tokenizer_files)
        present = writer.present | frozenset(range(len(writer.shards)))
        # The text of shards that are there already is read again: it decides where the next ones begin.
        planned = (plan for plan in self._plans() if plan.number not in present)
        run_model(self.config, self.model, writer, planned)
        rows = {"train": sum(entry["rows"] for entry in writer.shards), "validation": 0}
        writer.complete({"rows": rows, "exhausted": False, "after": self.place._asdict()})
        self.next = number + 1
        return self.place

    def _plans(self) -> Iterator[Plan]:
        for number in range(self.shards):
            contexts = list(self._take(self.config.per_shard))
            yield Plan(number, "train", contexts, self.place.cursor)

    def _seek(self, number: int) -> None:
        """Stand before a window: behind the one before, or the nearest on disk with the text after it read again."""
        if self.next == number:
            return
        before = next(n for n in range(number - 1, -1, -1) if n == 0 or self._whole(n))
        if before:
            found = read_manifest(folder_of(self.head.folder, before))["after"]
            self.place = Place(tuple(found["cursor"]), found["fresh"], found["passes"])
        else:
            last = [entry for entry in self.head.manifest["shards"] if entry["split"] == "train"][-1]
            self.place = Place(tuple(last["cursor"]), self.head.rows("train", kept=True), 0)
        self.contexts = contexts_behind(self.config, self.text, self.model.encoder, self.place)
        missing = (number - 1 - before) * self.shards * self.config.per_shard
        deque(self._take(missing), maxlen=0)

    def _take(self, n: int) -> Iterator[Context]:
        for context, place in islice(self.contexts, n):
            self.place = place
            yield context

    def _whole(self, number: int) -> bool:
        manifest = window_manifest(self.head, number, self.shards)
        return manifest is not None and manifest["complete"]


def main() -> None:
    """Serve the windows that the other process asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("head", type=Path)
    parser.add_argument("shards", type=int)
    parser.add_argument("--device")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--answers", type=int, default=1, help="open file to answer to, where it is not the output")
    args = parser.parse_args()
    answers = os.fdopen(args.answers, "w", buffering=1)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    asked: queue.SimpleQueue[int] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(asked,), daemon=True).start()
    try:
        windows = Windows(open_store(args.head), args.shards, args.device, args.trust_remote_code)
        while True:
            number = asked.get()
            place = windows.make(number)
            answers.write(json.dumps({"window": number, **place._asdict()}) + "\n")
    except (ValueError, OSError) as error:
        answers.write(json.dumps({"error": str(error)}) + "\n")
        sys.exit(2)


def _listen(asked: "queue.SimpleQueue[int]") -> None:
    for line in sys.stdin:
        asked.put(int(line))
    os._exit(0)  # whole shards are safe, and the one in progress is worth nothing now


if __name__ == "__main__":
    main()

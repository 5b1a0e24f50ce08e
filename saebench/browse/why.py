"""Why a latent fires here, or a token comes next: found in a thread of its own, so that how far it is can be seen, and it can be stopped."""

import logging
import threading
import time
from typing import Any, NamedTuple

import numpy as np

from saebench.files import first_line
from saebench.interactions import Interactions, Way, activation, corpus_counts, interactions, log_probability, mask_of
from saebench.interactions.run import other_way
from saebench.steer import Bench

log = logging.getLogger(__name__)


class Question(NamedTuple):
    """What is explained at the last of some tokens, and how: with `Bench.key`, all that the answer depends on."""

    tokens: tuple[int, ...]
    latent: int | None = None
    """whose activation it is"""
    token: int | None = None
    """or else whose log-probability to come next"""
    against: int | None = None
    """less this one's"""
    n: int = 10
    words: bool = False
    way: Way = "unattended"


class _Stopped(Exception):
    pass


class Explaining:
    """The answer to a question, begun at once: `result` once it is `done` without an `error`, unless it was `stopped`."""

    def __init__(self, bench: Bench, question: Question, lock: Any) -> None:
        """`lock` is held while the model runs, and let go between one batch of maskings and the next."""
        self.result: Interactions | None = None
        self.error: str | None = None
        self.share = 0.0
        """of the maskings that are done"""
        self._bench, self._question, self._lock = bench, question, lock
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return self._stop.is_set() or not self._thread.is_alive()

    @property
    def stopped(self) -> bool:
        return self._stop.is_set() and self.result is None and self.error is None

    def stop(self) -> None:
        """Nothing more is to be had of it. The maskings that are run just now are its last."""
        self._stop.set()

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it was done in time."""
        if not self.done:
            self._thread.join(seconds)
        return self.done

    def _run(self) -> None:
        try:
            with self._lock:
                self.result = self._answer()
        except _Stopped:
            pass
        except ValueError as error:
            self.error = str(error)
        except Exception as error:  # in a thread of its own nobody else would hear of it
            self.error = f"{type(error).__name__}: {first_line(error)}; try fewer units"
            log.exception("an explanation failed")

    def _answer(self) -> Interactions:
        bench, asked = self._bench, self._question
        if asked.latent is not None:
            scalar = activation(bench.sae, bench.ends, asked.latent)
        else:
            assert asked.token is not None
            scalar = log_probability(bench.model, asked.token, asked.against)
        counts = corpus_counts(bench) if asked.way == "mean" else None
        mask, other = (mask_of(bench.model, way, counts) for way in (asked.way, other_way(asked.way)))
        ids = np.array(asked.tokens, np.int64)
        return interactions(bench.model, ids, scalar, mask, other, n=asked.n, words=asked.words, step=self._step)

    def _step(self, done: int, total: int) -> None:
        self.share = done / total
        if self._stop.is_set():
            raise _Stopped
        self._lock.__exit__(None, None, None)
        time.sleep(0.001)  # or who waits would hardly ever be the next
        self._lock.__enter__()

"""A generation in a thread of its own: what there is so far can be seen, and it can be stopped."""

import logging
import threading
from typing import Any

import numpy as np

from saebench.files import first_line
from saebench.models import LanguageModel
from saebench.pieces import show_text
from saebench.steer.generate import Arms, Generation, Sampling, generate

log = logging.getLogger(__name__)


class Live:
    """One prompt continued under each arm, begun at once.

    `result` is there when it is `done` without an `error`; a stopped one holds the texts as far as they had come.
    """

    def __init__(self, model: LanguageModel, prompt: str, arms: Arms, sampling: Sampling, lock: Any) -> None:
        self.arms = list(arms)
        self.n_samples = sampling.n_samples
        self.result: Generation | None = None
        self.error: str | None = None
        self._tokens: list[np.ndarray] = []
        self._stop = threading.Event()
        self._bytes = model.pieces
        self._arguments = (model, prompt, arms, sampling)
        self._lock = lock
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def stop(self) -> None:
        """End the texts after the token that is being made."""
        self._stop.set()

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it was done in time."""
        self._thread.join(seconds)
        return self.done

    def pieces(self, arm: str, sample: int) -> list[str]:
        """The tokens of a text so far."""
        column = [int(step[self.arms.index(arm), 0, sample]) for step in list(self._tokens)]
        return show_text([self._bytes[token] for token in column if token >= 0])

    def _run(self) -> None:
        try:
            self.result = generate(*self._arguments, on_step=self._step, lock=self._lock)
        except ValueError as error:
            self.error = str(error)
        except Exception as error:  # in a thread of its own nobody else would hear of it
            self.error = f"{type(error).__name__}: {first_line(error)}; try fewer texts or tokens"
            log.exception("a generation failed")

    def _step(self, tokens: np.ndarray) -> bool:
        self._tokens.append(tokens)
        return not self._stop.is_set()

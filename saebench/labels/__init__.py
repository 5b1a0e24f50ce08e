"""Ground-truth labels of tokens: literals that any corpus has, and those of Python source."""

from saebench.labels.literals import Stream, Vocabulary, choose_literals, label
from saebench.labels.syntax import VERSION

__all__ = ["VERSION", "Stream", "Vocabulary", "choose_literals", "label"]

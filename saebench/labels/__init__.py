"""Ground-truth labels of tokens: literals that any corpus has, and those of Python source."""

from saebench.labels.literals import Stream, Vocabulary, choose_literals, label

__all__ = ["Stream", "Vocabulary", "choose_literals", "label"]

"""Interactions: which tokens a number of a model needs together, and which in place of each other."""

from saebench.interactions.explain import interactions
from saebench.interactions.found import Interaction, Interactions
from saebench.interactions.masking import Mask, Way, mask_of
from saebench.interactions.run import WhyConfig, corpus_counts, why
from saebench.interactions.scalars import Scalar, activation, error, log_probability

__all__ = [
    "Interaction",
    "Interactions",
    "Mask",
    "Scalar",
    "Way",
    "WhyConfig",
    "activation",
    "corpus_counts",
    "error",
    "interactions",
    "log_probability",
    "mask_of",
    "why",
]

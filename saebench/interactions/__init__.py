"""Interactions: which tokens a number of a model needs together, and which in place of each other."""

from saebench.interactions.explain import interactions
from saebench.interactions.found import Interaction, Interactions, Sampled
from saebench.interactions.masking import Mask, Way, mask_of
from saebench.interactions.run import WhyConfig, corpus_counts, why
from saebench.interactions.scalars import Scalar, activation, error, log_probability
from saebench.interactions.sparse import sparse_interactions
from saebench.interactions.survey import InteractionsConfig, survey

__all__ = [
    "Interaction",
    "Interactions",
    "InteractionsConfig",
    "Mask",
    "Sampled",
    "Scalar",
    "Way",
    "WhyConfig",
    "activation",
    "corpus_counts",
    "error",
    "interactions",
    "log_probability",
    "mask_of",
    "sparse_interactions",
    "survey",
    "why",
]

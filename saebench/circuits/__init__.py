"""Circuits: how a model gets from these words to that one, through transcoders of one's own."""

from saebench.circuits.graph import Graph, Logit, chosen_logits, trace
from saebench.circuits.influence import Scores, paths, prune, scores
from saebench.circuits.interventions import Agreement, Response, agreement, measured, predicted
from saebench.circuits.replacement import Replacement
from saebench.circuits.run import Circuit, CircuitConfig, circuits

__all__ = [
    "Agreement",
    "Circuit",
    "CircuitConfig",
    "Graph",
    "Logit",
    "Replacement",
    "Response",
    "Scores",
    "agreement",
    "chosen_logits",
    "circuits",
    "measured",
    "paths",
    "predicted",
    "prune",
    "scores",
    "trace",
]

"""Circuits: how a model gets from these words to that one, through transcoders of one's own."""

from saebench.circuits.graph import Graph, Logit, chosen_logits, trace
from saebench.circuits.groups import Marks, change_marks, marks_of, parse_groups, read_circuit
from saebench.circuits.influence import Scores, paths, prune, scores
from saebench.circuits.interventions import (
    Act,
    Agreement,
    Effect,
    Response,
    agreement,
    effects,
    measured,
    parse_acts,
    predicted,
)
from saebench.circuits.replacement import Replacement
from saebench.circuits.run import Circuit, CircuitConfig, Tried, circuits

__all__ = [
    "Act",
    "Agreement",
    "Circuit",
    "CircuitConfig",
    "Effect",
    "Graph",
    "Logit",
    "Marks",
    "Replacement",
    "Response",
    "Scores",
    "Tried",
    "agreement",
    "change_marks",
    "chosen_logits",
    "circuits",
    "effects",
    "marks_of",
    "measured",
    "parse_acts",
    "parse_groups",
    "paths",
    "predicted",
    "prune",
    "read_circuit",
    "scores",
    "trace",
]

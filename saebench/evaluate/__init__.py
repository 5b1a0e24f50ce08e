"""Evaluate SAEs on held-out documents, and report on a run."""

from saebench.evaluate.check import CheckConfig, check, look_at_others
from saebench.evaluate.evaluate import EvalConfig, evaluate
from saebench.evaluate.report import equal_l0_table, massive_note, set_table, table, write_report

__all__ = [
    "CheckConfig",
    "EvalConfig",
    "check",
    "equal_l0_table",
    "evaluate",
    "look_at_others",
    "massive_note",
    "set_table",
    "table",
    "write_report",
]

"""Evaluate SAEs on held-out documents, and report on a run."""

from saebench.evaluate.evaluate import EvalConfig, evaluate
from saebench.evaluate.report import equal_l0_table, massive_note, set_table, table, write_report

__all__ = ["EvalConfig", "equal_l0_table", "evaluate", "massive_note", "set_table", "table", "write_report"]

"""Evaluate SAEs on held-out documents, and report on a run."""

from saebench.evaluate.evaluate import EvalConfig, evaluate
from saebench.evaluate.report import table, write_report

__all__ = ["EvalConfig", "evaluate", "table", "write_report"]

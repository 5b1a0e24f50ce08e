"""Evaluate SAEs on held-out documents, and report on a run."""

from saebench.evaluate.check import CheckConfig, check, look_at_others
from saebench.evaluate.evaluate import EvalConfig, evaluate
from saebench.evaluate.report import ReportConfig, report, write_report
from saebench.evaluate.tables import massive_note, set_table, table, tables

__all__ = [
    "CheckConfig",
    "EvalConfig",
    "ReportConfig",
    "check",
    "evaluate",
    "look_at_others",
    "massive_note",
    "report",
    "set_table",
    "table",
    "tables",
    "write_report",
]

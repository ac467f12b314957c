"""The report page of a run, and what it is made of."""

from pipeline.report.page import write_report

__all__ = ["write_report"]

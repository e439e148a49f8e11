"""`report.html` of a run or several: curves, evaluation and completions on one page that needs no network."""

from grpo.report.page import write_report

__all__ = ["write_report"]

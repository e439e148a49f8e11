"""Draw `report.html` for one or more runs: curves, evaluation and completions on one page that needs no network."""

from grpo.report.curves import dot_plot, heat_map
from grpo.report.page import write_report

__all__ = ["dot_plot", "heat_map", "write_report"]

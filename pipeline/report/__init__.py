"""The report: results, differences with their standard errors, tables and plots of one run or of a sweep.

It reads finished artifacts (JSON files only) and never a model. ``closing_table`` needs nothing heavier than rich, so
that the driver can use it. matplotlib is imported only when a report is written.
"""

from pipeline.report.closing import closing_table
from pipeline.report.report import write_report
from pipeline.report.runs import RunArtifacts

__all__ = ["RunArtifacts", "closing_table", "write_report"]

"""What an honest comparison looks like: rows, differences with their errors, tables, plots, one report.

Reads finished artifacts (JSON only) and never a model. ``closing_table`` needs rich alone, so that the driver can use
it; matplotlib is imported when a report is written.
"""

from pipeline.report.closing import closing_table
from pipeline.report.report import write_report
from pipeline.report.runs import RunArtifacts

__all__ = ["RunArtifacts", "closing_table", "write_report"]

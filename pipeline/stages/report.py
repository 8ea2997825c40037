"""report: base, expanded, pre-trained and tuned side by side, for one run or for all runs of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from pipeline.artifacts.task import Metrics, StageTask
from pipeline.config import Report
from pipeline.report import RunArtifacts, write_report
from pipeline.report.results import Row


def run(task: StageTask) -> Metrics:
    """Writes results.json, report.md, report.html and the plots into ``task.out``.

    ``task.parents`` maps ``<run>:<role>`` to the finished artifact; roles that a run lacks are left out of its report.
    """
    settings = cast(Report, task.settings)
    runs = [RunArtifacts(name, method, directories(task.parents, name)) for name, method in settings.runs.items()]
    rows = write_report(runs, task.out)
    table = {"columns": list(Row.__annotations__), "rows": [list(row.values()) for row in rows]}
    return {"runs": len(runs), "rows": len(rows), "table": table}


def directories(parents: Mapping[str, Path], run: str) -> dict[str, Path]:
    """Role -> directory of one run, out of ``<run>:<role>`` -> directory of all."""
    return {role: path for name, path in parents.items() for owner, _, role in [name.rpartition(":")] if owner == run}

"""The report stage: compares the base, expanded, pre-trained and tuned models of one run or of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from pipeline.artifacts.task import Metrics, StageTask
from pipeline.config import Report
from pipeline.report import RunArtifacts, write_report
from pipeline.report.results import Result


def run(task: StageTask) -> Metrics:
    """Writes results.json, report.md, report.html and the plots to ``task.out``.

    ``task.parents`` maps ``<run>:<role>`` to finished artifacts. Roles that a run lacks are omitted from the report.
    """
    settings = cast(Report, task.settings)
    runs = [RunArtifacts(name, method, directories(task.parents, name)) for name, method in settings.runs.items()]
    results = write_report(runs, task.out)
    table = {"columns": list(Result.__annotations__), "rows": [list(result.values()) for result in results]}
    return {"runs": len(runs), "rows": len(results), "table": table}


def directories(parents: Mapping[str, Path], run: str) -> dict[str, Path]:
    """Returns the directories of one run by role, selected from those of all runs by ``<run>:<role>``."""
    return {role: path for name, path in parents.items() for owner, _, role in [name.rpartition(":")] if owner == run}

"""The report stage: compares the base, expanded, pre-trained and tuned models of one run or of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from pipeline.artifacts.task import Metrics, StageTask
from pipeline.config import MODEL_TARGETS, Report
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
    images = [str(file) for file in sorted(task.out.glob("*.png"))]
    return {"runs": len(runs), "rows": len(results), "table": table, "images": images, "models": _models(runs)}


def _models(runs: Sequence[RunArtifacts]) -> dict[str, str]:
    """Returns the directories of the models by name, those that several runs share once."""
    found = {
        run.directories[stage]: f"{run.name}-{stage}"
        for run in runs
        for stage in MODEL_TARGETS
        if stage in run.directories and (run.directories[stage] / "config.json").is_file()
    }
    return {name: str(directory) for directory, name in found.items()}


def directories(parents: Mapping[str, Path], run: str) -> dict[str, Path]:
    """Returns the directories of one run by role, selected from those of all runs by ``<run>:<role>``."""
    return {role: path for name, path in parents.items() for owner, _, role in [name.rpartition(":")] if owner == run}

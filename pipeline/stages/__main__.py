"""Runs one stage in its own process: ``python -m pipeline.stages TASK.json OUTCOME.json``.

A separate process keeps the driver small, returns all memory to the system after every stage, and allows the peak
memory of the stage alone to be recorded. The outcome file describes how the stage ended. Standard input must be a pipe
from the driver (see ``end_with_parent``).
"""

from __future__ import annotations

import importlib
import logging
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.artifacts.task import Metrics, StageTask, task_from_json
from pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_REQUEST, UserError, WorkersFailed
from pipeline.files import disk_errors_as_user_errors, read_json, write_json
from pipeline.launch.child import end_with_parent, exit_process, importing, redirect_output
from pipeline.launch.environment import create_code_caches
from pipeline.models.source import model_files
from pipeline.progress import set_stream
from pipeline.tracking import Tracker


def main(task_file: Path, outcome_file: Path) -> int:
    """Runs the task, writes the outcome file and returns the exit code.

    Exceptions other than ``UserError`` and ``WorkersFailed`` are bugs. They are not caught, and their traceback goes to
    the stage's log.
    """
    task = task_from_json(read_json(task_file))
    # Output of libraries goes to the log, while progress bars stay on the terminal.
    set_stream(open(os.dup(sys.stderr.fileno()), "w"))
    redirect_output(task.out / "logs" / "stage.log")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.captureWarnings(True)
    try:
        with disk_errors_as_user_errors(task.out):
            create_code_caches()
            metrics = _run_stage(task)
    except UserError as error:
        write_json(outcome_file, {"status": "refused", **error.parts()})
        return EXIT_REQUEST
    except WorkersFailed as error:
        write_json(outcome_file, {"status": "failed", "cause": str(error)})
        return EXIT_FAILED
    # Of the largest process, since a stage may have started others. Linux reports KiB.
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024
    write_json(outcome_file, {"status": "done", "metrics": {"peak_memory_bytes": peak, **metrics}})
    return EXIT_DONE


def _run_stage(task: StageTask) -> Metrics:
    stage = task.name.partition("/")[0]
    with importing():
        function = importlib.import_module(f"pipeline.stages.{stage}").run
    with Tracker(task.tracking, task.out, task.settings.model_dump(mode="json")) as tracker:
        metrics: Metrics = function(task)
        tracker.log(_flatten_numbers(metrics), step=0)
        # Tables, plots and models are only for the tracker, and not recorded in the manifest.
        if (table := metrics.pop("table", None)) is not None:
            tracker.table("results", table["columns"], table["rows"])
        tracker.images([Path(image) for image in metrics.pop("images", [])])
        for name, directory in metrics.pop("models", {}).items():
            tracker.model(name, model_files(Path(directory)))
    return metrics


def _flatten_numbers(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Returns the numeric leaves, named by their path: ``self_check/max_logit_difference``."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            found |= _flatten_numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            found[f"{prefix}{name}"] = value
    return found


if __name__ == "__main__":
    end_with_parent()
    exit_process(main(Path(sys.argv[1]), Path(sys.argv[2])))

"""One stage in a process of its own: ``python -m pipeline.stages TASK.json OUTCOME.json``.

So the driver stays small, memory goes back to the system after every stage, and peak memory is a stage's own.
The outcome file says how it ended; standard input is the watchdog's.
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
from pipeline.errors import EXIT_DONE, EXIT_REQUEST, UserError
from pipeline.files import disk_full_as_user_error, read_json, write_json
from pipeline.launch.child import end_with_parent, redirect_output
from pipeline.progress import set_stream
from pipeline.tracking import Tracker


def main(task_file: Path, outcome_file: Path) -> int:
    """Runs the task and writes the outcome; a defect of ours keeps its traceback."""
    task = task_from_json(read_json(task_file))
    set_stream(open(os.dup(sys.stderr.fileno()), "w"))  # progress bars stay on the terminal
    redirect_output(task.out / "logs" / "stage.log", append=False)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.captureWarnings(True)
    try:
        with disk_full_as_user_error(task.out):
            metrics = _run(task)
    except UserError as error:
        write_json(outcome_file, {"status": "refused", **error.parts()})
        return EXIT_REQUEST
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    write_json(outcome_file, {"status": "done", "metrics": {"peak_memory_bytes": peak, **metrics}})
    return EXIT_DONE


def _run(task: StageTask) -> Metrics:
    stage = task.name.partition("/")[0]
    function = importlib.import_module(f"pipeline.stages.{stage}").run
    with Tracker(task.tracking, task.out, task.settings.model_dump(mode="json")) as tracker:
        metrics: Metrics = function(task)
        tracker.log(_numbers(metrics), step=0)
        if "table" in metrics:
            table = metrics.pop("table")
            tracker.table("results", table["columns"], table["rows"])
    return metrics


def _numbers(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numeric leaves by their path, ``self_check/max_logit_difference``."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            found[f"{prefix}{name}"] = value
    return found


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))

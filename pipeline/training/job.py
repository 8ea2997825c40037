"""A training stage as the driver sees it: hand the task to workers, show how it goes, keep the artifact tidy.

No torch here: the driver never touches a tensor.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from pipeline.artifacts.task import Metrics, StageTask, task_to_json
from pipeline.config import Train
from pipeline.config.evaluation import percent
from pipeline.errors import OutOfMemory, WorkersFailed
from pipeline.files import read_json, write_json
from pipeline.launch.failure import OUT_OF_MEMORY
from pipeline.launch.workers import run_workers
from pipeline.progress import ProgressBar, progress
from pipeline.tracking import METRICS_FILE
from pipeline.training.schedule import total_steps
from pipeline.training.validate import validate_data

WORKER = "pipeline.training.worker"
LOGS, CHECKPOINTS = "logs", "checkpoints"  # the second is removed when training is done
SNAPSHOTS = "on_the_way"  # the name that finished artifacts have on disk, so it stays
START_FILE = "start.json"  # in the logs: what the workers are about to train
TRAINING_FILE = "training.json"  # written last: where it stands, training is done
TAIL_BYTES = 16384


def run_training(task: StageTask) -> Metrics:
    """Trains under torchrun and leaves the finished model in ``task.out``.

    Raises:
        UserError: the workers refused the job.
        Stopped: a signal stopped them after they saved.
        WorkersFailed: one of them died.
        OutOfMemory: for want of memory.
    """
    done = task.out / TRAINING_FILE
    if not done.exists():
        _run(task)
    shutil.rmtree(task.out / CHECKPOINTS, ignore_errors=True)
    metrics: Metrics = read_json(done)
    return metrics


def _run(task: StageTask) -> None:
    settings = task.settings
    assert isinstance(settings, Train)
    validate_data(task.name, settings, task.parents["data"], task.parents["model"])
    logs = task.out / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    (logs / START_FILE).unlink(missing_ok=True)
    job_file = logs / "task.json"
    write_json(job_file, task_to_json(task))
    blocks = read_json(task.parents["data"] / "dataset.json")["blocks"]["train"]
    with progress(task.name, total=total_steps(settings, blocks)) as bar:
        try:
            run_workers(WORKER, job_file, task.launch, logs, on_poll=Watch(task.out, bar))
        except WorkersFailed as error:
            if OUT_OF_MEMORY in str(error):
                raise OutOfMemory(str(error)) from error
            raise


def snapshot_dir(artifact: Path, fraction: float) -> Path:
    """Returns the directory of a training artifact's snapshot at ``fraction`` of its steps."""
    return artifact / SNAPSHOTS / percent(fraction)


class Watch:
    """Follows the workers' files: prints what is trained once, then moves the bar with every logged step."""

    def __init__(self, out: Path, bar: ProgressBar) -> None:
        self._start_file, self._metrics, self._bar = out / LOGS / START_FILE, out / METRICS_FILE, bar
        self._started = False

    def __call__(self) -> None:
        """One look."""
        if not self._started and self._start_file.exists():
            self._started = True
            announce(read_json(self._start_file))
        numbers = last_logged(self._metrics, "loss") if self._started else None
        if numbers is not None:
            shown = {name: numbers[name] for name in ("loss", "tokens_per_second")}
            self._bar.move_to(numbers["step"], **shown)


def announce(start: dict[str, Any]) -> None:
    """Prints what the workers are about to train."""
    resumed = [f"resumed after step {start['resumed_after']}"] if start["resumed_after"] else []
    print(*resumed, *start["notes"], start["summary"], sep="\n", file=sys.stderr)


def last_logged(metrics: Path, name: str) -> dict[str, Any] | None:
    """The last whole line of a metrics file that has this number; None before there is one."""
    if not metrics.exists():
        return None
    with open(metrics, "rb") as stream:
        stream.seek(max(0, metrics.stat().st_size - TAIL_BYTES))
        lines = stream.read().decode(errors="replace").split("\n")[:-1]
    found = (json.loads(line) for line in reversed(lines) if f'"{name}":' in line and line.startswith("{"))
    numbers: dict[str, Any] | None = next(found, None)
    return numbers

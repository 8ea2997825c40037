"""A training stage on the driver's side: starts the workers, follows their progress, and cleans up the artifact.

The driver must not import torch, so neither does this module.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from pipeline.artifacts.task import Metrics, StageTask, task_to_json
from pipeline.config import Train
from pipeline.config.evaluation import percent
from pipeline.errors import OutOfMemory, WorkersFailed
from pipeline.files import is_intact, read_json, read_record, write_json
from pipeline.launch.failure import OUT_OF_MEMORY
from pipeline.launch.workers import run_workers
from pipeline.progress import ProgressBar, progress
from pipeline.tracking import METRICS_FILE, parse_metrics
from pipeline.training.schedule import total_steps
from pipeline.training.validate import validate_corpus, validate_data

WORKER = "pipeline.training.worker"
LOGS, CHECKPOINTS = "logs", "checkpoints"  # in the artifact; checkpoints are removed once training is done
SNAPSHOTS = "on_the_way"  # the directory's name in existing artifacts
START_FILE = "start.json"  # in the logs: what the workers are about to train
TRAINING_FILE = "training.json"  # written last, so training is done once it exists
TRAINING_SEAL = ".training.sha256"  # hashes of all files of the finished model, until they are committed
TAIL_BYTES = 16384  # read from the end of the metrics file


def run_training(task: StageTask) -> Metrics:
    """Trains on all ranks and leaves the finished model in ``task.out``.

    Raises:
        UserError: the workers refused the request.
        Stopped: the workers were stopped by a signal, after saving.
        WorkersFailed: a worker died.
        OutOfMemory: a worker ran out of memory.
    """
    assert isinstance(task.settings, Train)
    saves = task.settings.save_model
    metrics = _finished_training(task.out, saves) if is_intact(task.out / TRAINING_SEAL) else None
    if metrics is None:
        # The existence of this file must mean that the weights written by this attempt are complete.
        for file in (TRAINING_SEAL, TRAINING_FILE):
            (task.out / file).unlink(missing_ok=True)
        _run_workers(task)
        metrics = _finished_training(task.out, saves)
    # The checkpoints are removed only once the result has been read back.
    if metrics is None:
        raise WorkersFailed(
            f"the workers of {task.name} succeeded, but left no usable {TRAINING_FILE} and weights in {task.out}. The "
            "checkpoints were kept: repeat the same command to export the model again."
        )
    shutil.rmtree(task.out / CHECKPOINTS, ignore_errors=True)
    return metrics


def _finished_training(out: Path, saves: bool) -> Metrics | None:
    """Returns the content of ``training.json``, or None if it is not usable or weights to save are missing."""
    metrics: Metrics | None = read_record(out / TRAINING_FILE, lambda value: value["steps"])
    return metrics if not saves or any(out.glob("model*.safetensors")) else None


def _run_workers(task: StageTask) -> None:
    settings = task.settings
    assert isinstance(settings, Train)
    validate_data(task.name, settings, task.parents["data"], task.parents["model"])
    if "corpus" in task.parents:
        validate_corpus(task.name, settings, task.parents["corpus"])
    logs = task.out / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    (logs / START_FILE).unlink(missing_ok=True)  # of an earlier attempt
    job_file = logs / "task.json"
    write_json(job_file, task_to_json(task))
    blocks = read_json(task.parents["data"] / "dataset.json")["blocks"]["train"]
    with progress(task.name, total=total_steps(settings, blocks)) as bar:
        try:
            run_workers(WORKER, job_file, task.launch, logs, on_poll=ProgressWatcher(task.out, bar))
        except WorkersFailed as error:
            if OUT_OF_MEMORY in str(error):
                raise OutOfMemory(str(error)) from error
            raise


def snapshot_dir(artifact: Path, fraction: float) -> Path:
    """Returns the directory of a training artifact's snapshot at ``fraction`` of its steps."""
    return artifact / SNAPSHOTS / percent(fraction)


class ProgressWatcher:
    """Polls the workers' files. Prints what they train once, then advances the bar with every logged step."""

    def __init__(self, out: Path, bar: ProgressBar) -> None:
        self._start_file, self._metrics, self._bar = out / LOGS / START_FILE, out / METRICS_FILE, bar
        self._started = False

    def __call__(self) -> None:
        """Polls once."""
        if not self._started and self._start_file.exists():
            self._started = True
            announce(read_json(self._start_file))
        # Before the start, the metrics file may still hold steps that are dropped on resuming.
        metrics = last_logged(self._metrics, "loss") if self._started else None
        if metrics is not None:
            shown = {name: metrics[name] for name in ("loss", "tokens_per_second")}
            self._bar.move_to(metrics["step"], **shown)


def announce(start: dict[str, Any]) -> None:
    """Prints what the workers are about to train."""
    resumed = [f"resumed after step {start['resumed_after']}"] if start["resumed_after"] else []
    print(*resumed, *start["notes"], start["summary"], sep="\n", file=sys.stderr)


def last_logged(metrics: Path, name: str) -> dict[str, Any] | None:
    """Returns the last complete line of a metrics file that contains ``name``, or None."""
    if not metrics.exists():
        return None
    with open(metrics, "rb") as stream:
        stream.seek(max(0, metrics.stat().st_size - TAIL_BYTES))
        # What follows the last newline is a line that is still being written.
        lines = stream.read().decode(errors="replace").split("\n")[:-1]
    # The first line may be cut off at its beginning, and a power cut may leave zeros: neither parses.
    parsed = map(parse_metrics, reversed(lines))
    return next((line for line in parsed if line is not None and name in line), None)

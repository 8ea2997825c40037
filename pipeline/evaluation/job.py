"""Starts the processes that score one model together, and waits for them. See ``sharing``."""

from __future__ import annotations

from dataclasses import replace

from pipeline.artifacts.task import StageTask, task_to_json
from pipeline.config import Evaluate
from pipeline.evaluation.sharing import PART_FILES
from pipeline.files import write_json
from pipeline.launch.machine import Placement
from pipeline.launch.workers import run_local_workers
from pipeline.progress import progress

SCORING_WORKER = "pipeline.evaluation.worker"


def score_on_all_ranks(task: StageTask, placement: Placement) -> None:
    """Scores the tasks that have no result file yet with ``placement.processes`` processes on this machine.

    Args:
        task: an evaluation of ``parents["model"]``.

    Raises:
        UserError: the processes refused the request.
        WorkersFailed: one of them died.
    """
    assert isinstance(task.settings, Evaluate)
    logs = task.out / "logs" / "ranks"
    logs.mkdir(parents=True, exist_ok=True)
    for stale in logs.glob(PART_FILES):
        stale.unlink()
    job_file = logs / "task.json"
    write_json(job_file, task_to_json(task))
    files = [task.out / "tasks" / f"{name}.json" for name in task.settings.tasks]
    with progress(task.name, total=len(files)) as bar:

        def show_progress() -> None:
            bar.move_to(sum(file.exists() for file in files))

        run_local_workers(SCORING_WORKER, job_file, task.launch, replace(placement, nodes=1), logs, show_progress)
    for exchanged in logs.glob(PART_FILES):
        exchanged.unlink()

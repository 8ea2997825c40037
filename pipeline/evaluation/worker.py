"""The entry point of a rank: ``python -m pipeline.evaluation.worker TASK.json``, started by ``pipeline.launch.ranks``.

Heavy imports come after ``end_with_parent``, so a worker whose parent dies during those seconds still ends at once.
Unlike those of training, these processes do not handle signals: SIGTERM ends them, which loses at most one task.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from pipeline.artifacts.task import task_from_json
from pipeline.config import Evaluate
from pipeline.files import disk_errors_as_user_errors, read_json
from pipeline.launch.child import end_with_parent, exit_process, importing, write_stacks_on_signal
from pipeline.launch.environment import create_code_caches
from pipeline.launch.machine import detect_machine, place, visible_gpus
from pipeline.launch.workers import LOG_DIR_VARIABLE
from pipeline.training.worker import run_and_record


def score_as_rank(task_file: Path, log_dir: Path) -> dict[str, Any]:
    """Scores a model together with the other ranks. Returns the outcome."""
    create_code_caches()  # before the imports, one of which would create them with access for others
    task = task_from_json(read_json(task_file))
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    machine = detect_machine()
    placement = place(task.launch, machine)
    if placement.device == "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus(machine.gpus)[rank]

    with importing():
        from pipeline.evaluation.harness import ScoringJob, score
        from pipeline.evaluation.sharing import ScoringRanks
        from pipeline.training.watchdog import Watch

    assert isinstance(task.settings, Evaluate)
    watch = Watch(rank, count, task.launch.collective_timeout_seconds, log_dir)
    watch.start()
    job = ScoringJob(task.name, task.parents["model"], task.parents["corpus"], task.out, placement)
    with disk_errors_as_user_errors(task.out):
        score(job, task.settings, ScoringRanks(rank, count, log_dir, watch))
    return {"status": "done"}


if __name__ == "__main__":
    end_with_parent()
    write_stacks_on_signal()
    logs = Path(os.environ[LOG_DIR_VARIABLE])
    exit_process(run_and_record(lambda: score_as_rank(Path(sys.argv[1]), logs), logs))

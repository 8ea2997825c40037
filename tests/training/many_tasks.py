"""Runs several training tasks in sequence in one set of worker processes: ``many_tasks.py PLAN.json``.

Starting workers takes seconds of imports, so tests that compare many runs share them. The plan is a list of
``{"task": ..., "stop_after": step or null}``, each with the ``backend`` of torch.compile if it is not the default. The
outcome of every task is written to its logs.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from pipeline.artifacts.task import task_from_json
from pipeline.files import write_json
from pipeline.launch.child import end_with_parent
from pipeline.launch.workers import LOG_DIR_VARIABLE, OUTCOME_FILE


def run(entry: dict[str, Any]) -> None:
    """Runs one task. It is asked to stop during step ``stop_after``. ``waits``: see ``waits.py``."""
    from pipeline.training import compilation
    from pipeline.training.trainer import train

    compilation.BACKEND = entry.get("backend", compilation.BACKEND)
    task = task_from_json(entry["task"])
    logs = task.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    calls = 0

    def wants_stop() -> bool:
        nonlocal calls
        calls += 1
        return calls == entry["stop_after"]

    if "waits" in entry:
        from tests.training.waits import count_waits_of_steps

        with count_waits_of_steps(Path(entry["waits"])):
            outcome = train(task, logs, wants_stop)
    else:
        outcome = train(task, logs, wants_stop)
    if os.environ["RANK"] == "0":
        write_json(logs / OUTCOME_FILE, outcome)


if __name__ == "__main__":
    end_with_parent()
    for entry in json.loads(Path(sys.argv[1]).read_text()):
        run(entry)
    if os.environ["RANK"] == "0":
        write_json(Path(os.environ[LOG_DIR_VARIABLE]) / OUTCOME_FILE, {"status": "done"})

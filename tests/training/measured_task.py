"""Runs one training task as a worker does, and measures the growth of its resident memory: ``measured_task.py JOB``.

What is shared with the files of libraries does not count; they are imported before.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from pathlib import Path

from pipeline.artifact import write_json
from pipeline.launch import LOG_DIR_VARIABLE, OUTCOME_FILE
from pipeline.stage import task_from_json
from pipeline.watchdog import end_with_parent

SAMPLE_SECONDS = 0.005


class Resident(threading.Thread):
    """Watches this process's anonymous and shared resident memory."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.peak = self.now()

    @staticmethod
    def now() -> int:
        """Bytes."""
        status = Path("/proc/self/status").read_text()
        return sum(int(re.search(rf"{name}:\s*(\d+)", status)[1]) for name in ("RssAnon", "RssShmem", "RssFile")) * 1024

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(SAMPLE_SECONDS)


if __name__ == "__main__":
    from pipeline.training.session import train

    end_with_parent()
    logs = Path(os.environ[LOG_DIR_VARIABLE])
    task = task_from_json(json.loads(Path(sys.argv[1]).read_text()))
    resident = Resident()
    resident.start()
    train(task, logs, lambda: False)
    if os.environ["RANK"] == "0":
        write_json(logs / OUTCOME_FILE, {"status": "done", "growth": resident.peak - resident.before})

"""Runs a training task as a worker does, and measures how its memory grows: ``measured_task.py TASK.json``.

The memory is the resident anonymous and shared memory that Linux reports. It is measured from after the imports,
before the model is loaded.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from pathlib import Path

from pipeline.artifacts.task import task_from_json
from pipeline.files import read_json, write_json
from pipeline.launch.child import end_with_parent
from pipeline.launch.workers import LOG_DIR_VARIABLE, OUTCOME_FILE

SAMPLE_SECONDS = 0.005
COUNTED = ("RssAnon", "RssShmem")


def resident() -> int:
    """Returns the resident bytes of this process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * sum(int(count) for count in re.findall(rf"(?:{'|'.join(COUNTED)}):\s*(\d+)", status))


class Watch(threading.Thread):
    """Records the peak resident memory since its start."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.peak = resident()

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, resident())
            time.sleep(SAMPLE_SECONDS)


if __name__ == "__main__":
    end_with_parent()
    import transformers.models.llama.modeling_llama  # noqa: F401  imported before measuring

    from pipeline.training.trainer import train

    logs = Path(os.environ[LOG_DIR_VARIABLE])
    task = task_from_json(read_json(sys.argv[1]))
    watch = Watch()
    watch.start()
    train(task, logs, lambda: False)
    write_json(logs / OUTCOME_FILE, {"status": "done", "growth": watch.peak - watch.before})

"""Trains one task after another in one process: ``python -m tests.study.one_worker``, with task files on its input.

A rank takes seconds to start, even without its imports, and a study has dozens of runs of a few milliseconds. This
process runs the trainer of real workers. ``TrainingWorker`` replaces only what starts a new process for each.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.config import Launch
from pipeline.errors import Diverged
from pipeline.files import read_json
from pipeline.launch import workers
from pipeline.launch.machine import detect_machine, place
from pipeline.launch.ranks import ADDRESS_VARIABLE, RENDEZVOUS_VARIABLE

DONE = "done\n"


class TrainingWorker:
    """The process, as a replacement for ``pipeline.launch.workers.run_workers`` with one rank."""

    def __init__(self, directory: Path) -> None:
        environment = {
            **os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1",
            "DS_ACCELERATOR": "cpu", ADDRESS_VARIABLE: "127.0.0.1", RENDEZVOUS_VARIABLE: str(directory / "rendezvous"),
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.study.one_worker"], text=True, env=environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=open(directory / "log", "w"),
        )  # fmt: skip
        self.tasks = 0

    def __call__(
        self, module: str, job_file: Path, launch: Launch, log_dir: Path, on_poll: Callable[[], None]
    ) -> dict[str, Any]:
        """Runs a task and returns its outcome, or raises the exception for it, like ``run_workers``."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self.tasks += 1
        (log_dir / workers.OUTCOME_FILE).unlink(missing_ok=True)
        self._process.stdin.write(f"{job_file}\n")
        self._process.stdin.flush()
        while (line := self._process.stdout.readline()) != DONE:  # what libraries print comes first
            assert line, "the process died"
        return workers._read_outcome(log_dir, 0, place(launch, detect_machine()))

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


def serve() -> None:
    """Runs the tasks whose files are named on standard input."""
    import torch

    from pipeline.artifacts.task import task_from_json
    from pipeline.training import mfu
    from pipeline.training.trainer import train
    from pipeline.training.worker import write_outcome

    torch.set_num_threads(1)
    measure = mfu.matrix_rate
    mfu.matrix_rate = lambda dtype, device, size=64, repeats=3: measure(dtype, device, 64, repeats)
    for line in sys.stdin:
        task = task_from_json(read_json(Path(line.strip())))
        logs = task.out / "logs"
        try:
            write_outcome(logs, train(task, logs, lambda: False))
        except Diverged as error:
            found = {"rank": 0, "cause": str(error), "explained": True, "diverged": True}
            write_outcome(logs, {"status": "failed", **found})
        print(DONE, end="", flush=True)


if __name__ == "__main__":
    serve()

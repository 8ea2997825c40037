"""The entry point of a rank: ``python -m pipeline.training.worker TASK.json``, started by ``pipeline.launch.ranks``.

Heavy imports come after ``end_with_parent``, so a worker whose driver dies during those seconds still ends at once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_REQUEST, Diverged, TrainingFailure, UserError
from pipeline.files import read_json, temporary_path, write_json
from pipeline.launch.child import (
    BLOCKED_SIGNALS,
    end_with_parent,
    exit_process,
    importing,
    write_stacks_on_signal,
)
from pipeline.launch.environment import create_code_caches
from pipeline.launch.workers import LOG_DIR_VARIABLE, OUTCOME_FILE, STOP_FILE


class StopRequest:
    """Tells whether this rank has been asked to stop, by a signal or by the driver's stop file.

    Signals that arrived while this process was starting were blocked (see ``pipeline.launch.child``). They are
    delivered when this object is created.
    """

    def __init__(self, stop_file: Path) -> None:
        self._stop_file = stop_file
        self._signalled = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the driver too, which then writes the stop file
        signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED_SIGNALS)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def __call__(self) -> bool:
        """Returns whether to stop after the current step."""
        return self._signalled or self._stop_file.exists()


def main(task_file: Path, log_dir: Path) -> int:
    """Runs the task on this rank and records the outcome.

    Returns:
        The exit status. A stopped run is a success here: with a failing status, the launcher would end ranks that are
        still saving.

    Raises:
        Exception: a bug. It is recorded first, and its traceback goes to the rank's log.
    """
    stop = StopRequest(log_dir / STOP_FILE)
    return run_and_record(lambda: _run(task_file, log_dir, stop), log_dir)


def run_and_record(function: Callable[[], dict[str, Any]], log_dir: Path) -> int:
    """Runs a function on this rank, records the outcome that it returns, and returns the exit status.

    Raises:
        Exception: a bug. It is recorded first, and its traceback goes to the rank's log.
    """
    rank = int(os.environ["RANK"])
    try:
        outcome = function()
    except UserError as error:
        write_outcome(log_dir, {"status": "refused", **error.parts()})
        return EXIT_REQUEST
    except TrainingFailure as error:
        found = {"rank": rank, "cause": str(error), "explained": True, "diverged": isinstance(error, Diverged)}
        write_outcome(log_dir, {"status": "failed", **found})
        return EXIT_FAILED
    except Exception as error:
        write_outcome(log_dir, {"status": "failed", "rank": rank, "cause": f"{type(error).__name__}: {error}"})
        raise
    if rank == 0:
        write_outcome(log_dir, outcome)
    return EXIT_DONE


def _run(task_file: Path, log_dir: Path, stop: Callable[[], bool]) -> dict[str, Any]:
    create_code_caches()  # before the imports, one of which would create them with access for others

    with importing():
        from torch import distributed

        from pipeline.artifacts.task import task_from_json
        from pipeline.training.trainer import train

    outcome = train(task_from_json(read_json(task_file)), log_dir, stop)
    distributed.destroy_process_group()
    return outcome


def write_outcome(log_dir: Path, outcome: dict[str, Any]) -> None:
    """Records the outcome, unless another rank already has.

    The first rank to fail knows the cause. The others fail later because they lose the connection to it.
    """
    temporary = temporary_path(log_dir / OUTCOME_FILE)
    write_json(temporary, outcome)
    with suppress(FileExistsError):
        os.link(temporary, log_dir / OUTCOME_FILE)  # unlike a rename, this never replaces an existing file
    temporary.unlink()


if __name__ == "__main__":
    end_with_parent()
    write_stacks_on_signal()
    exit_process(main(Path(sys.argv[1]), Path(os.environ[LOG_DIR_VARIABLE])))

"""Starts worker processes: on this machine, or with srun on the nodes of a Slurm job.

The driver does not import torch or use CUDA. It communicates with the workers through files in the log directory,
which all nodes share, and through one pipe:

- ``outcome.json`` describes how the work ended. It is written by the first worker that knows.
- ``stop`` is created by the driver on a signal. Workers that find it save their state and exit.
- The standard input of every worker, including those that srun starts, is a pipe that the driver holds open. When the
  driver dies, the pipe closes and the workers exit (see ``end_with_parent``). The driver also closes it if one rank
  has died and the others do not exit, so that no rank waits forever for a dead one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import uuid4

from pipeline.config import Launch
from pipeline.errors import Stopped, UserError, WorkersFailed
from pipeline.files import read_record
from pipeline.launch.child import block_signals_in_children
from pipeline.launch.environment import worker_environment
from pipeline.launch.failure import (
    ALIVE_FILES,
    DEATHS_FILES,
    LAUNCHER_LOG,
    LAUNCHER_LOGS,
    explain_workers,
    worker_deaths,
)
from pipeline.launch.machine import Placement, detect_machine, place
from pipeline.launch.ranks import (
    ADDRESS_VARIABLE,
    LOG_DIR_VARIABLE,
    POLL_SECONDS,
    RENDEZVOUS_VARIABLE,
    Ranks,
    refresh_directory,
)
from pipeline.launch.slurm import Allocation, current_allocation, escape_percent, node_address

OUTCOME_FILE = "outcome.json"
STOP_FILE = "stop"
RENDEZVOUS_FILES = "rendezvous-*.json"
DEATH_CHECK_SECONDS = 2.0  # between two checks for a dead rank
GRACE_SECONDS = 10.0  # for the other ranks to exit after one has died
TERMINATE_SECONDS = 10.0  # for the launcher to exit, before SIGTERM and again before SIGKILL
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def run_workers(
    module: str, job_file: Path, launch: Launch, log_dir: Path, on_poll: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Runs ``python -m module job_file`` on all ranks and waits for them.

    A first SIGTERM, SIGINT or SIGUSR1 asks the workers to save their state and exit. A second one ends them
    immediately.

    Args:
        module: the worker's module.
        job_file: its argument.
        launch: how many processes to start, and on which device.
        log_dir: where logs and the files described above are written. It must be visible on all nodes.
        on_poll: called several times per second while the workers run.

    Returns:
        The outcome of a finished job, as written by a worker.

    Raises:
        UserError: the workers refused the job.
        Stopped: the workers stopped after a signal, with their state saved.
        WorkersFailed: a worker died.
    """
    placement, allocation = place(launch, detect_machine()), current_allocation()
    nodes = allocation if allocation is not None and allocation.needs_srun else None
    _clear(log_dir)
    with _stop_file_on_signal(log_dir / STOP_FILE):
        status = _launch(module, job_file, launch, placement, nodes, log_dir, on_poll)
    return _read_outcome(log_dir, status, placement, () if allocation is None else allocation.nodes)


def run_local_workers(
    module: str,
    job_file: Path,
    launch: Launch,
    placement: Placement,
    log_dir: Path,
    on_poll: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Runs ``python -m module job_file`` on all ranks of a placement on this machine alone, and waits for them.

    Signals are not handled: if this process ends, the workers end too.

    Args, Returns and Raises are those of ``run_workers``.
    """
    _clear(log_dir)
    status = _launch(module, job_file, launch, placement, None, log_dir, on_poll)
    return _read_outcome(log_dir, status, placement, ())


def _clear(log_dir: Path) -> None:
    """Removes the files of an earlier attempt."""
    log_dir.mkdir(parents=True, exist_ok=True)
    for name in (STOP_FILE, OUTCOME_FILE, LAUNCHER_LOGS, DEATHS_FILES, RENDEZVOUS_FILES, ALIVE_FILES):
        for stale in log_dir.glob(name):
            stale.unlink(missing_ok=True)


# ------------------------------------------------------------------------------ running the launcher


def _launch(
    module: str,
    job_file: Path,
    launch: Launch,
    placement: Placement,
    nodes: Allocation | None,
    log_dir: Path,
    on_poll: Callable[[], None],
) -> int:
    """Starts the workers, waits for them and returns the launcher's exit status.

    Args:
        nodes: the job on whose nodes srun starts them; None for this machine.
    """
    # The name is new for every attempt: a node may have cached a file of the same name on NFS.
    rendezvous = log_dir.absolute() / RENDEZVOUS_FILES.replace("*", uuid4().hex)
    environment = {
        **worker_environment(launch, placement, os.environ),
        LOG_DIR_VARIABLE: str(log_dir.absolute()),
        RENDEZVOUS_VARIABLE: str(rendezvous),
        ADDRESS_VARIABLE: "127.0.0.1" if nodes is None else node_address(nodes.nodes[0]),
    }
    launcher: Ranks | subprocess.Popen[bytes]
    if nodes is None:
        launcher = Ranks(module, job_file, environment, placement.processes)
    else:
        launcher = _start_srun(srun_command(module, job_file, placement, nodes, log_dir), environment, log_dir)
    try:
        _wait(launcher, log_dir, on_poll)
    finally:
        _terminate(launcher)
        for temporary in (rendezvous, *log_dir.glob(ALIVE_FILES)):
            temporary.unlink(missing_ok=True)
    return launcher.returncode or 0


def srun_command(module: str, job_file: Path, placement: Placement, allocation: Allocation, log_dir: Path) -> list[str]:
    """Returns the command that runs ``python -m module job_file`` on every rank of a Slurm job's nodes."""
    output = f"--output={escape_percent(log_dir.absolute())}/launcher-%n.log"
    ranks = [sys.executable, "-m", "pipeline.launch.ranks", str(placement.processes), str(placement.nodes)]
    return [*allocation.srun(placement.nodes, output), *ranks, module, str(job_file.absolute())]


def _start_srun(command: list[str], environment: Mapping[str, str], log_dir: Path) -> subprocess.Popen[bytes]:
    # In a new session, so that Ctrl-C in the terminal reaches only the driver, which then stops the workers.
    with open(log_dir / LAUNCHER_LOG, "wb") as log, block_signals_in_children():
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def _wait(launcher: Ranks | subprocess.Popen[bytes], log_dir: Path, on_poll: Callable[[], None]) -> None:
    """Waits until the launcher ends, or until ``GRACE_SECONDS`` after a rank has died."""
    next_check, give_up = time.monotonic() + DEATH_CHECK_SECONDS, float("inf")
    while True:
        try:
            launcher.wait(timeout=POLL_SECONDS)
        except subprocess.TimeoutExpired:
            on_poll()
        else:
            return on_poll()
        now = time.monotonic()
        if now > give_up:
            return None
        if now > next_check:
            next_check = now + DEATH_CHECK_SECONDS
            if give_up == float("inf") and _a_rank_died(log_dir):
                give_up = now + GRACE_SECONDS


def _a_rank_died(log_dir: Path) -> bool:
    return load_outcome(log_dir)["status"] in ("failed", "refused") or bool(worker_deaths(log_dir))


def _terminate(launcher: Ranks | subprocess.Popen[bytes]) -> None:
    """Closes the pipe to the workers and makes sure that the launcher ends."""
    assert launcher.stdin is not None
    launcher.stdin.close()
    for escalate in (launcher.terminate, launcher.kill):
        try:
            launcher.wait(timeout=TERMINATE_SECONDS)
        except subprocess.TimeoutExpired:
            escalate()
    launcher.wait()


@contextmanager
def _stop_file_on_signal(stop_file: Path) -> Iterator[None]:
    """Inside this context a first signal creates the stop file, and a second one raises ``KeyboardInterrupt``."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can set signal handlers
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop_file.exists():
            raise KeyboardInterrupt
        stop_file.touch()
        print("stopping: the workers finish their step and save; repeat the signal to kill them", file=sys.stderr)

    previous = {number: signal.signal(number, on_signal) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------ outcome


def load_outcome(log_dir: Path) -> dict[str, Any]:
    """Reads how the work ended: ``{"status": "lost"}`` if no process recorded it."""
    path = log_dir / OUTCOME_FILE
    refresh_directory(log_dir)
    outcome: dict[str, Any] = read_record(path, lambda value: value["status"]) or {"status": "lost"}
    return outcome


def raise_refusal(outcome: Mapping[str, Any]) -> None:
    """Raises the ``UserError`` that an outcome contains, if any."""
    if outcome["status"] == "refused":
        raise UserError(**{part: outcome[part] for part in ("setting", "value", "rule", "remedy")})


def _read_outcome(log_dir: Path, exit_status: int, placement: Placement, nodes: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the outcome of a finished job, or raises the exception for any other outcome."""
    outcome = load_outcome(log_dir)
    raise_refusal(outcome)
    # A stop requested while the last worker was finishing must still stop the stages that follow.
    if outcome["status"] == "stopped" or (outcome["status"] == "done" and (log_dir / STOP_FILE).exists()):
        raise Stopped(f"workers stopped; logs in {log_dir}")
    if outcome["status"] != "done" or exit_status != 0:
        raise WorkersFailed(explain_workers(log_dir, outcome, exit_status, placement.processes, nodes))
    return outcome

"""Starts worker processes: with torchrun on this machine, or with srun and one torchrun per node of a Slurm job.

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.config import Launch
from pipeline.errors import Stopped, UserError, WorkersFailed
from pipeline.files import read_record, temporary_path
from pipeline.launch.child import block_signals_in_children
from pipeline.launch.failure import LAUNCHER_LOG, LAUNCHER_LOGS, explain_workers, worker_deaths
from pipeline.launch.machine import Placement, detect_machine, place
from pipeline.launch.slurm import Allocation, current_allocation, escape_percent, node_address

OUTCOME_FILE = "outcome.json"
STOP_FILE = "stop"
LOG_DIR_VARIABLE = "PIPELINE_LOG_DIR"  # set in the environment of workers that have a driver
POLL_SECONDS = 0.2
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
    placement = place(launch, detect_machine())
    log_dir.mkdir(parents=True, exist_ok=True)
    (log_dir / STOP_FILE).unlink(missing_ok=True)
    environment = worker_environment(placement, log_dir, os.environ)
    exit_status = 0
    with _stop_file_on_signal(log_dir / STOP_FILE):
        for command in _commands(module, job_file, placement, log_dir):
            exit_status = _run_launcher(command, environment, log_dir, on_poll)
            if not _port_was_taken(log_dir):
                break
            print("the port for the rendezvous is used by another program, trying another port", file=sys.stderr)
    return _read_outcome(log_dir, exit_status, placement)


# ------------------------------------------------------------------------- commands and environment


def torchrun_command(module: str, job_file: Path, placement: Placement) -> list[str]:
    """Returns the command that runs ``python -m module job_file`` on every rank of this machine."""
    return _torchrun(["--standalone"], module, job_file, placement)


def srun_command(
    module: str,
    job_file: Path,
    placement: Placement,
    allocation: Allocation,
    log_dir: Path,
    rendezvous: tuple[str, int],
) -> list[str]:
    """Returns the command that runs ``python -m module job_file`` on every rank of a Slurm job's nodes.

    Args:
        log_dir: where the torchrun of each node writes its log.
        rendezvous: address and port on the first node at which the ranks connect.
    """
    address, port = rendezvous
    options = [f"--nnodes={placement.nodes}", f"--master-addr={address}", f"--master-port={port}"]
    node = [sys.executable, "-m", "pipeline.launch.child"]
    output = f"--output={escape_percent(log_dir.absolute())}/torchrun-%n.log"
    return [*allocation.srun(placement.nodes, output), *node, *_torchrun(options, module, job_file, placement)]


def _torchrun(options: list[str], module: str, job_file: Path, placement: Placement) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", *options, "--max-restarts=0"]
    return [*launcher, f"--nproc-per-node={placement.processes}", "-m", module, str(job_file.absolute())]


def _commands(module: str, job_file: Path, placement: Placement, log_dir: Path) -> Iterator[list[str]]:
    """Yields the command to run, then alternatives with other ports in case the port is taken."""
    allocation = current_allocation()
    if allocation is None or not allocation.needs_srun:
        yield torchrun_command(module, job_file, placement)  # --standalone chooses a free port itself
        return
    address = node_address(allocation.nodes[0])
    for port in allocation.ports():
        yield srun_command(module, job_file, placement, allocation, log_dir, (address, port))


def worker_environment(placement: Placement, log_dir: Path, inherited: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of the workers."""
    environment = {
        **package_environment(inherited),
        # DeepSpeed runs ninja, which is installed beside the interpreter, even if the environment is not activated.
        "PATH": _prepend(str(Path(sys.executable).parent), inherited.get("PATH")),
        "DS_ACCELERATOR": placement.device,
        "OMP_NUM_THREADS": str(placement.threads),
        LOG_DIR_VARIABLE: str(log_dir.absolute()),
    }
    if placement.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def package_environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """Returns an environment in which a child process can import this package from any working directory."""
    package_root = str(Path(__file__).resolve().parents[2])
    return {**inherited, "PYTHONPATH": _prepend(package_root, inherited.get("PYTHONPATH"))}


def _prepend(first: str, rest: str | None) -> str:
    parts = [first, *(rest or "").split(os.pathsep)]
    return os.pathsep.join(dict.fromkeys(part for part in parts if part))


# ------------------------------------------------------------------------------ running the launcher


def _run_launcher(
    command: list[str], environment: Mapping[str, str], log_dir: Path, on_poll: Callable[[], None]
) -> int:
    """Runs the launcher until it ends, and returns its exit status."""
    for stale in (log_dir / OUTCOME_FILE, *log_dir.glob(LAUNCHER_LOGS)):
        stale.unlink(missing_ok=True)
    with open(log_dir / LAUNCHER_LOG, "wb") as log:
        # In a new session, so that Ctrl-C in the terminal reaches only the driver, which then stops the workers.
        with block_signals_in_children():
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        try:
            _wait(process, log_dir, on_poll)
        finally:
            _terminate(process)
    return process.returncode


def _wait(process: subprocess.Popen[bytes], log_dir: Path, on_poll: Callable[[], None]) -> None:
    """Waits until the launcher ends, or until ``GRACE_SECONDS`` after a rank has died."""
    next_check, give_up = time.monotonic() + DEATH_CHECK_SECONDS, float("inf")
    while True:
        try:
            process.wait(timeout=POLL_SECONDS)
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


def _terminate(process: subprocess.Popen[bytes]) -> None:
    """Closes the pipe to the workers and makes sure that the launcher ends."""
    assert process.stdin is not None
    process.stdin.close()
    for escalate in (process.terminate, process.kill):
        try:
            process.wait(timeout=TERMINATE_SECONDS)
        except subprocess.TimeoutExpired:
            escalate()
    process.wait()


def _port_was_taken(log_dir: Path) -> bool:
    log = log_dir / "torchrun-0.log"  # of the first node, which listens on the port
    return log.exists() and "EADDRINUSE" in log.read_text(errors="replace")


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
    # NFS may cache for up to a minute that a file does not exist. Changing the directory from this host prevents that.
    with suppress(OSError):
        probe = temporary_path(path)
        probe.touch()
        probe.unlink()
    outcome: dict[str, Any] = read_record(path, lambda value: value["status"]) or {"status": "lost"}
    return outcome


def raise_refusal(outcome: Mapping[str, Any]) -> None:
    """Raises the ``UserError`` that an outcome contains, if any."""
    if outcome["status"] == "refused":
        raise UserError(**{part: outcome[part] for part in ("setting", "value", "rule", "remedy")})


def _read_outcome(log_dir: Path, exit_status: int, placement: Placement) -> dict[str, Any]:
    """Returns the outcome of a finished job, or raises the exception for any other outcome."""
    outcome = load_outcome(log_dir)
    raise_refusal(outcome)
    # A stop requested while the last worker was finishing must still stop the stages that follow.
    if outcome["status"] == "stopped" or (outcome["status"] == "done" and (log_dir / STOP_FILE).exists()):
        raise Stopped(f"workers stopped; logs in {log_dir}")
    if outcome["status"] != "done" or exit_status != 0:
        allocation = current_allocation()
        nodes = allocation.nodes if allocation is not None else ()
        raise WorkersFailed(explain_workers(log_dir, outcome, exit_status, placement.processes, nodes))
    return outcome

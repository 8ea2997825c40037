"""Starting worker processes: torchrun on this machine, or srun with one torchrun on each node of a Slurm job.

The driver imports no torch and never touches CUDA; it looks at the machine from outside. What passes between it and
the workers is files in the log directory, which all nodes share, and one pipe:

- ``outcome.json``: how the work ended, written by the first worker that knows;
- ``stop``: made by the driver when a signal asks it to stop; workers save and leave when they see it;
- standard input of every worker is a pipe that the driver holds open, through srun on other nodes. When the driver
  dies, even by ``kill -9``, the pipe ends and so do the workers (see ``watchdog``). The driver closes it when a rank
  has died and the others do not follow, so none waits for the dead.
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
from pipeline.files import read_json, temporary_path
from pipeline.launch.child import block_signals_in_children
from pipeline.launch.failure import LAUNCHER_LOG, LAUNCHER_LOGS, explain_workers, worker_deaths
from pipeline.launch.machine import Placement, detect_machine, place
from pipeline.launch.slurm import Allocation, current_allocation, escape_percent, node_address

OUTCOME_FILE = "outcome.json"
STOP_FILE = "stop"
LOG_DIR_VARIABLE = "PIPELINE_LOG_DIR"  # set for workers that have a driver
POLL_SECONDS = 0.2
LOOK_SECONDS = 2.0  # between two looks for a dead rank
GRACE_SECONDS = 10.0  # for the others to end in order once one has died; then their lifeline is cut
END_SECONDS = 10.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


# ------------------------------------------------------------------------------------- command lines


def torchrun_command(module: str, job_file: Path, placement: Placement) -> list[str]:
    """The command that starts ``python -m module job_file`` on every rank of this one machine."""
    return _torchrun(["--standalone"], module, job_file, placement)


def srun_command(
    module: str, job_file: Path, placement: Placement, allocation: Allocation, log_dir: Path, meeting: tuple[str, int]
) -> list[str]:
    """The same on every node of a Slurm job: one torchrun a node, in the order of the nodes.

    Args:
        log_dir: where each node's torchrun writes its log.
        meeting: address and port on the first node, where all ranks meet.
    """
    address, port = meeting
    options = [f"--nnodes={placement.nodes}", f"--master-addr={address}", f"--master-port={port}"]
    node = [sys.executable, "-m", "pipeline.launch.child"]
    output = f"--output={escape_percent(log_dir.absolute())}/torchrun-%n.log"
    return [*allocation.srun(placement.nodes, output), *node, *_torchrun(options, module, job_file, placement)]


def _torchrun(options: list[str], module: str, job_file: Path, placement: Placement) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", *options, "--max-restarts=0"]
    return [*launcher, f"--nproc-per-node={placement.processes}", "-m", module, str(job_file.absolute())]


def _commands(module: str, job_file: Path, placement: Placement, log_dir: Path) -> Iterator[list[str]]:
    """What to start; the next is for where the port of the one before was taken."""
    allocation = current_allocation()
    if allocation is None or not allocation.needs_srun:
        yield torchrun_command(module, job_file, placement)
        return
    address = node_address(allocation.nodes[0])
    for port in allocation.ports():
        yield srun_command(module, job_file, placement, allocation, log_dir, (address, port))


def worker_environment(placement: Placement, log_dir: Path, inherited: Mapping[str, str]) -> dict[str, str]:
    """The workers' environment.

    This package and the interpreter's own tools (ninja) are found wherever the driver was started from.
    """
    environment = {
        **package_environment(inherited),
        "PATH": _joined(str(Path(sys.executable).parent), inherited.get("PATH")),
        "DS_ACCELERATOR": placement.device,
        "OMP_NUM_THREADS": str(placement.threads),
        LOG_DIR_VARIABLE: str(log_dir.absolute()),
    }
    if placement.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def package_environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """The environment in which a child finds this package, wherever it was imported from."""
    package_root = str(Path(__file__).resolve().parents[2])
    return {**inherited, "PYTHONPATH": _joined(package_root, inherited.get("PYTHONPATH"))}


def _joined(first: str, rest: str | None) -> str:
    parts = [first, *(rest or "").split(os.pathsep)]
    return os.pathsep.join(dict.fromkeys(part for part in parts if part))


# --------------------------------------------------------------------------------------- running them


def run_workers(
    module: str, job_file: Path, launch: Launch, log_dir: Path, on_poll: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Runs ``module`` with ``job_file`` on all ranks and waits, calling ``on_poll`` a few times a second.

    A SIGTERM, SIGINT or SIGUSR1 asks the workers to save and leave; a second one ends them at once.

    Returns:
        The outcome of a finished job, as the worker wrote it.

    Raises:
        UserError: the workers refused the job.
        Stopped: they stopped for a signal, with their state saved.
        WorkersFailed: one of them died.
    """
    placement = place(launch, detect_machine())
    log_dir.mkdir(parents=True, exist_ok=True)
    (log_dir / STOP_FILE).unlink(missing_ok=True)
    environment = worker_environment(placement, log_dir, os.environ)
    exit_status = 0
    with _signals_ask_to_stop(log_dir / STOP_FILE):
        for command in _commands(module, job_file, placement, log_dir):
            exit_status = _run(command, environment, log_dir, on_poll)
            if not _port_was_taken(log_dir):
                break
            print("another program has the port where the ranks were to meet; another is tried", file=sys.stderr)
    return _read_outcome(log_dir, exit_status, placement)


def _run(command: list[str], environment: Mapping[str, str], log_dir: Path, on_poll: Callable[[], None]) -> int:
    """Runs the launcher to its end and returns its exit status."""
    for stale in (log_dir / OUTCOME_FILE, *log_dir.glob(LAUNCHER_LOGS)):
        stale.unlink(missing_ok=True)
    with open(log_dir / LAUNCHER_LOG, "wb") as log:
        # A session of its own: Ctrl-C in the terminal must reach the driver alone, which passes it on.
        with block_signals_in_children():
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        try:
            _wait(process, log_dir, on_poll)
        finally:
            _end(process)
    return process.returncode


def _wait(process: subprocess.Popen[bytes], log_dir: Path, on_poll: Callable[[], None]) -> None:
    """Until the launcher ends, or has not though a rank died a while ago."""
    look, give_up = time.monotonic() + LOOK_SECONDS, float("inf")
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
        if now > look:
            look = now + LOOK_SECONDS
            if give_up == float("inf") and _a_rank_died(log_dir):
                give_up = now + GRACE_SECONDS


def _a_rank_died(log_dir: Path) -> bool:
    return _outcome(log_dir)["status"] in ("failed", "refused") or bool(worker_deaths(log_dir))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Closes the workers' lifeline and makes sure that the launcher is gone."""
    assert process.stdin is not None
    process.stdin.close()
    for harder in (process.terminate, process.kill):
        try:
            process.wait(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            harder()
    process.wait()


def _port_was_taken(log_dir: Path) -> bool:
    """Whether the first node's torchrun found another program on the port where the ranks were to meet."""
    log = log_dir / "torchrun-0.log"
    text = log.read_text(errors="replace") if log.exists() else ""
    return "EADDRINUSE" in text


@contextmanager
def _signals_ask_to_stop(stop_file: Path) -> Iterator[None]:
    """While this lasts, a signal makes the stop file, and a second one interrupts the driver."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop_file.exists():
            raise KeyboardInterrupt
        stop_file.touch()
        print("stopping: the workers finish their step and save; once more ends them at once", file=sys.stderr)

    before = {number: signal.signal(number, on_signal) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------- how it ended


def _outcome(log_dir: Path) -> dict[str, Any]:
    path = log_dir / OUTCOME_FILE
    # NFS remembers for up to a minute that a file was not there, until this host changes the directory itself.
    with suppress(OSError):
        look = temporary_path(path)
        look.touch()
        look.unlink()
    outcome: dict[str, Any] = read_json(path) if path.exists() else {"status": "lost"}
    return outcome


def _read_outcome(log_dir: Path, exit_status: int, placement: Placement) -> dict[str, Any]:
    outcome = _outcome(log_dir)
    if outcome["status"] == "refused":
        raise UserError(**{part: outcome[part] for part in ("setting", "value", "rule", "remedy")})
    if outcome["status"] == "stopped" or (outcome["status"] == "done" and (log_dir / STOP_FILE).exists()):
        raise Stopped(f"workers stopped; logs in {log_dir}")
    if outcome["status"] != "done" or exit_status != 0:
        allocation = current_allocation()
        nodes = allocation.nodes if allocation is not None else ()
        raise WorkersFailed(explain_workers(log_dir, outcome, exit_status, placement.processes, nodes))
    return outcome

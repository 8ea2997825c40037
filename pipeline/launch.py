"""Starting worker processes on this machine: torchrun's command line, and the one call that runs it.

The driver imports no torch and never touches CUDA; it looks at the machine from outside. What passes between it and
the workers is files in the log directory and one pipe:

- ``outcome.json``: how the work ended, written by the first worker that knows;
- ``stop``: made by the driver when a signal asks it to stop; workers save and leave when they see it;
- standard input of every worker is a pipe that the driver holds open. When the driver dies, even by ``kill -9``,
  the pipe ends and so do the workers (see ``watchdog``).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from pipeline.artifact import read_json
from pipeline.config import Launch
from pipeline.errors import Stopped, UserError, WorkersFailed

OUTCOME_FILE = "outcome.json"
STOP_FILE = "stop"
LOG_DIR_VARIABLE = "PIPELINE_LOG_DIR"  # set for workers that have a driver
LAUNCHER_LOG = "torchrun.log"
POLL_SECONDS = 0.2
SHOWN_LOG_LINES = 15
MEMORY_HINT = "the system may have run out of memory"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


# ------------------------------------------------------------------------------------- where it runs


@dataclass(frozen=True)
class Machine:
    """What there is to run on."""

    cores: int
    gpus: int  # that this process may use and the installed torch can


@dataclass(frozen=True)
class Placement:
    """What will be used."""

    device: Literal["cpu", "cuda"]
    processes: int
    threads: int  # a process


@cache
def detect_machine() -> Machine:
    """Looks at this machine without importing torch."""
    gpus = _visible_gpus() if _torch_knows_cuda() else 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Machine(cores=cores or 1, gpus=gpus)


def _torch_knows_cuda() -> bool:
    spec = importlib.util.find_spec("torch")  # finds, does not import
    folders = (spec.submodule_search_locations or []) if spec else []
    return any(Path(folder, "lib").glob("libtorch_cuda*") for folder in folders)


def _visible_gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi") is None:
        return 0
    answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in answer.stdout.splitlines())


def place(launch: Launch, machine: Machine) -> Placement:
    """Device, processes and threads for these settings on this machine.

    Raises:
        UserError: GPUs are asked for that are not there.
    """
    device = launch.kind if launch.kind != "auto" else "cuda" if machine.gpus else "cpu"
    processes = launch.processes if launch.processes != "auto" else machine.gpus if device == "cuda" else 1
    if device == "cuda" and not 1 <= processes <= machine.gpus:
        raise UserError(
            setting="launch.processes" if machine.gpus else "launch.device",
            value=processes if machine.gpus else launch.device,
            rule=f"one process drives one GPU, and {machine.gpus} can be used here",
            remedy=f"Say launch.processes={machine.gpus}."
            if machine.gpus
            else "Go where there are GPUs, or say launch.device=cpu.",
        )
    threads = launch.threads if launch.threads != "auto" else max(1, machine.cores // processes)
    return Placement(device, processes, threads)


# ------------------------------------------------------------------------------------- command lines


def torchrun_command(module: str, job_file: Path, placement: Placement) -> list[str]:
    """The command that starts ``python -m module job_file`` on every rank of one node."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=0"]
    return [*launcher, f"--nproc-per-node={placement.processes}", "-m", module, str(job_file)]


def worker_environment(placement: Placement, log_dir: Path, inherited: Mapping[str, str]) -> dict[str, str]:
    """The workers' environment.

    This package and the interpreter's own tools (ninja) are found wherever the driver was started from.
    """
    package_root = str(Path(__file__).resolve().parent.parent)
    environment = {
        **inherited,
        "PYTHONPATH": _joined(package_root, inherited.get("PYTHONPATH")),
        "PATH": _joined(str(Path(sys.executable).parent), inherited.get("PATH")),
        "DS_ACCELERATOR": placement.device,
        "OMP_NUM_THREADS": str(placement.threads),
        LOG_DIR_VARIABLE: str(log_dir.absolute()),
    }
    if placement.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def _joined(first: str, rest: str | None) -> str:
    return os.pathsep.join(part for part in (first, rest) if part)


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
    for name in (OUTCOME_FILE, STOP_FILE):
        (log_dir / name).unlink(missing_ok=True)
    command = torchrun_command(module, job_file, placement)
    environment = worker_environment(placement, log_dir, os.environ)
    with open(log_dir / LAUNCHER_LOG, "wb") as log, _signals_ask_to_stop(log_dir / STOP_FILE):
        # A session of its own: Ctrl-C in the terminal must reach the driver alone, which passes it on.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            _wait(process, on_poll)
        finally:
            _end(process)
    return _read_outcome(log_dir, process.returncode, placement.processes)


def _wait(process: subprocess.Popen[bytes], on_poll: Callable[[], None]) -> None:
    while True:
        try:
            process.wait(timeout=POLL_SECONDS)
        except subprocess.TimeoutExpired:
            on_poll()
            continue
        return on_poll()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Closes the workers' lifeline and makes sure that the launcher is gone."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(timeout=5.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


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


def _read_outcome(log_dir: Path, exit_status: int, processes: int) -> dict[str, Any]:
    path = log_dir / OUTCOME_FILE
    outcome: dict[str, Any] = read_json(path) if path.exists() else {"status": "lost"}
    if outcome["status"] == "refused":
        raise UserError(**{part: outcome[part] for part in ("setting", "value", "rule", "remedy")})
    if outcome["status"] == "stopped" or (outcome["status"] == "done" and (log_dir / STOP_FILE).exists()):
        raise Stopped(f"workers stopped; logs in {log_dir}")
    if outcome["status"] != "done" or exit_status != 0:
        raise WorkersFailed(explain_failure(log_dir, outcome, exit_status, processes))
    return outcome


def explain_failure(log_dir: Path, outcome: Mapping[str, Any], exit_status: int, processes: int) -> str:
    """One message about the rank that failed first: which, how, its last lines, its log."""
    if outcome.get("named"):  # the launcher may have had to kill the others, who waited for this rank
        return (
            f"rank {outcome['rank']} of {processes}: {outcome['cause']}\nits log: {rank_log(log_dir, outcome['rank'])}"
        )
    deaths = worker_deaths((log_dir / LAUNCHER_LOG).read_text(errors="replace"))
    # The launcher ends the others with SIGTERM, and they may report a lost connection before that; a rank that
    # another signal took is the cause.
    killed = next(((rank, code) for rank, code in deaths if code < 0 and code != -signal.SIGTERM), None)
    if killed is not None:
        rank, cause = killed[0], _signal_cause(-killed[1])
    elif outcome["status"] == "failed":
        rank, cause = outcome["rank"], outcome["cause"]
    elif deaths:
        rank, cause = deaths[0][0], f"ended with exit status {deaths[0][1]}"
    else:
        return _message(f"the launcher ended with exit status {exit_status}", log_dir / LAUNCHER_LOG)
    return _message(f"rank {rank} of {processes}: {cause}", rank_log(log_dir, rank))


def worker_deaths(launcher_log: str) -> list[tuple[int, int]]:
    """(rank, exit code) of the workers whose failure torchrun reports; negative codes are signals."""
    found = re.findall(r"rank\s*:\s*(\d+)[^\n]*\n\s*exitcode\s*:\s*(-?\d+)", launcher_log)
    return [(int(rank), int(code)) for rank, code in found]


def rank_log(log_dir: Path, rank: int) -> Path:
    """Where a rank's standard output and error go."""
    return log_dir / f"rank-{rank}.log"


def _signal_cause(number: int) -> str:
    hint = f"; {MEMORY_HINT}" if number == signal.SIGKILL else ""
    return f"killed by {signal.Signals(number).name}{hint}"


def _message(what: str, log: Path) -> str:
    if not log.exists():
        log = log.with_name(LAUNCHER_LOG)
    last = log.read_text(errors="replace").splitlines()[-SHOWN_LOG_LINES:]
    return "\n".join([what, *(f"  | {line}" for line in last), f"the whole log: {log}"])

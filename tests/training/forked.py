"""Fast starts of ranks: a server process imports everything once and forks the ranks of every launch.

``ForkedRanks`` is the client in the tests, and ``python -m tests.training.forked`` is the server. Ranks run the code of
real workers in separate processes with real signal handlers. Only the launcher is left out.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from pipeline.artifacts.task import StageTask, task_to_json
from pipeline.files import write_json
from pipeline.launch.failure import rank_log
from pipeline.launch.ranks import ADDRESS_VARIABLE, RENDEZVOUS_VARIABLE
from pipeline.training.job import START_FILE

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 3000.0  # seconds for one launch
GRACE = 10.0  # see ``_child``


@dataclass
class Launch:
    """Running or finished ranks. Exit statuses are negative for signals."""

    server: subprocess.Popen[str]
    pids: list[int]
    statuses: dict[int, int] = field(default_factory=dict)

    def wait(self) -> dict[int, int]:
        """Waits until all ranks have ended, and returns their exit statuses by rank."""
        deadline = time.monotonic() + TIMEOUT
        while len(self.statuses) < len(self.pids):
            assert self.server.stdout is not None
            report = json.loads(self.server.stdout.readline())
            self.statuses[report["rank"]] = report["status"]
            assert time.monotonic() < deadline, "ranks hang"
        return self.statuses

    def kill(self, rank: int, number: signal.Signals) -> None:
        """Sends a signal to one rank if it is still running."""
        with suppress(ProcessLookupError):
            os.kill(self.pids[rank], number)


class ForkedRanks:
    """Starts the server and requests launches from it, one at a time."""

    def __init__(self, logs: Path) -> None:
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.training.forked"], cwd=ROOT, text=True, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(logs / "server.log", "w"),
        )  # fmt: skip

    def start(self, ranks: int, request: Mapping[str, Any]) -> Launch:
        """Forks ``ranks`` processes that run the request; see ``_child``."""
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps({**request, "ranks": ranks}) + "\n")
        self._server.stdin.flush()
        return Launch(self._server, json.loads(self._server.stdout.readline())["pids"])

    def work(self, task: StageTask, **request: Any) -> Launch:
        """Starts the workers of a task, as the launcher would."""
        logs = task.out / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        for name in ("outcome.json", "stop", START_FILE):
            (logs / name).unlink(missing_ok=True)
        write_json(logs / "task.json", task_to_json(task))
        return self.start(int(task.launch.processes), {"task_file": str(logs / "task.json"), **request})

    def run_plan(self, ranks: int, plan: list[dict[str, Any]], logs: Path) -> None:
        """Runs several tasks in one launch; see ``many_tasks``."""
        launch = self.start(ranks, {"plan": plan, "logs": str(logs)})
        statuses = launch.wait()
        tails = [rank_log(logs, rank).read_text()[-3000:] for rank, status in statuses.items() if status]
        assert not tails, tails

    def close(self) -> None:
        """Stops the server."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=60)


# ---------------------------------------------------------------------------------------- the server


def serve() -> None:
    """Forks the ranks of every request, and reports their exit statuses."""
    import pipeline.training.trainer  # noqa: F401  # takes seconds, once

    _measure_small_products()

    for line in sys.stdin:
        request = json.loads(line)
        rendezvous = _logs(request) / f"rendezvous-{uuid4().hex}.json"
        pids = [_fork(request, rank, rendezvous) for rank in range(request["ranks"])]
        print(json.dumps({"pids": pids}), flush=True)
        _reap(pids, request.get("grace", GRACE))


def _measure_small_products() -> None:
    """Makes ranks measure their peak on small matrices: in bfloat16, large ones take many seconds on some CPUs."""
    from pipeline.training import mfu

    measure = mfu.matrix_rate
    mfu.matrix_rate = lambda dtype, device, size=64, repeats=3: measure(dtype, device, min(size, 64), repeats)


def _reap(pids: list[int], grace: float) -> None:
    """Reports ranks as they end. After a failure, the others get SIGTERM and later SIGKILL, as under the launcher."""
    running, kill_time = set(pids), float("inf")
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            running.discard(pid)
            code = os.waitstatus_to_exitcode(status)
            print(json.dumps({"rank": pids.index(pid), "status": code}), flush=True)
            if code and kill_time == float("inf"):
                kill_time = time.monotonic() + grace
                _signal(running, signal.SIGTERM)
            continue
        if time.monotonic() > kill_time:
            _signal(running, signal.SIGKILL)
        time.sleep(0.005)


def _signal(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _logs(request: Mapping[str, Any]) -> Path:
    logs = Path(request["logs"]) if "logs" in request else Path(request["task_file"]).parent
    logs.mkdir(parents=True, exist_ok=True)
    return logs


def _fork(request: dict[str, Any], rank: int, rendezvous: Path) -> int:
    read_end, write_end = os.pipe()  # the child's standard input, closed when the server dies (see end_with_parent)
    pid = os.fork()
    if pid:
        os.close(read_end)
        return pid
    os.close(write_end)
    os.dup2(read_end, 0)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(request["ranks"]),
        "LOCAL_WORLD_SIZE": str(request["ranks"]), ADDRESS_VARIABLE: "127.0.0.1", RENDEZVOUS_VARIABLE: str(rendezvous),
    }  # fmt: skip
    status = 1
    try:
        status = _child(request, rank)
    except BaseException:  # noqa: BLE001  # a child must never return into the server's loop
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def _child(request: dict[str, Any], rank: int) -> int:
    """Runs a request on one rank.

    The request has either ``plan`` and ``logs``, or ``task_file`` and optionally ``die_at_file_event``, ``limits`` (of
    ``limited_rank``, or of all) and ``slow_checkpoints``: the seconds that the threads that write checkpoints sleep
    before they open a file. Any request may have ``grace``: seconds after one rank has failed until the others are
    killed.
    """
    from pipeline.launch.child import end_with_parent
    from pipeline.training import worker

    logs = _logs(request)
    with open(rank_log(logs, rank), "ab") as log:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    end_with_parent()
    if "plan" in request:
        from tests.training.many_tasks import run

        for entry in request["plan"]:
            run(entry)
        return 0
    limits = request.get("limits", {}) if rank == request.get("limited_rank", rank) else {}
    for name, limit in limits.items():
        import resource

        resource.setrlimit(getattr(resource, name), (limit, limit))
    if rank == 0 and "die_at_file_event" in request:
        sys.addaudithook(_dying_hook(request["die_at_file_event"]))
    if "slow_checkpoints" in request:
        sys.addaudithook(_sleeping_hook(request["slow_checkpoints"]))
    return worker.main(Path(request["task_file"]), logs)


def is_partial_checkpoint(path: str) -> bool:
    """Returns whether a path is, or is inside, a checkpoint that is still being written."""
    return "checkpoints" in path and ".partial" in path


def _dying_hook(last: int) -> Callable[[str, tuple[Any, ...]], None]:
    """Returns an audit hook that kills this process at the ``last``-th file event of checkpoints being written."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in ("open", "os.mkdir", "os.rename", "shutil.rmtree") and is_partial_checkpoint(str(arguments[0])):
            seen += 1
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


def _sleeping_hook(seconds: float) -> Callable[[str, tuple[Any, ...]], None]:
    """Returns an audit hook that delays the opening of files of checkpoints being written."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and is_partial_checkpoint(str(arguments[0])):
            assert threading.current_thread() is not threading.main_thread()
            time.sleep(seconds)

    return hook


if __name__ == "__main__":
    serve()

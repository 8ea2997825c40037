"""Ranks without the seconds of imports: one process imports everything and forks the ranks of every launch.

``ForkedRanks`` is the test's side; ``python -m tests.training.forked`` is the other. Ranks run what real workers
run, as processes of their own, with real signal handlers; only torchrun is left out.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.artifacts.task import StageTask, task_to_json
from pipeline.files import write_json
from pipeline.launch.failure import rank_log
from pipeline.training.job import START_FILE

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 600.0  # seconds for one launch
GRACE = 10.0  # seconds from the end of one rank to the end of all, as a launcher grants


@dataclass
class Launch:
    """Living or finished ranks; exit statuses are negative for signals."""

    server: subprocess.Popen[str]
    pids: list[int]
    statuses: dict[int, int] = field(default_factory=dict)

    def wait(self) -> dict[int, int]:
        """Until all ranks ended; when one fails the others are ended as torchrun does. Rank -> exit status."""
        deadline = time.monotonic() + PATIENCE
        while len(self.statuses) < len(self.pids):
            assert self.server.stdout is not None
            answer = json.loads(self.server.stdout.readline())
            self.statuses[answer["rank"]] = answer["status"]
            assert time.monotonic() < deadline, "ranks hang"
        return self.statuses

    def kill(self, rank: int, number: signal.Signals) -> None:
        """Sends a signal to one rank, if it still lives."""
        with suppress(ProcessLookupError):
            os.kill(self.pids[rank], number)


class ForkedRanks:
    """The server, started once; one launch at a time."""

    def __init__(self, logs: Path) -> None:
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.training.forked"], cwd=ROOT, text=True, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(logs / "server.log", "w"),
        )  # fmt: skip

    def start(self, ranks: int, request: Mapping[str, Any]) -> Launch:
        """Forks ``ranks`` processes that do what the request says; see ``_child``."""
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps({**request, "ranks": ranks}) + "\n")
        self._server.stdin.flush()
        return Launch(self._server, json.loads(self._server.stdout.readline())["pids"])

    def work(self, task: StageTask, **request: Any) -> Launch:
        """Starts a task's worker on its ranks, as torchrun would."""
        logs = task.out / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        for name in ("outcome.json", "stop", START_FILE):
            (logs / name).unlink(missing_ok=True)
        write_json(logs / "task.json", task_to_json(task))
        return self.start(int(task.launch.processes), {"task_file": str(logs / "task.json"), **request})

    def run_plan(self, ranks: int, plan: list[dict[str, Any]], logs: Path) -> None:
        """Runs many tasks in one launch; see ``many_tasks``."""
        launch = self.start(ranks, {"plan": plan, "logs": str(logs)})
        statuses = launch.wait()
        tails = [rank_log(logs, rank).read_text()[-3000:] for rank, status in statuses.items() if status]
        assert not tails, tails

    def close(self) -> None:
        """Ends the server."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=10)


# ---------------------------------------------------------------------------------------- the server


def serve() -> None:
    """Forks the ranks of one request after another, and reports every end."""
    import pipeline.training.trainer  # noqa: F401  # seconds of imports, once

    for line in sys.stdin:
        request = json.loads(line)
        port = _free_port()
        pids = [_fork(request, rank, port) for rank in range(request["ranks"])]
        print(json.dumps({"pids": pids}), flush=True)
        _reap(pids)


def _reap(pids: list[int]) -> None:
    """Reports ranks as they end; after a failure the others get SIGTERM, and later SIGKILL."""
    left, last_resort = set(pids), float("inf")
    while left:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            left.discard(pid)
            code = os.waitstatus_to_exitcode(status)
            print(json.dumps({"rank": pids.index(pid), "status": code}), flush=True)
            if code and last_resort == float("inf"):
                last_resort = time.monotonic() + GRACE
                _signal(left, signal.SIGTERM)
            continue
        if time.monotonic() > last_resort:
            _signal(left, signal.SIGKILL)
        time.sleep(0.005)


def _signal(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _free_port() -> int:
    """Below those that the kernel gives to outgoing connections, which might take it before the ranks do."""
    while True:
        port = random.randrange(20000, 32000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def _fork(request: dict[str, Any], rank: int, port: int) -> int:
    lifeline, held = os.pipe()  # the child's standard input; the server's death closes it
    pid = os.fork()
    if pid:
        os.close(lifeline)
        return pid
    os.close(held)
    os.dup2(lifeline, 0)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(request["ranks"]),
        "LOCAL_WORLD_SIZE": str(request["ranks"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    status = 1
    try:
        status = _child(request, rank)
    except BaseException:  # noqa: BLE001  # whatever it was, a child must not return into the server's loop
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def _child(request: dict[str, Any], rank: int) -> int:
    """What one rank does: ``plan`` with ``logs``, or ``task_file`` with perhaps ``die_at_file_event`` or ``limits``."""
    from pipeline.launch.child import end_with_parent, redirect_output
    from pipeline.training import worker

    logs = Path(request["logs"]) if "logs" in request else Path(request["task_file"]).parent
    logs.mkdir(parents=True, exist_ok=True)
    redirect_output(rank_log(logs, rank), append=True)
    end_with_parent()
    if "plan" in request:
        from tests.training.many_tasks import run

        for entry in request["plan"]:
            run(entry)
        return 0
    for name, limit in request.get("limits", {}).items():
        import resource

        resource.setrlimit(getattr(resource, name), (limit, limit))
    if rank == 0 and "die_at_file_event" in request:
        sys.addaudithook(_dying_hook(request["die_at_file_event"]))
    return worker.main(Path(request["task_file"]), logs)


def is_half_written(path: str) -> bool:
    """Whether it is a checkpoint without its name yet, or lies in one."""
    return "checkpoints" in path and ".partial" in path


def _dying_hook(last: int) -> Callable[[str, tuple[Any, ...]], None]:
    """Kills this process, as ``kill -9`` does, at the ``last``-th thing done to a checkpoint that is being written."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in ("open", "os.mkdir", "os.rename", "shutil.rmtree") and is_half_written(str(arguments[0])):
            seen += 1
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


if __name__ == "__main__":
    serve()

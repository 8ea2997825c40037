"""One process at a time holds a lock, and a lock is taken over when its holder dies.

The holder's death is detected from its process, from its Slurm job, or from missing heartbeats.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.artifacts import lock
from pipeline.artifacts.lock import FREE, Holder, Lock, LockLost
from pipeline.launch import slurm
from pipeline.launch.slurm import JobInfo, SlurmUnreachable

ME = Holder.current(os.environ)
FAR = Holder(host="far", process=7, started=99, job=12, restarts=0)


def _held_by(holder: Holder, directory: Path) -> Lock:
    """Returns a lock that another process holds."""
    directory.mkdir()
    (directory / holder.name).touch()
    return Lock(directory, ME)


def _job(state: str, restarts: int = 0) -> JobInfo:
    return JobInfo(12, state, "None", restarts, batch=True, may_requeue=True, run_time="", time_limit="")


HOLDER = """
import os, sys, time
from pathlib import Path
from pipeline.artifacts.lock import Holder, Lock
with Lock(Path(sys.argv[1]), Holder.current(os.environ)).held(print):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def _process(directory: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, str(directory), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_second_builder_waits_and_reports_for_whom(tmp_path: Path) -> None:
    process = _process(tmp_path / "lock", 5.0)
    messages: list[str] = []
    with Lock(tmp_path / "lock", ME).held(messages.append):
        assert process.wait() == 0
    assert messages == [f"process {process.pid} on {os.uname().nodename} is building it"]
    assert [path.name for path in (tmp_path / "lock").iterdir()] == [FREE]


def test_lock_of_a_killed_process_is_taken_over_immediately(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "LOCK_POLL_SECONDS", 600.0)
    process = _process(tmp_path / "lock", 60)
    process.kill()
    process.wait()
    messages: list[str] = []
    started = time.monotonic()
    with Lock(tmp_path / "lock", ME).held(messages.append):
        assert time.monotonic() - started < 60.0
    assert messages == [f"process {process.pid} on {os.uname().nodename} died while building it, taking over"]


def test_process_with_a_reused_id_is_not_the_holder() -> None:
    assert replace(ME, started=ME.started + 1).is_dead(ME)
    assert not ME.is_dead(ME)


def test_name_identifies_the_holder() -> None:
    for holder in (ME, FAR, replace(FAR, host="a,b=c+d")):
        assert Holder.parse(holder.name) == holder
    assert str(FAR) == "process 7 on far in Slurm job 12"


@pytest.mark.parametrize(
    "info, dead",
    [
        (None, True),
        (_job("RUNNING"), False),
        (_job("SUSPENDED"), False),
        (_job("COMPLETED"), True),
        (_job("NODE_FAIL"), True),
        (_job("PENDING", restarts=1), True),
        (_job("RUNNING", restarts=1), True),
    ],
)
def test_holder_on_another_host_is_alive_if_slurm_says_so(
    monkeypatch: pytest.MonkeyPatch, info: JobInfo | None, dead: bool
) -> None:
    monkeypatch.setattr(slurm, "job_info", lambda job: info)
    assert FAR.is_dead(ME) == dead


def test_requeued_job_takes_over_its_own_lock() -> None:
    assert FAR.is_dead(replace(ME, job=12, restarts=1))


def test_heartbeats_decide_if_slurm_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(job: int) -> JobInfo | None:
        raise SlurmUnreachable("down")

    monkeypatch.setattr(slurm, "job_info", unreachable)
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 4.0)
    monkeypatch.setattr(lock, "LOCK_POLL_SECONDS", 0.1)
    held = _held_by(FAR, tmp_path / "lock")
    stopped = threading.Event()

    def send_heartbeats() -> None:
        deadline = time.monotonic() + 6.0
        while time.monotonic() < deadline:
            os.utime(tmp_path / "lock" / FAR.name)
            time.sleep(0.1)
        stopped.set()

    threading.Thread(target=send_heartbeats).start()
    with held.held(lambda holder: None):
        assert stopped.is_set(), "a holder that sends heartbeats is alive"


def test_holder_sends_heartbeats(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.05)
    with Lock(tmp_path / "lock", ME).held(lambda holder: None):
        os.utime(tmp_path / "lock" / ME.name, (1, 1))
        deadline = time.monotonic() + 60.0
        while (tmp_path / "lock" / ME.name).stat().st_mtime == 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_losing_the_lock_is_detected(tmp_path: Path) -> None:
    mine = Lock(tmp_path / "lock", ME)
    with mine.held(lambda holder: None):
        mine.confirm()
        os.rename(tmp_path / "lock" / ME.name, tmp_path / "lock" / FAR.name)
        with pytest.raises(LockLost, match="process 7 on far"):
            mine.confirm()
    assert [path.name for path in (tmp_path / "lock").iterdir()] == [FAR.name], "a lost lock is not released"


CROWD = """
import os, sys, time
from pathlib import Path
from pipeline.artifacts.lock import Holder, Lock
import pipeline.artifacts.lock
pipeline.artifacts.lock.LOCK_POLL_SECONDS = 0.01
folder = Path(sys.argv[1])
for turn in range(10):
    with Lock(folder / "lock", Holder.current(os.environ)).held(lambda holder: None):
        (folder / "inside").mkdir()  # fails if another process is inside
        time.sleep(0.005)
        (folder / "inside").rmdir()
"""


@pytest.fixture
def crowd(tmp_path: Path) -> Callable[[], list[int]]:
    """Runs four processes that each acquire the lock ten times."""

    def run() -> list[int]:
        command = [sys.executable, "-c", CROWD, str(tmp_path)]
        return [process.wait() for process in [subprocess.Popen(command) for _ in range(4)]]

    return run


def test_one_of_many_processes_holds_the_lock_at_a_time(crowd: Callable[[], list[int]]) -> None:
    assert crowd() == [0] * 4


def test_one_of_many_processes_takes_over_from_a_dead_holder(crowd: Callable[[], list[int]], tmp_path: Path) -> None:
    _held_by(replace(ME, process=2**22 + 1), tmp_path / "lock")
    assert crowd() == [0] * 4

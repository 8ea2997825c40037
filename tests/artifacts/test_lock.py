"""One builder at a time, and no lock outlives its holder: told by process, by Slurm job, or by silence."""

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
    """A lock that somebody else holds."""
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


def test_a_second_builder_waits_and_says_for_whom(tmp_path: Path) -> None:
    process = _process(tmp_path / "lock", 5.0)
    said: list[str] = []
    with Lock(tmp_path / "lock", ME).held(said.append):
        assert process.wait() == 0
    assert said == [f"process {process.pid} on {os.uname().nodename} is building it"]
    assert [path.name for path in (tmp_path / "lock").iterdir()] == [FREE]


def test_a_lock_left_by_a_killed_process_is_taken_over_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "LOCK_POLL_SECONDS", 600.0)
    process = _process(tmp_path / "lock", 60)
    process.kill()
    process.wait()
    said: list[str] = []
    started = time.monotonic()
    with Lock(tmp_path / "lock", ME).held(said.append):
        assert time.monotonic() - started < 60.0
    assert said == [f"process {process.pid} on {os.uname().nodename} died building it; taken over"]


def test_a_reused_process_id_is_not_the_holder(tmp_path: Path) -> None:
    assert replace(ME, started=ME.started + 1).is_dead(ME)
    assert not ME.is_dead(ME)


def test_a_name_says_who_holds_it() -> None:
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
def test_slurm_says_whether_a_holder_on_another_host_lives(
    monkeypatch: pytest.MonkeyPatch, info: JobInfo | None, dead: bool
) -> None:
    monkeypatch.setattr(slurm, "job_info", lambda job: info)
    assert FAR.is_dead(ME) == dead


def test_a_requeued_job_takes_over_from_itself() -> None:
    assert FAR.is_dead(replace(ME, job=12, restarts=1))


def test_without_an_answer_only_silence_tells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_answer(job: int) -> JobInfo | None:
        raise SlurmUnreachable("down")

    monkeypatch.setattr(slurm, "job_info", no_answer)
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 4.0)
    monkeypatch.setattr(lock, "LOCK_POLL_SECONDS", 0.1)
    held = _held_by(FAR, tmp_path / "lock")
    beating = threading.Event()

    def beat() -> None:
        deadline = time.monotonic() + 6.0
        while time.monotonic() < deadline:
            os.utime(tmp_path / "lock" / FAR.name)
            time.sleep(0.1)
        beating.set()

    threading.Thread(target=beat).start()
    with held.held(lambda holder: None):
        assert beating.is_set(), "a holder that beats is alive"


def test_a_living_holder_renews_its_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    with Lock(tmp_path / "lock", ME).held(lambda holder: None):
        os.utime(tmp_path / "lock" / ME.name, (1, 1))
        deadline = time.monotonic() + 60.0
        while (tmp_path / "lock" / ME.name).stat().st_mtime == 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_who_lost_the_lock_learns_it(tmp_path: Path) -> None:
    mine = Lock(tmp_path / "lock", ME)
    with mine.held(lambda holder: None):
        mine.confirm()
        os.rename(tmp_path / "lock" / ME.name, tmp_path / "lock" / FAR.name)
        with pytest.raises(LockLost, match="process 7 on far"):
            mine.confirm()
    assert [path.name for path in (tmp_path / "lock").iterdir()] == [FAR.name], "it is not given back twice"


CROWD = """
import os, sys, time
from pathlib import Path
from pipeline.artifacts.lock import Holder, Lock
import pipeline.artifacts.lock
pipeline.artifacts.lock.LOCK_POLL_SECONDS = 0.01
folder = Path(sys.argv[1])
for turn in range(10):
    with Lock(folder / "lock", Holder.current(os.environ)).held(lambda holder: None):
        (folder / "inside").mkdir()  # fails when another is inside
        time.sleep(0.005)
        (folder / "inside").rmdir()
"""


@pytest.fixture
def crowd(tmp_path: Path) -> Callable[[], list[int]]:
    """Four processes that all want the lock ten times."""

    def run() -> list[int]:
        command = [sys.executable, "-c", CROWD, str(tmp_path)]
        return [process.wait() for process in [subprocess.Popen(command) for _ in range(4)]]

    return run


def test_in_a_crowd_one_at_a_time_holds_it(crowd: Callable[[], list[int]]) -> None:
    assert crowd() == [0] * 4


def test_a_crowd_takes_over_from_the_dead_once(crowd: Callable[[], list[int]], tmp_path: Path) -> None:
    _held_by(replace(ME, process=2**22 + 1), tmp_path / "lock")
    assert crowd() == [0] * 4

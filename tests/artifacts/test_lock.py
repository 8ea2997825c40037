"""One process at a time holds a lock, and a lock is taken over when its holder dies.

The holder's death is detected from its process, from its Slurm job, or from missing heartbeats.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts import lock
from pipeline.artifacts.lock import FREE, Holder, Lock, LockLost
from pipeline.artifacts.store import Artifact
from pipeline.errors import UserError
from pipeline.launch import slurm
from pipeline.launch.slurm import JobInfo, SlurmUnreachable

ME = Holder.current(os.environ)
FAR = Holder(host="far", process=7, started=99, job=12, restarts=0, cluster="alps")


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


def test_a_wait_can_be_ended(tmp_path: Path) -> None:
    messages: list[str] = []

    def end() -> None:
        raise KeyboardInterrupt

    other = replace(FAR, job=0, cluster="")
    held = _held_by(other, tmp_path / "lock")
    with pytest.raises(KeyboardInterrupt), held.held(messages.append, end):
        pass
    assert len(messages) == 1 and (tmp_path / "lock" / other.name).exists()


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
    for holder in (ME, FAR, replace(FAR, host="a,b=c+d"), replace(FAR, cluster="")):
        assert Holder.parse(holder.name) == holder
    assert Holder.parse("far,process=7,started=99,job=12,restarts=0") == replace(FAR, cluster="")
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
    monkeypatch.setattr(slurm, "cluster_name", lambda: "alps")
    monkeypatch.setattr(slurm, "job_info", lambda job: info)
    assert FAR.is_dead(ME) == dead


@pytest.mark.parametrize("holder, here", [(FAR, "tundra"), (replace(FAR, cluster=""), "alps")])
def test_job_of_another_or_an_unknown_cluster_is_not_dead_because_this_slurm_does_not_know_it(
    monkeypatch: pytest.MonkeyPatch, holder: Holder, here: str
) -> None:
    monkeypatch.setattr(slurm, "cluster_name", lambda: here)
    monkeypatch.setattr(slurm, "job_info", lambda job: None)
    assert not holder.is_dead(ME)
    assert not holder.is_dead(replace(ME, job=12, restarts=1, cluster=here))


def test_holder_records_the_cluster_of_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "cluster_name", lambda: "asked")
    job = {"SLURM_JOB_ID": "12", "SLURM_CLUSTER_NAME": "alps"}
    assert Holder.current(job).cluster == "alps"
    assert Holder.current({"SLURM_JOB_ID": "12"}).cluster == "asked"
    assert Holder.current({}).cluster == ""


def test_requeued_job_takes_over_its_own_lock() -> None:
    assert FAR.is_dead(replace(ME, job=12, restarts=1, cluster="alps"))


def test_process_of_another_user_that_proc_hides_is_not_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(process: int, signal: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    other = replace(ME, process=2**22 + 1)  # has no directory in /proc, as if it was hidden
    assert other.is_dead(ME)
    monkeypatch.setattr(os, "kill", deny)
    assert not other.is_dead(ME) and not other.is_running_here(ME)


def test_heartbeats_decide_if_slurm_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(job: int) -> JobInfo | None:
        raise SlurmUnreachable("down")

    monkeypatch.setattr(slurm, "job_info", unreachable)
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 2.0)
    monkeypatch.setattr(lock, "LOCK_POLL_SECONDS", 0.1)
    held = _held_by(FAR, tmp_path / "lock")
    stopped = threading.Event()

    def send_heartbeats() -> None:
        deadline = time.monotonic() + 3.0
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


class Clock:
    """A substitute for ``time`` that only sleeping advances; ``beat`` is called after every sleep."""

    def __init__(self, beat: Callable[[float], None] = lambda now: None) -> None:
        self.now, self._beat = 0.0, beat

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self._beat(self.now)


@pytest.fixture
def ended_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm reports that the job of ``FAR`` has ended."""
    monkeypatch.setattr(slurm, "cluster_name", lambda: "alps")
    monkeypatch.setattr(slurm, "job_info", lambda job: _job("NODE_FAIL"))


@pytest.mark.usefixtures("ended_job")
@pytest.mark.parametrize("beats_until", [0.0, 1000.0])
def test_lock_is_never_taken_over_while_its_heartbeat_moves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, beats_until: float
) -> None:
    held = _held_by(FAR, tmp_path / "lock")

    def beat(now: float) -> None:
        if now <= beats_until:
            os.utime(tmp_path / "lock" / FAR.name, (now, now))

    clock, messages = Clock(beat), list[str]()
    monkeypatch.setattr(lock, "time", clock)
    with held.held(messages.append) as taken_over:
        assert taken_over, "the holder may still have files open"
    assert beats_until + lock.QUIET_SECONDS <= clock.now <= beats_until + lock.QUIET_SECONDS + 5
    assert [message.removeprefix(str(FAR)) for message in messages] == [
        " is building it",
        " died while building it, taking over",
    ]


def test_lock_is_not_taken_over_while_its_file_cannot_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    held, clock = _held_by(replace(FAR, job=0), tmp_path / "lock"), Clock()

    def fail_for_a_while(descriptor: int) -> os.stat_result:
        if clock.now < 1000:
            raise OSError(116, "Stale file handle")
        return fstat(descriptor)

    fstat = os.fstat
    monkeypatch.setattr(lock, "time", clock)
    monkeypatch.setattr(os, "fstat", fail_for_a_while)
    with held.held(lambda holder: None):
        assert clock.now > 1000 + lock.SILENCE_SECONDS


def test_heartbeats_survive_errors_of_the_file_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    renewed, calls, utime = threading.Event(), list[int](), os.utime

    def fail_twice(path: Path, *times: tuple[float, float]) -> None:
        calls.append(1)
        if len(calls) <= 2:
            raise OSError(116, "Stale file handle")
        utime(path, *times)
        renewed.set()

    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.001)
    monkeypatch.setattr(os, "utime", fail_twice)
    with Lock(tmp_path / "lock", ME).held(lambda holder: None):
        assert renewed.wait(60.0)


def test_empty_lock_directory_is_repaired_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lock").mkdir()
    with Lock(tmp_path / "lock", ME).held(lambda holder: None):
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    # Purged while a process waits for it.
    held, messages = _held_by(replace(ME, process=os.getppid(), started=0), tmp_path / "purged"), list[str]()
    monkeypatch.setattr(lock, "time", Clock(lambda now: [path.unlink() for path in (tmp_path / "purged").iterdir()]))
    with held.held(messages.append) as taken_over:
        assert not taken_over
    assert len(messages) == 2 and "purge" in messages[1]
    assert [path.name for path in (tmp_path / "purged").iterdir()] == [FREE]


def _die_while_creating(directory: Path) -> None:
    """Lets a process be killed just before its rename creates the lock."""
    if (child := os.fork()) == 0:
        os.rename = lambda old, new: os.kill(os.getpid(), signal.SIGKILL)
        Lock(directory, ME)._create()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_what_a_process_killed_while_creating_the_lock_left_is_removed_by_the_next_holder(tmp_path: Path) -> None:
    _die_while_creating(tmp_path / "lock")
    _die_while_creating(tmp_path / "other")
    assert len(list(tmp_path.glob(".lock.*/free"))) == 1
    with Lock(tmp_path / "lock", ME).held(pytest.fail):
        pass
    (other,) = tmp_path.glob(".other.*")
    assert sorted(tmp_path.iterdir()) == [other, tmp_path / "lock"]


@pytest.mark.parametrize("owner, moment", [(Path, "touch"), (os, "rename")])
def test_process_that_creates_the_lock_while_its_holder_removes_leftovers_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, moment: str
) -> None:
    original = getattr(owner, moment)
    first = Lock(tmp_path / "lock", replace(ME, started=ME.started + 1))

    def act_after_another_holder(*arguments: Any) -> None:
        monkeypatch.setattr(owner, moment, original)
        with first.held(pytest.fail):
            pass
        original(*arguments)

    monkeypatch.setattr(owner, moment, act_after_another_holder)
    with Lock(tmp_path / "lock", ME).held(pytest.fail):
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_foreign_files_in_the_lock_directory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "time", Clock())
    (tmp_path / "lock").mkdir()
    (tmp_path / "lock" / "notes.txt").touch()
    with (
        pytest.raises(UserError, match=r"notes\.txt.*Remove it"),
        Lock(tmp_path / "lock", ME).held(lambda holder: None),
    ):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="must be a directory"), Lock(tmp_path / "file", ME).held(lambda holder: None):
        pass


def test_first_builder_cannot_write_into_what_was_committed_after_a_takeover(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path, "load", "k")
    artifact.partial.mkdir(parents=True)
    with open(artifact.partial / "weights", "w") as still_open:
        still_open.write("first")
        still_open.flush()
        artifact.mark_shared()
        artifact.commit({})
        still_open.write(" and later")
    assert (artifact.path / "weights").read_text() == "first"
    assert artifact.damage() == []
    assert [path.name for path in artifact.path.parent.iterdir()] == ["k"]


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

"""Launching workers: commands, environment, outcomes, signals, and what happens when a process dies.

The workers run a small script rather than training, so that starting them is fast.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import Stopped, UserError
from pipeline.files import write_json
from pipeline.launch import workers
from pipeline.launch.failure import LAUNCHER_LOG, deaths_file, rank_log, worker_deaths
from pipeline.launch.ranks import LOG_DIR_VARIABLE, Ranks
from pipeline.launch.slurm import Allocation
from pipeline.launch.workers import (
    OUTCOME_FILE,
    STOP_FILE,
    STOP_SIGNALS,
    Placement,
    WorkersFailed,
    run_workers,
    srun_command,
)
from tests.plain_settings import cpu_launch
from tests.processes import is_gone

ONE = Placement("cpu", 1, 1)
TWO = cpu_launch(processes=2)
ROOT = Path(__file__).resolve().parents[2]

# ------------------------------------------------------------------------- commands and environment


def test_srun_starts_one_launcher_per_node():
    two = Allocation(12, ("n1", "n2"), cpus=8, outside=False)
    command = srun_command("some.module", Path("/x/job.json"), Placement("cuda", 4, 2, 2), two, Path("/x/100%"))
    node = command.index("pipeline.launch.ranks")
    srun, arguments = command[: node - 2], command[node + 1 :]
    assert srun[0] == "srun"
    assert {"--nodes=2", "--ntasks=2", "--kill-on-bad-exit=1", "--overlap", "--export=ALL", "--cpus-per-task=8"} <= set(
        srun
    )
    assert "--output=/x/100%%/launcher-%n.log" in srun
    assert arguments == ["4", "2", "some.module", "/x/job.json"]


def test_the_driver_imports_no_torch():
    check = "import pipeline.stages.pretrain, pipeline.stages.sft, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0


# ----------------------------------------------------------------------------------------- processes

WORKER = """
import json, os, signal, sys, time
from pathlib import Path
from pipeline.files import write_json
from pipeline.launch.child import end_with_parent

logs, rank = Path(os.environ["PIPELINE_LOG_DIR"]), int(os.environ["RANK"])
end_with_parent()
write_json(logs / f"pid-{rank}", os.getpid())
print("rank", rank, "of", os.environ["WORLD_SIZE"], flush=True)

def outcome(**values):
    write_json(logs / "outcome.json", values)

def sleep_until(ready):
    deadline = time.monotonic() + 60
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.05)

def all_started():
    return all((logs / f"pid-{other}").exists() for other in range(int(os.environ["WORLD_SIZE"])))

what = json.loads(Path(sys.argv[1]).read_text())
sleep_until(all_started)
if what == "signalled":  # the signal reaches all processes of a job while they are starting
    os.kill(os.getpid(), signal.SIGUSR1)
    from pipeline.training.worker import StopRequest
    if StopRequest(logs / "stop")() and rank == 0:
        outcome(status="stopped")
if what == "done" and rank == 0:
    outcome(status="done", answer=42)
if what == "refuse" and rank == 0:
    outcome(status="refused", setting="pretrain.x", value="1", rule="it must be 2", remedy="Set pretrain.x=2.")
if what == "die on node 1" and rank == 3:  # the signal reaches the launcher of a node as well
    os.kill(os.getppid(), signal.SIGUSR1)
if what == "die" and rank == 1 or what == "die on node 1" and rank == 3:
    print("last output", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if what == "raise" and rank == 1:
    outcome(status="failed", rank=1, cause="ValueError: too much")
    raise ValueError("too much")
if what == "stop":
    sleep_until((logs / "stop").exists)
    if rank == 0:
        outcome(status="stopped")
if what == "stuck":
    from pipeline.launch.child import write_stacks_on_signal
    write_stacks_on_signal()
    write_json(logs / f"ready-{rank}", True)
    def never_returns():
        time.sleep(60)
    never_returns()
if what in ("sleep", "die", "raise", "die on node 1"):
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict]:
    """Runs the workers above with one instruction, with logs in ``tmp_path/logs``."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "small_worker.py").write_text(WORKER)

    def start(what: str) -> dict:
        (tmp_path / "job.json").write_text(json.dumps(what))
        return run_workers("small_worker", tmp_path / "job.json", TWO, tmp_path / "logs")

    return start


def test_outcome_of_finished_workers_is_returned(run: Callable[[str], dict], tmp_path: Path):
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    assert run("done") == {"status": "done", "answer": 42}
    assert (tmp_path / "logs" / "rank-1.log").read_text() == "rank 1 of 2\n"
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers


def test_ranks_that_do_not_end_log_their_stacks_before_they_are_killed(tmp_path: Path):
    """Also one that is stopped, which handles no other signal."""
    (tmp_path / "small_worker.py").write_text(WORKER)
    write_json(tmp_path / "job.json", "stuck")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}", LOG_DIR_VARIABLE: str(tmp_path)}
    ranks = Ranks("small_worker", tmp_path / "job.json", environment, 2)
    deadline = time.monotonic() + 30
    while not all((tmp_path / f"ready-{rank}").exists() for rank in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(json.loads((tmp_path / "pid-1").read_text()), signal.SIGSTOP)
    ranks.kill()
    assert ranks.wait(10) == -signal.SIGKILL
    assert ranks.stdin is not None
    ranks.stdin.close()
    for rank in range(2):
        log = rank_log(tmp_path, rank).read_text()
        assert "most recent call first" in log and "in never_returns" in log


def test_user_error_of_the_workers_is_raised_in_the_driver(run: Callable[[str], dict]):
    with pytest.raises(UserError, match="pretrain.x = 1: it must be 2. Set pretrain.x=2."):
        run("refuse")


@pytest.mark.parametrize("how, cause", [("die", "killed by SIGKILL"), ("raise", "ValueError: too much")])
def test_message_names_the_dead_rank_its_last_output_and_its_log(
    run: Callable[[str], dict], tmp_path: Path, how: str, cause: str
):
    with pytest.raises(WorkersFailed) as error:
        run(how)
    message = str(error.value)
    assert f"rank 1 of 2: {cause}" in message
    assert str(tmp_path / "logs" / "rank-1.log") in message
    assert "last output" in message if how == "die" else "Traceback" in message


def test_signal_to_workers_that_are_still_starting_stops_them_gracefully(run: Callable[[str], dict]):
    with pytest.raises(Stopped):
        run("signalled")
    assert signal.SIGUSR1 not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_ranks_of_the_second_node_follow_those_of_the_first(run: Callable[[str], dict], tmp_path: Path):
    """The process that srun starts on the second of two nodes, with two ranks per node; the first node is missing."""
    logs = tmp_path / "logs"
    logs.mkdir()
    for rank in (0, 1):
        write_json(logs / f"pid-{rank}", 0)
    (tmp_path / "job.json").write_text('"die on node 1"')
    command = [sys.executable, "-m", "pipeline.launch.ranks", "2", "2", "small_worker", str(tmp_path / "job.json")]
    place = {"SLURM_NODEID": "1", LOG_DIR_VARIABLE: str(logs), "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    node = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **place}, stdin=subprocess.PIPE)
    assert node.wait(timeout=60) == 128 + signal.SIGKILL
    assert [(death.rank, death.code) for death in worker_deaths(logs)] == [(3, -signal.SIGKILL), (2, -signal.SIGTERM)]
    assert (logs / "rank-2.log").read_text() == "rank 2 of 4\n"


DRIVER = "from tests.launch.test_workers import *; run_workers('small_worker', Path('job.json'), TWO, Path('logs'))"


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], subprocess.Popen]:
    """Starts a driver in its own process, and waits until both workers run."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    (tmp_path / "small_worker.py").write_text(WORKER)

    def start(what: str) -> subprocess.Popen:
        (tmp_path / "job.json").write_text(json.dumps(what))
        process = subprocess.Popen([sys.executable, "-c", DRIVER], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: all((tmp_path / "logs" / f"pid-{rank}").exists() for rank in (0, 1)), seconds=60)
        return process

    return start


def wait_until(ready: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def test_workers_exit_soon_after_the_driver_is_killed(driver: Callable[[str], subprocess.Popen], tmp_path: Path):
    process = driver("sleep")
    ranks = [int((tmp_path / "logs" / f"pid-{rank}").read_text()) for rank in (0, 1)]
    process.kill()
    wait_until(lambda: all(is_gone(pid) for pid in ranks), seconds=10)


def test_signal_to_the_driver_stops_the_workers_gracefully(driver: Callable[[str], subprocess.Popen]):
    assert set(STOP_SIGNALS) == {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
    process = driver("stop")
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=30)
    assert Stopped.__name__ in errors and "stopping: the workers finish their step" in errors


def test_second_signal_ends_workers_that_do_not_stop(driver: Callable[[str], subprocess.Popen], tmp_path: Path):
    process = driver("sleep")
    process.send_signal(signal.SIGTERM)
    wait_until((tmp_path / "logs" / "stop").exists, seconds=5)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=15)
    assert "KeyboardInterrupt" in errors
    ranks = [int((tmp_path / "logs" / f"pid-{rank}").read_text()) for rank in (0, 1)]
    wait_until(lambda: all(is_gone(pid) for pid in ranks), seconds=5)


def test_stop_requested_while_the_last_worker_finishes_is_honored(tmp_path: Path):
    (tmp_path / OUTCOME_FILE).write_text('{"status": "done"}')
    (tmp_path / STOP_FILE).touch()
    with pytest.raises(Stopped):
        workers._read_outcome(tmp_path, 0, ONE)


def test_explained_failure_is_reported_even_if_the_launcher_killed_other_ranks(tmp_path: Path):
    outcome = {"status": "failed", "rank": 0, "cause": "the disk is full", "explained": True}
    (tmp_path / OUTCOME_FILE).write_text(json.dumps(outcome))
    deaths_file(tmp_path, 0).write_text('{"time": 1.0, "rank": 1, "code": -9}\n')
    with pytest.raises(WorkersFailed, match="^rank 0 of 2: the disk is full\nlog: .*rank-0.log$"):
        workers._read_outcome(tmp_path, 1, Placement("cpu", 2, 1))


def test_workers_without_an_outcome_have_failed(tmp_path: Path):
    (tmp_path / LAUNCHER_LOG).write_text("no such module\n")
    with pytest.raises(WorkersFailed, match="no such module"):
        workers._read_outcome(tmp_path, 1, ONE)

"""The launcher with workers that do next to nothing: what comes back, and who dies with whom."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import Launch
from pipeline.errors import Stopped, UserError
from pipeline.launch import machine
from pipeline.launch import workers as launch
from pipeline.launch.machine import Machine
from pipeline.launch.workers import (
    Placement,
    WorkersFailed,
    place,
    run_workers,
    torchrun_command,
    worker_environment,
)
from tests.plain_settings import cpu_launch
from tests.processes import is_gone

ONE = Placement("cpu", 1, 1)
TWO = cpu_launch(processes=2)
ROOT = Path(__file__).resolve().parents[2]

# ------------------------------------------------------------------------------------ pure functions


def settings(**changes) -> Launch:
    return Launch(
        **{"device": "auto", "processes": "auto", "nodes": 1, "threads": "auto", "utilization": 0.4, **changes}
    )


@pytest.mark.parametrize(
    "changes, machine, expected",
    [
        ({}, Machine(cores=8, gpus=0), Placement("cpu", 1, 8)),
        ({}, Machine(cores=16, gpus=4), Placement("cuda", 4, 4)),
        ({"device": "cpu"}, Machine(cores=16, gpus=4), Placement("cpu", 1, 16)),
        ({"device": "h100_80gb"}, Machine(cores=16, gpus=4), Placement("cuda", 4, 4)),
        ({"processes": 2}, Machine(cores=2, gpus=0), Placement("cpu", 2, 1)),
        ({"processes": 4, "threads": 3}, Machine(cores=2, gpus=0), Placement("cpu", 4, 3)),
        ({"processes": 2}, Machine(cores=16, gpus=4), Placement("cuda", 2, 8)),
    ],
)
def test_placement_follows_settings_and_machine(changes: dict, machine: Machine, expected: Placement):
    assert place(settings(**changes), machine) == expected


@pytest.mark.parametrize(
    "changes, gpus, setting",
    [
        ({"device": "cuda"}, 0, "launch.device"),
        ({"device": "a100_40gb"}, 0, "launch.device"),
        ({"processes": 3}, 2, "launch.processes"),
    ],
)
def test_more_gpus_than_there_are_are_refused(changes: dict, gpus: int, setting: str):
    with pytest.raises(UserError) as error:
        place(settings(**changes), Machine(cores=4, gpus=gpus))
    assert error.value.setting == setting


@pytest.mark.parametrize("visible, gpus", [("", 0), ("-1", 0), ("0", 1), ("2,5", 2)])
def test_gpus_hidden_from_this_process_do_not_count(monkeypatch: pytest.MonkeyPatch, visible: str, gpus: int):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine._visible_gpus([]) == gpus


def test_the_command_starts_one_node_without_restarts():
    command = torchrun_command("some.module", Path("/x/job.json"), Placement("cpu", 2, 1))
    assert command[0] == sys.executable
    assert command[-3:] == ["-m", "some.module", "/x/job.json"]
    assert {"--standalone", "--max-restarts=0", "--nproc-per-node=2"} <= set(command)


def test_workers_find_this_package_and_the_interpreters_tools():
    inherited = {"PATH": "/usr/bin", "PYTHONPATH": "/mine"}
    environment = worker_environment(Placement("cpu", 2, 3), Path("logs"), inherited)
    assert environment["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    assert environment["PYTHONPATH"].split(":") == [str(ROOT), "/mine"]
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["DS_ACCELERATOR"] == "cpu" and environment["CUDA_VISIBLE_DEVICES"] == ""


def test_the_driver_imports_no_torch():
    check = "import pipeline.stages.pretrain, pipeline.stages.sft, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0


# --------------------------------------------------------------------------------------- real workers

WORKER = """
import json, os, signal, sys, time
from pathlib import Path
from pipeline.artifacts.store import write_json
from pipeline.launch.child import end_with_parent

logs, rank = Path(os.environ["PIPELINE_LOG_DIR"]), int(os.environ["RANK"])
end_with_parent()
log = os.open(logs / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(log, 1), os.dup2(log, 2)
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
if what == "signalled":  # as a signal to all of a job's processes while they start
    for process in (os.getppid(), os.getpid()):
        os.kill(process, signal.SIGUSR1)
    from pipeline.training.worker import StopRequest
    if StopRequest(logs / "stop")() and rank == 0:
        outcome(status="stopped")
if what == "done" and rank == 0:
    outcome(status="done", answer=42)
if what == "refuse" and rank == 0:
    outcome(status="refused", setting="pretrain.x", value="1", rule="it must be 2", remedy="Say 2.")
if what == "die" and rank == 1:
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if what == "raise" and rank == 1:
    outcome(status="failed", rank=1, cause="ValueError: too much")
    raise ValueError("too much")
if what == "stop":
    sleep_until((logs / "stop").exists)
    if rank == 0:
        outcome(status="stopped")
if what in ("sleep", "die", "raise"):
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict]:
    """Runs the workers above with one instruction, logs in ``tmp_path/logs``."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "small_worker.py").write_text(WORKER)

    def start(what: str) -> dict:
        (tmp_path / "job.json").write_text(json.dumps(what))
        return run_workers("small_worker", tmp_path / "job.json", TWO, tmp_path / "logs")

    return start


def test_the_outcome_of_finished_workers_comes_back(run: Callable[[str], dict], tmp_path: Path):
    handlers = [signal.getsignal(number) for number in launch.STOP_SIGNALS]
    assert run("done") == {"status": "done", "answer": 42}
    assert (tmp_path / "logs" / "rank-1.log").read_text() == "rank 1 of 2\n"
    assert [signal.getsignal(number) for number in launch.STOP_SIGNALS] == handlers


def test_a_refusal_of_the_workers_is_the_drivers(run: Callable[[str], dict]):
    with pytest.raises(UserError, match="pretrain.x = 1: it must be 2. Say 2."):
        run("refuse")


@pytest.mark.parametrize("how, cause", [("die", "killed by SIGKILL"), ("raise", "ValueError: too much")])
def test_a_dead_rank_is_named_with_its_last_lines_and_its_log(
    run: Callable[[str], dict], tmp_path: Path, how: str, cause: str
):
    with pytest.raises(WorkersFailed) as error:
        run(how)
    message = str(error.value)
    assert f"rank 1 of 2: {cause}" in message
    assert str(tmp_path / "logs" / "rank-1.log") in message
    assert "last words" in message if how == "die" else "Traceback" in message


def test_a_signal_to_workers_that_are_still_starting_stops_them_in_order(run: Callable[[str], dict]):
    with pytest.raises(Stopped):
        run("signalled")
    assert signal.SIGUSR1 not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


ANSWERS = """
import os, signal
os.kill(os.getpid(), signal.SIGUSR1)
print(os.environ["PET_NODE_RANK"], signal.sigpending())
"""


def test_on_a_node_the_launcher_knows_its_number_and_signals_are_held_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_NODEID", "3")
    command = [sys.executable, "-m", "pipeline.launch.child", sys.executable, "-c", ANSWERS]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.split()[0] == "3" and "SIGUSR1" in answer.stdout


DRIVER = "from tests.launch.test_launch import *; run_workers('small_worker', Path('job.json'), TWO, Path('logs'))"


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], subprocess.Popen]:
    """A driver in a process of its own, once both its workers run."""
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
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_workers_and_launcher_are_gone_soon_after_the_driver_was_killed(
    driver: Callable[[str], subprocess.Popen], tmp_path: Path
):
    process = driver("sleep")
    workers = [int((tmp_path / "logs" / f"pid-{rank}").read_text()) for rank in (0, 1)]
    torchrun = int(Path(f"/proc/{workers[0]}/stat").read_text().rpartition(")")[2].split()[1])
    process.kill()
    wait_until(lambda: all(is_gone(pid) for pid in (*workers, torchrun)), seconds=10)


def test_a_signal_to_the_driver_lets_the_workers_stop_in_order(driver: Callable[[str], subprocess.Popen]):
    assert set(launch.STOP_SIGNALS) == {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
    process = driver("stop")
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=30)
    assert Stopped.__name__ in errors and "stopping: the workers finish their step" in errors


def test_a_second_signal_ends_workers_that_do_not_stop(driver: Callable[[str], subprocess.Popen], tmp_path: Path):
    process = driver("sleep")
    process.send_signal(signal.SIGTERM)
    wait_until((tmp_path / "logs" / "stop").exists, seconds=5)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=15)
    assert "KeyboardInterrupt" in errors
    workers = [int((tmp_path / "logs" / f"pid-{rank}").read_text()) for rank in (0, 1)]
    wait_until(lambda: all(is_gone(pid) for pid in workers), seconds=5)


def test_a_stop_asked_for_while_the_last_worker_finished_is_not_lost(tmp_path: Path):
    (tmp_path / launch.OUTCOME_FILE).write_text('{"status": "done"}')
    (tmp_path / launch.STOP_FILE).touch()
    with pytest.raises(Stopped):
        launch._read_outcome(tmp_path, 0, ONE)


def test_a_named_failure_is_the_cause_whoever_the_launcher_had_to_kill(tmp_path: Path):
    outcome = {"status": "failed", "rank": 0, "cause": "the disk is full", "explained": True}
    (tmp_path / launch.OUTCOME_FILE).write_text(json.dumps(outcome))
    (tmp_path / launch.LAUNCHER_LOG).write_text("rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 7)\n")
    with pytest.raises(WorkersFailed, match="^rank 0 of 2: the disk is full\nits log: .*rank-0.log$"):
        launch._read_outcome(tmp_path, 1, Placement("cpu", 2, 1))


def test_workers_that_leave_no_outcome_have_failed(tmp_path: Path):
    (tmp_path / launch.LAUNCHER_LOG).write_text("no such module\n")
    with pytest.raises(WorkersFailed, match="no such module"):
        launch._read_outcome(tmp_path, 1, ONE)

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_REQUEST, Diverged, TrainingFailure, UserError
from pipeline.files import read_json
from pipeline.launch.workers import OUTCOME_FILE, STOP_FILE
from pipeline.training import worker


@pytest.fixture(autouse=True)
def rank_zero(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sets the environment of a rank, and restores the signal handlers afterwards."""
    monkeypatch.setenv("RANK", "0")
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_requests_a_stop_without_ending_the_process(tmp_path: Path, number: signal.Signals):
    stop = worker.StopRequest(tmp_path / STOP_FILE)
    assert not stop()
    os.kill(os.getpid(), number)
    assert stop()


def test_the_drivers_stop_file_requests_a_stop(tmp_path: Path):
    stop = worker.StopRequest(tmp_path / STOP_FILE)
    (tmp_path / STOP_FILE).touch()
    assert stop()


def run_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body) -> tuple[int, dict]:
    monkeypatch.setattr(worker, "_run", lambda task_file, log_dir, stop: body())
    return worker.main(tmp_path / "task.json", tmp_path), read_json(tmp_path / OUTCOME_FILE)


@pytest.mark.parametrize("status", ["done", "stopped"])
def test_done_and_stopped_exit_successfully(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: str):
    assert run_with(monkeypatch, tmp_path, lambda: {"status": status}) == (EXIT_DONE, {"status": status})


def test_a_user_error_is_recorded_with_its_four_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def refuse():
        raise UserError(setting="a.b", value=Path("x"), rule="r", remedy="m")

    exit_status, outcome = run_with(monkeypatch, tmp_path, refuse)
    assert exit_status == EXIT_REQUEST
    assert outcome == {"status": "refused", "setting": "a.b", "value": "x", "rule": "r", "remedy": "m"}


def test_a_bug_is_recorded_and_raised_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def fail():
        raise ZeroDivisionError("one over nothing")

    with pytest.raises(ZeroDivisionError):
        run_with(monkeypatch, tmp_path, fail)
    cause = "ZeroDivisionError: one over nothing"
    assert read_json(tmp_path / OUTCOME_FILE) == {"status": "failed", "rank": 0, "cause": cause}


@pytest.mark.parametrize("kind", [TrainingFailure, Diverged])
def test_a_training_failure_is_recorded_without_a_traceback(
    kind: type[TrainingFailure], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def fail():
        raise kind("the disk is full; free some space")

    exit_status, outcome = run_with(monkeypatch, tmp_path, fail)
    assert exit_status == EXIT_FAILED
    explained = {"cause": "the disk is full; free some space", "explained": True, "diverged": kind is Diverged}
    assert outcome == {"status": "failed", "rank": 0, **explained}


def test_the_first_recorded_outcome_wins(tmp_path: Path):
    worker.write_outcome(tmp_path, {"status": "refused"})
    worker.write_outcome(tmp_path, {"status": "failed"})
    assert read_json(tmp_path / OUTCOME_FILE) == {"status": "refused"}
    assert [path.name for path in tmp_path.iterdir()] == [OUTCOME_FILE]

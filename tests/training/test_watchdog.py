"""A rank that is stuck ends the job, is named, and the training resumes from its last checkpoint."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from torch import distributed

from pipeline.artifacts.task import StageTask
from pipeline.errors import EXIT_DONE, EXIT_FAILED
from pipeline.files import read_json
from pipeline.launch.failure import alive_file, explain_workers, rank_log
from pipeline.training import watchdog
from pipeline.training.job import START_FILE
from pipeline.training.watchdog import Phase, Watch, collective_of
from tests.plain_settings import cpu_launch
from tests.training.forked import ForkedRanks
from tests.training.small import logged, train_settings

pytestmark = pytest.mark.xdist_group("distributed")

TIMEOUT = 3  # seconds
STEPS = 40


def poll(ready: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_stopped_rank_ends_the_job_and_is_named_and_the_training_resumes(
    make_task: Callable[..., StageTask], forked_ranks: ForkedRanks
) -> None:
    made = make_task(train_settings(steps=STEPS, checkpoint_every_steps=5, evaluate_at=[]), 2)
    task = replace(made, launch=cpu_launch(2).model_copy(update={"collective_timeout_seconds": TIMEOUT}))
    logs = task.out / "logs"
    ranks = forked_ranks.work(task)
    poll(lambda: any(task.out.glob("checkpoints/step-0000000?")))
    ranks.kill(1, signal.SIGSTOP)
    stopped = time.monotonic()
    poll((logs / "outcome.json").exists, TIMEOUT + 10.0)
    assert TIMEOUT - 1.0 < time.monotonic() - stopped < TIMEOUT + 5.0
    ranks.kill(1, signal.SIGKILL)
    assert ranks.wait() == {0: EXIT_FAILED, 1: -signal.SIGKILL}
    said = explain_workers(logs, read_json(logs / "outcome.json"), 1, 2, ())
    assert said.startswith("rank 1 of 2: stuck: no heartbeat for ")
    assert f"log: {rank_log(logs, 1)}" in said
    assert " while rank 0 is " in said and ".py:" in said
    assert "The stack of this rank:" in rank_log(logs, 0).read_text() and "trainer.py" in rank_log(logs, 0).read_text()
    assert set(forked_ranks.work(task).wait().values()) == {EXIT_DONE}
    assert read_json(logs / START_FILE)["resumed_after"] >= 5
    assert logged(task, "step") == list(range(1, STEPS + 1))


# ----------------------------------------------------------------------------------------- its parts


def of(number: int, is_alone: bool = False) -> Phase:
    return Phase(number, f"in part {number}", is_alone)


@pytest.mark.parametrize(
    "other, silent, unmoved, expected",
    [
        (of(5), 5.0, 5.0, None),
        (of(5), 11.0, 11.0, "no heartbeat for 11 seconds; it was last in part 5"),
        (of(7), 11.0, 11.0, "no heartbeat for 11 seconds; it was last in part 7"),
        (of(4), 1.0, 50.0, "still in part 4 after 20 seconds"),  # this rank has waited for 20 seconds
        (of(4), 1.0, 9.0, None),
        (of(4, is_alone=True), 1.0, 50.0, None),  # such as rank 0 while it saves
        (of(5), 1.0, 50.0, None),  # a slow step: no rank is ahead
        (of(6), 1.0, 50.0, None),
    ],
)
def test_a_rank_is_stuck_if_it_is_silent_or_stays_behind(
    other: Phase, silent: float, unmoved: float, expected: str | None, tmp_path: Path
) -> None:
    ours = Watch(0, 2, 10.0, tmp_path)
    ours._position, ours._entered = of(5), 100.0
    assert ours._fault(other, silent, unmoved, now=120.0) == expected


def test_each_rank_watches_the_next_one(tmp_path: Path) -> None:
    first, second, third = (Watch(rank, 3, 10.0, tmp_path) for rank in range(3))
    start = time.monotonic()
    assert first.look(start) is None  # before the second rank has started
    third.publish()  # once, and never again
    found: list[str | None] = []
    for second_of_test in range(13):
        for ours in (first, second):
            ours.enter(f"computing {second_of_test}")
            ours.publish()
        now = start + second_of_test
        assert first.look(now) is None
        found.append(second.look(now))
    assert found[:11] == [None] * 11
    assert found[11] == "no heartbeat for 11 seconds; it was last starting"
    assert json.loads(alive_file(tmp_path, 0).read_text())[1:] == [13, "computing 12", False]


def test_a_rank_that_makes_progress_within_a_part_is_not_stuck(tmp_path: Path) -> None:
    ours, other = (Watch(rank, 2, 10.0, tmp_path) for rank in range(2))
    for each in (other, ours, ours):
        each.enter("scoring")
    start = time.monotonic()
    for second in range(40):
        other.describe(f"scoring, after {min(second, 20)} sequences")
        other.publish()
        found = ours.look(start + second)
        assert (found is not None) == (second > 30)
    assert found == "still scoring, after 20 sequences after 19 seconds"


def test_a_rank_that_was_stopped_itself_does_not_blame_the_next_one(tmp_path: Path) -> None:
    """As when Slurm suspends a job: all ranks are silent for as long."""
    ours, other = (Watch(rank, 2, 10.0, tmp_path) for rank in range(2))
    other.publish()
    start = time.monotonic()
    assert ours.look(start) is None and ours.look(start + 500.0) is None
    assert all(ours.look(start + 500.0 + second) is None for second in range(10))
    assert "no heartbeat" in (ours.look(start + 511.0) or "")


def test_ranks_meet_however_long_one_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog.distributed, "barrier", lambda: None)
    store = distributed.HashStore()
    first, last = (Watch(rank, 2, 0.01, tmp_path, store) for rank in range(2))
    for _ in range(2):
        waiting = threading.Thread(target=first.wait_for_all, args=("computing",))
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive()
        last.wait_for_all("computing")
        waiting.join(5.0)
        assert not waiting.is_alive()


def test_the_collective_on_a_stack_is_named_with_the_line_that_called_it() -> None:
    def frame(module: str, file: str, line: int, name: str, back: object) -> Mock:
        code = Mock(co_filename=file, co_name=name)
        return Mock(f_globals={"__name__": module}, f_code=code, f_lineno=line, f_back=back)

    ours = frame("pipeline.training.loop", "/x/loop.py", 7, "_step", None)
    inner = frame("torch.distributed.distributed_c10d", "/t.py", 1, "all_reduce", frame("w", "w", 1, "wrapper", ours))
    assert collective_of(inner) == "all_reduce at loop.py:7"
    assert collective_of(ours) == "_step at loop.py:7"
    assert collective_of(None) is None

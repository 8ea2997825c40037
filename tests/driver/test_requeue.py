"""A batch job that comes back again and again must have something to show for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.__main__ import compose_jobs
from pipeline.artifacts.store import Artifact
from pipeline.config import Settings
from pipeline.driver import requeue
from pipeline.driver.graph import Node
from pipeline.driver.requeue import counted_restarts, requeue_this_job
from pipeline.errors import NoProgress
from pipeline.launch import slurm
from pipeline.launch.slurm import JobInfo, SlurmUnreachable


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    overrides = ["+experiment=quickstart", f"output_dir={tmp_path}", "slurm.max_requeues_without_progress=2"]
    return compose_jobs(overrides, False, None)[0].settings


@pytest.fixture
def node(settings: Settings, tmp_path: Path) -> Node:
    artifact = Artifact(tmp_path / "artifacts", "pretrain", "k")
    (artifact.partial / "checkpoints").mkdir(parents=True)
    return Node("pretrain", "pretrain", settings.pretrain, {}, 0, artifact)


def _begin(monkeypatch: pytest.MonkeyPatch, settings: Settings, node: Node, restarts: int) -> None:
    """The job begins and is cut off."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    with pytest.raises(KeyboardInterrupt), counted_restarts(settings, [node]):
        raise KeyboardInterrupt


def test_restarts_in_vain_are_bounded(monkeypatch: pytest.MonkeyPatch, settings: Settings, node: Node) -> None:
    for restarts in range(3):
        _begin(monkeypatch, settings, node, restarts)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    with pytest.raises(NoProgress, match="3 times in a row"), counted_restarts(settings, [node]):
        raise AssertionError("it must not begin")


def test_a_checkpoint_in_between_begins_the_count_anew(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, node: Node
) -> None:
    for restarts in range(10):
        _begin(monkeypatch, settings, node, restarts)
        if restarts % 2 == 1:
            (node.artifact.partial / "checkpoints" / f"step-{restarts:08d}").mkdir()


def test_a_half_written_checkpoint_is_no_progress(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, node: Node
) -> None:
    for restarts in range(3):
        _begin(monkeypatch, settings, node, restarts)
        (node.artifact.partial / "checkpoints" / f"step-{restarts:08d}.partial").mkdir()
    with pytest.raises(NoProgress):
        _begin(monkeypatch, settings, node, 3)


@pytest.mark.parametrize("file", [".model.kept", "checkpoint/progress.json"])
def test_what_grows_is_progress_and_what_is_written_again_is_none(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, node: Node, file: str
) -> None:
    path = node.artifact.partial / file
    path.parent.mkdir(exist_ok=True)
    for restarts in range(10):
        path.write_text("one more\n" * (restarts // 2))
        _begin(monkeypatch, settings, node, restarts)
    path.write_text(path.read_text())
    _begin(monkeypatch, settings, node, 10)
    with pytest.raises(NoProgress):
        _begin(monkeypatch, settings, node, 11)


def test_outside_a_batch_job_nothing_is_counted(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, node: Node, tmp_path: Path
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with counted_restarts(settings, [node]):
        pass
    assert not (tmp_path / "quickstart").exists()
    assert requeue_this_job() is None


@pytest.mark.parametrize(
    "state, reason, batch, may_requeue, requeued",
    [
        ("RUNNING", "None", True, True, [12]),
        ("COMPLETING", "TimeLimit", True, True, [12]),  # the warning was too short
        ("COMPLETING", "None", True, True, []),  # scancel's SIGTERM looks like a preemption's
        ("CANCELLED", "None", True, True, []),
        ("RUNNING", "None", False, True, []),  # somebody's terminal
        ("RUNNING", "None", True, False, []),  # --no-requeue
    ],
)
def test_only_a_running_batch_job_that_may_is_requeued(
    monkeypatch: pytest.MonkeyPatch, state: str, reason: str, batch: bool, may_requeue: bool, requeued: list[int]
) -> None:
    info = JobInfo(12, state, reason, 0, batch=batch, may_requeue=may_requeue, run_time="", time_limit="")
    asked: list[int] = []
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setattr(slurm, "job_info", lambda job: info)
    monkeypatch.setattr(slurm, "requeue", asked.append)
    assert (requeue_this_job() is not None) == bool(requeued)
    assert asked == requeued


def test_when_slurm_does_not_answer_the_user_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(job: int) -> JobInfo:
        raise SlurmUnreachable("no controller")

    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setattr(requeue.slurm, "job_info", silent)
    told = requeue_this_job()
    assert told is not None and "submit its script again" in told

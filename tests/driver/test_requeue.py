"""Requeued batch jobs must make progress between restarts."""

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


def _start_and_interrupt(monkeypatch: pytest.MonkeyPatch, settings: Settings, node: Node, restarts: int) -> None:
    """Start the job and interrupt it."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    with pytest.raises(KeyboardInterrupt), counted_restarts(settings, [node]):
        raise KeyboardInterrupt


def test_restarts_without_progress_are_limited(monkeypatch: pytest.MonkeyPatch, settings: Settings, node: Node) -> None:
    for restarts in range(3):
        _start_and_interrupt(monkeypatch, settings, node, restarts)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    with pytest.raises(NoProgress, match="3 times in a row"), counted_restarts(settings, [node]):
        raise AssertionError("the job must not start")


def test_a_new_checkpoint_resets_the_count(monkeypatch: pytest.MonkeyPatch, settings: Settings, node: Node) -> None:
    for restarts in range(10):
        _start_and_interrupt(monkeypatch, settings, node, restarts)
        if restarts % 2 == 1:
            (node.artifact.partial / "checkpoints" / f"step-{restarts:08d}").mkdir()


def test_an_incomplete_checkpoint_is_not_progress(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, node: Node
) -> None:
    for restarts in range(3):
        _start_and_interrupt(monkeypatch, settings, node, restarts)
        (node.artifact.partial / "checkpoints" / f"step-{restarts:08d}.partial").mkdir()
    with pytest.raises(NoProgress):
        _start_and_interrupt(monkeypatch, settings, node, 3)


@pytest.mark.parametrize("file", [".model.kept", "checkpoint/progress.json"])
def test_a_growing_file_is_progress_but_rewriting_it_is_not(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, node: Node, file: str
) -> None:
    path = node.artifact.partial / file
    path.parent.mkdir(exist_ok=True)
    for restarts in range(10):
        path.write_text("one more\n" * (restarts // 2))
        _start_and_interrupt(monkeypatch, settings, node, restarts)
    path.write_text(path.read_text())
    _start_and_interrupt(monkeypatch, settings, node, 10)
    with pytest.raises(NoProgress):
        _start_and_interrupt(monkeypatch, settings, node, 11)


def test_restarts_are_not_counted_outside_a_batch_job(
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
        ("COMPLETING", "TimeLimit", True, True, [12]),  # the signal came too late to save
        ("COMPLETING", "None", True, True, []),  # cancelled: the SIGTERM of scancel looks like that of a preemption
        ("CANCELLED", "None", True, True, []),
        ("RUNNING", "None", False, True, []),  # an interactive job
        ("RUNNING", "None", True, False, []),  # --no-requeue
    ],
)
def test_only_interrupted_batch_jobs_that_may_be_requeued_are(
    monkeypatch: pytest.MonkeyPatch, state: str, reason: str, batch: bool, may_requeue: bool, requeued: list[int]
) -> None:
    info = JobInfo(12, state, reason, 0, batch=batch, may_requeue=may_requeue, run_time="", time_limit="")
    asked: list[int] = []
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setattr(slurm, "job_info", lambda job: info)
    monkeypatch.setattr(slurm, "requeue", lambda info: asked.append(info.job))
    assert (requeue_this_job() is not None) == bool(requeued)
    assert asked == requeued


def test_the_user_is_told_what_to_do_if_slurm_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(job: int) -> JobInfo:
        raise SlurmUnreachable("no controller")

    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setattr(requeue.slurm, "job_info", silent)
    message = requeue_this_job()
    assert message is not None and "submit its script again" in message

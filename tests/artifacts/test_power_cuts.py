"""Small files that a later run relies on: they are on disk before the next step, and may be unreadable later."""

from __future__ import annotations

import json
import os
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.artifacts.store import ATTEMPTS_FILE, Artifact, begin_attempt, finish_attempts
from pipeline.artifacts.task import StageTask
from pipeline.command import execute_batch_job
from pipeline.config.data import SPLITS
from pipeline.data.blocks import BlockWriter
from pipeline.data.dataset import HELD_OUT_FILE, TokenizeCheckpoint
from pipeline.driver import submit
from pipeline.errors import UserError, WorkersFailed
from pipeline.files import read_json, read_record, report_once, seal, write_json
from pipeline.launch import workers
from pipeline.tracking import read_metrics
from pipeline.training import job
from pipeline.training.job import CHECKPOINTS, TRAINING_FILE, TRAINING_SEAL, last_logged, run_training
from tests.training.small import train_settings

# What may be left of a JSON file: nothing, a part, zeros, another file's bytes, and another structure.
DAMAGED = [b"", b'{"key": ', bytes(64), b"\xff\xfe\x00", b"[" * 100_000, b"3", b"[3]", b'{"files": 3}', b"null", b'"x"']


@pytest.fixture(autouse=True)
def _forget_reported_lines() -> None:
    report_once.cache_clear()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


# -------------------------------------------------------------------------------------------- writing


def test_json_file_and_its_rename_are_on_disk_when_writing_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        place = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        assert place.is_dir() or json.loads(place.read_text()) == {"a": 1}, "the content precedes the flush"
        events.append(("fsync", "directory" if place == tmp_path else "content"))
        fsync(descriptor)

    def note_replace(source: Any, target: Any) -> None:
        events.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_json(tmp_path / "state.json", {"a": 1})
    assert events == [("fsync", "content"), ("rename", "state.json"), ("fsync", "directory")]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_failed_write_keeps_the_old_file_and_leaves_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    write_json(tmp_path / "state.json", {"a": 1})

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "state.json", {"a": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
    assert read_json(tmp_path / "state.json") == {"a": 1}


# -------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("content", DAMAGED)
def test_unreadable_record_counts_as_absent_and_is_reported_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    for _ in range(3):
        assert read_record(path, lambda value: value["files"]["a"]) is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and str(path) in lines[0] and "counts as absent" in lines[0]


def test_absent_record_is_not_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read_record(tmp_path / "none.json", lambda value: True) is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", DAMAGED)
def test_artifact_with_an_unreadable_manifest_is_not_complete(tmp_path: Path, content: bytes) -> None:
    artifact = Artifact(tmp_path, "load", "k")
    _write(artifact.path / "manifest.json", content)
    assert not artifact.is_complete()


@pytest.mark.parametrize("content", [*DAMAGED, b'[{"started": 1.0}]', b'[{"started": "x", "seconds": null}]'])
def test_unreadable_attempts_are_not_counted(tmp_path: Path, content: bytes) -> None:
    _write(tmp_path / ATTEMPTS_FILE, content)
    assert finish_attempts(tmp_path, begin_attempt(tmp_path))[0] == 1


@pytest.mark.parametrize("content", [*DAMAGED, b'{"pretrain": 3}', b'{"pretrain": {"job": "x"}}'])
def test_unreadable_list_of_jobs_counts_as_empty(tmp_path: Path, content: bytes) -> None:
    run: Any = SimpleNamespace(output_dir=str(tmp_path), name="run")
    _write(submit.slurm_dir(run) / submit.JOBS_FILE, content)
    assert submit.submitted_jobs(run) == {}


@pytest.mark.parametrize("content", DAMAGED)
def test_unreadable_outcome_counts_as_a_lost_worker(tmp_path: Path, content: bytes) -> None:
    _write(tmp_path / workers.OUTCOME_FILE, content)
    assert workers.load_outcome(tmp_path) == {"status": "lost"}


@pytest.mark.parametrize("content", DAMAGED)
def test_unreadable_file_of_a_batch_job_is_refused(tmp_path: Path, content: bytes) -> None:
    _write(tmp_path / "load.json", content)
    console: Any = None
    with pytest.raises(UserError, match="Submit the run again"):
        execute_batch_job(tmp_path / "load.json", console)


@pytest.mark.parametrize("damaged", ["progress.json", "hashes.uint64"])
@pytest.mark.parametrize("content", [b"", bytes(7)])
def test_tokenizing_restarts_from_an_unreadable_checkpoint(tmp_path: Path, damaged: str, content: bytes) -> None:
    for split in SPLITS:
        with BlockWriter(tmp_path, split, 4):
            pass
    (tmp_path / HELD_OUT_FILE).touch()
    TokenizeCheckpoint(tmp_path, SPLITS).save({"blocks": {"train": 1}}, array("Q", [1, 2, 3]))
    kept = TokenizeCheckpoint(tmp_path, SPLITS)
    assert kept.state is not None and list(kept.hashes) == [1, 2, 3]
    (tmp_path / "checkpoint" / damaged).write_bytes(content)
    restarted = TokenizeCheckpoint(tmp_path, SPLITS)
    assert restarted.state is None and list(restarted.hashes) == []


# -------------------------------------------------------------------------------------------- metrics

LINES = '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n'


@pytest.mark.parametrize("tail", ["\0" * 40, "\0" * 40 + "\n", '{"step": 3, "lo' + "\0" * 20 + "\n", "7\n"])
def test_zeros_at_the_end_of_the_metrics_are_skipped_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tail: str
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(LINES + tail)
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    assert last_logged(path, "loss") == {"step": 2, "loss": 2.0}
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_half_a_line_at_the_end_of_the_metrics_is_normal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text(LINES + '{"step": 3, "lo')
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------- training.json


@pytest.fixture
def task(tmp_path: Path) -> StageTask:
    """A training stage whose partial directory has a checkpoint."""
    (tmp_path / CHECKPOINTS).mkdir()
    substitute: Any = SimpleNamespace(out=tmp_path, name="pretrain", settings=train_settings())
    return substitute  # type: ignore[no-any-return]


def _export(task: StageTask) -> None:
    (task.out / "model.safetensors").write_text("weights")
    write_json(task.out / TRAINING_FILE, {"steps": 3})


@pytest.mark.parametrize("content", [*DAMAGED, b'{"steps": 1}'])
def test_training_is_exported_again_if_its_result_is_unreadable_or_without_weights(
    task: StageTask, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    _write(task.out / TRAINING_FILE, content)
    monkeypatch.setattr(job, "_run_workers", _export)
    assert run_training(task) == {"steps": 3}
    assert not (task.out / CHECKPOINTS).exists()


@pytest.mark.parametrize("damaged", [None, "model.safetensors", TRAINING_FILE])
def test_finished_training_is_only_exported_again_if_a_file_is_damaged(
    task: StageTask, monkeypatch: pytest.MonkeyPatch, damaged: str | None
) -> None:
    exported: list[StageTask] = []

    def export(task: StageTask) -> None:
        exported.append(task)
        _export(task)
        seal(task.out / TRAINING_SEAL, [task.out / "model.safetensors", task.out / TRAINING_FILE])

    export(task)
    monkeypatch.setattr(job, "_run_workers", export)
    if damaged is not None:
        content = bytearray((task.out / damaged).read_bytes())
        content[content.index(b"3") if b"3" in content else 0] ^= 1
        (task.out / damaged).write_bytes(content)
    assert run_training(task) == {"steps": 3}
    assert len(exported) == (1 if damaged is None else 2)


@pytest.mark.parametrize("content", DAMAGED)
def test_checkpoints_are_kept_if_the_result_cannot_be_read_back(
    task: StageTask, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    def export_badly(task: StageTask) -> None:
        _export(task)
        (task.out / TRAINING_FILE).write_bytes(content)

    monkeypatch.setattr(job, "_run_workers", export_badly)
    with pytest.raises(WorkersFailed, match="repeat the same command"):
        run_training(task)
    assert (task.out / CHECKPOINTS).exists()

"""What is committed is complete, replacing it leaves no gap, and damage is found."""

from __future__ import annotations

import io
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from pipeline.artifacts import store
from pipeline.artifacts.store import MANIFEST, Artifact
from pipeline.driver.graph import STAGES
from pipeline.driver.verify import verify
from pipeline.errors import DamagedArtifacts, WorkersFailed
from pipeline.files import exchange, read_json, write_json
from tests.driver.finished_run import extract_finished_run


def _fill(artifact: Artifact, **files: str) -> Artifact:
    artifact.partial.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (artifact.partial / name).write_text(content)
    return artifact


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    """A complete artifact with one file."""
    built = _fill(Artifact(tmp_path, "load", "k"), weights="old")
    built.commit({})
    return built


def _beside(artifact: Artifact) -> set[str]:
    return {path.name for path in artifact.path.parent.iterdir()}


# --------------------------------------------------------------------------------------------- commit


def test_every_stage_declares_files_that_the_artifacts_of_a_finished_run_contain(tmp_path: Path) -> None:
    extract_finished_run(tmp_path)
    found = sorted((tmp_path / "outputs" / "artifacts").glob("*/*/manifest.json"))
    assert len(found) == 6
    for manifest in found:
        stage = manifest.parent.parent.name
        assert store._missing_files(manifest.parent, STAGES[stage].files) == []
        committed = Artifact(tmp_path / "outputs" / "artifacts", stage, manifest.parent.name)
        assert committed.is_complete() and committed.damage() == []
    assert all(stage.files for stage in STAGES.values())


def test_training_summary_without_weights_is_not_committed(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path, "pretrain", "k")
    files = {"config.json": "{}", "training.json": "{}", "metrics.jsonl": "{}", "expansion.json": "{}"}
    _fill(artifact, **files)
    with pytest.raises(WorkersFailed, match=r"without writing model\*.safetensors.*force=\[pretrain\]"):
        artifact.commit({}, STAGES["pretrain"].files)
    _fill(artifact, **{"model.safetensors": ""})
    with pytest.raises(WorkersFailed, match="model"):
        artifact.commit({}, STAGES["pretrain"].files)
    assert not artifact.path.exists() and (artifact.partial / "training.json").exists()
    _fill(artifact, **{"model.safetensors": "weights"})
    artifact.commit({}, STAGES["pretrain"].files)
    assert artifact.is_complete()


def test_shards_listed_in_an_index_must_exist(tmp_path: Path) -> None:
    artifact = _fill(Artifact(tmp_path, "load", "k"), **{"model-00001-of-00002.safetensors": "x"})
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    write_json(artifact.partial / "model.safetensors.index.json", {"weight_map": shards})
    with pytest.raises(WorkersFailed, match="model-00002-of-00002.safetensors"):
        artifact.commit({})


def test_temporary_files_of_killed_writers_are_not_committed(tmp_path: Path) -> None:
    artifact = _fill(
        Artifact(tmp_path, "load", "k"), weights="x", **{".dataset.json.0f3": "x", ".model-0.partial": "x"}
    )
    for name in ("logs", "snapshots/.50.partial/inner"):
        (artifact.partial / name).mkdir(parents=True)
    (artifact.partial / "logs" / ".task.json.1").touch()
    (artifact.partial / "logs" / "stage.log").touch()
    (artifact.partial / "snapshots" / ".50.partial" / "inner" / "weights").touch()
    artifact.commit({})
    found = {str(path.relative_to(artifact.path)) for path in artifact.path.rglob("*") if path.is_file()}
    assert found == {MANIFEST, "weights", "logs/stage.log"}
    assert artifact.manifest()["files"].keys() == {"weights", "logs/stage.log"}
    assert not list(artifact.path.rglob(".*"))


def test_copy_under_another_key_is_not_complete(artifact: Artifact) -> None:
    other = Artifact(artifact.root, "load", "another")
    shutil.copytree(artifact.path, other.path)
    assert artifact.is_complete() and not other.is_complete()
    assert other.damage() == ["manifest.json is missing, cannot be read, or belongs to another artifact"]


def test_ownership_is_confirmed_after_hashing_and_before_the_rename(tmp_path: Path) -> None:
    artifact = _fill(Artifact(tmp_path, "load", "k"), weights="x")

    def lost() -> None:
        assert read_json(artifact.partial / MANIFEST)["files"]
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        artifact.commit({}, confirm=lost)
    assert not artifact.path.exists()


# ------------------------------------------------------------------------------------------ replacing


def _without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates a file system that cannot swap two directories."""
    monkeypatch.setattr(store, "exchange", lambda first, second: False)


def test_exchange_swaps_two_directories(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system cannot swap two paths atomically")
    assert (tmp_path / "a" / "b").exists() and (tmp_path / "b" / "a").exists()
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "none")


@pytest.mark.parametrize("atomic", [True, False])
def test_replacing_an_artifact_leaves_only_the_new_one(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, atomic: bool
) -> None:
    if not atomic:
        _without_exchange(monkeypatch)
    artifact.invalidate()
    _fill(artifact, other="new").commit({})
    assert artifact.is_complete() and artifact.manifest()["files"].keys() == {"other"}
    assert _beside(artifact) == {"k"}


def test_artifact_exists_at_every_moment_of_its_replacement(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe2").mkdir()
    if not exchange(tmp_path / "probe", tmp_path / "probe2"):
        pytest.skip("this system cannot swap two paths atomically")
    _fill(artifact, other="new")
    replace, moments = os.replace, list[bool]()

    def watched(source: Any, target: Any) -> None:
        replace(source, target)
        moments.append(artifact.path.exists())

    monkeypatch.setattr(os, "replace", watched)
    artifact.commit({})
    assert moments and all(moments)


class _PowerCut(BaseException):
    pass


def _commit_in_a_power_cut(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, which: Callable[[Path, Path], bool]
) -> None:
    """Commits by two renames, and ends the process just after the one for which ``which(source, target)`` holds."""
    with monkeypatch.context() as during:
        _without_exchange(during)
        _cut_at(during, which)
        with pytest.raises(_PowerCut):
            artifact.commit({})


def _cut_at(monkeypatch: pytest.MonkeyPatch, which: Callable[[Path, Path], bool]) -> None:
    """Ends the process just after the first rename for which ``which(source, target)`` holds."""
    replace = os.replace

    def cut(source: Any, target: Any) -> None:
        replace(source, target)
        if which(Path(source), Path(target)):
            raise _PowerCut

    monkeypatch.setattr(os, "replace", cut)


def test_old_artifact_is_restored_after_a_power_cut_between_the_two_renames(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fill(artifact, other="new")
    _commit_in_a_power_cut(artifact, monkeypatch, lambda source, target: source == artifact.path)
    assert not artifact.path.exists()
    artifact.tidy()
    assert (artifact.path / "weights").read_text() == "old"
    _fill(artifact).commit({})
    assert artifact.manifest()["files"].keys() == {"other"} and _beside(artifact) == {"k"}


def test_new_artifact_counts_after_a_power_cut_just_after_its_rename(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact.invalidate()
    _fill(artifact, other="new")
    _commit_in_a_power_cut(artifact, monkeypatch, lambda source, target: target == artifact.path)
    assert artifact.is_complete(), "the marker names the old artifact"
    artifact.tidy()
    assert "k.old" not in _beside(artifact) and artifact.is_complete()


def test_invalidating_never_leaves_half_of_a_partial_directory(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fill(artifact, a="1", b="2")

    def cut(path: Path, **options: object) -> None:
        (path / "a").unlink()
        raise _PowerCut

    with monkeypatch.context() as during:
        during.setattr(shutil, "rmtree", cut)
        with pytest.raises(_PowerCut):
            artifact.invalidate()
    assert not artifact.partial.exists() and not artifact.is_complete()
    artifact.tidy()
    assert _beside(artifact) == {"k", "k.redo"}


@pytest.mark.parametrize("remove", [Artifact.tidy, Artifact.remove])
def test_temporary_file_of_a_process_killed_while_invalidating_is_removed(
    artifact: Artifact, remove: Callable[[Artifact], None]
) -> None:
    if (child := os.fork()) == 0:
        os.replace = lambda source, target: os.kill(os.getpid(), signal.SIGKILL)
        artifact.invalidate()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(_beside(artifact)) == 2
    remove(artifact)
    assert _beside(artifact) <= {"k"}


@pytest.mark.parametrize("content", [b"", bytes(66), b'"cut'])
def test_unreadable_marker_still_invalidates(artifact: Artifact, content: bytes) -> None:
    artifact.invalidate()
    artifact.path.with_name("k.redo").write_bytes(content)
    assert not artifact.is_complete()


# ------------------------------------------------------------------------------------------ verifying


def test_zeroed_weights_are_found_by_verifying(artifact: Artifact) -> None:
    assert artifact.damage() == []
    (artifact.path / "weights").write_bytes(bytes(3))
    assert artifact.is_complete(), "only sizes are compared there"
    (artifact.path / "added").touch()
    assert artifact.damage() == ["weights does not match its recorded hash", "added was added"]
    (artifact.path / "weights").write_bytes(b"")
    assert artifact.damage()[0] == "weights has 0 bytes instead of 3"
    (artifact.path / "weights").unlink()
    assert artifact.damage()[0] == "weights is missing"


def test_verify_reports_every_artifact_and_how_to_rebuild_damaged_ones(artifact: Artifact) -> None:
    absent = Artifact(artifact.root, "expand", "e")
    load = SimpleNamespace(name="load", stage="load", artifact=artifact, parents={})
    expand = SimpleNamespace(name="expand", stage="expand", artifact=absent, parents={"load": load})
    nodes: Any = {"load": load, "expand": expand}
    run: Any = SimpleNamespace(name="run", stages=["expand"])
    console = Console(file=io.StringIO(), width=120)
    assert isinstance(console.file, io.StringIO)
    verify([(run, nodes)], console)
    assert [line.split()[0] for line in console.file.getvalue().splitlines()] == ["run", "intact", "absent"]
    (artifact.path / "weights").write_bytes(bytes(3))
    last: Any = SimpleNamespace(name="last", stages=["expand"])
    with pytest.raises(DamagedArtifacts, match=r"damaged artifacts: 1. .*force=\[load\]"):
        verify([(run, nodes), (last, nodes)], console)  # jobs of a sweep
    printed = console.file.getvalue()
    assert printed.count("weights does not match its recorded hash") == 2 and "\nlast\n" in printed

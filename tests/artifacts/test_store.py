"""Keys, commits and attempts of artifacts."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pipeline.artifacts.store import (
    ATTEMPTS_FILE,
    Artifact,
    begin_attempt,
    finish_attempts,
    make_key,
)
from pipeline.files import read_json, sha256_file, write_json


def _built(root: Path, key: str = "k") -> Artifact:
    artifact = Artifact(root, "load", key)
    artifact.partial.mkdir(parents=True)
    (artifact.partial / "weights").write_text("new")
    artifact.commit({"key": key})
    return artifact


def test_key_changes_with_every_ingredient_but_not_with_the_order_of_settings() -> None:
    ingredients = ("load", 1, {"a": 1, "b": [2]}, {"model": "p"}, {"file": "h"})
    key = make_key(*ingredients)
    assert make_key("load", 1, {"b": [2], "a": 1}, {"model": "p"}, {"file": "h"}) == key
    others = [
        ("expand", *ingredients[1:]),
        ("load", 2, *ingredients[2:]),
        ("load", 1, {"a": 2, "b": [2]}, *ingredients[3:]),
        (*ingredients[:3], {"model": "q"}, ingredients[4]),
        (*ingredients[:4], {"file": "i"}),
    ]
    assert len({key, *(make_key(*other) for other in others)}) == 6


def test_artifact_is_complete_only_if_every_file_has_its_recorded_size(tmp_path: Path) -> None:
    artifact = _built(tmp_path)
    assert artifact.is_complete()
    assert artifact.manifest()["files"]["weights"]["sha256"] == sha256_file(artifact.path / "weights")
    (artifact.path / "weights").write_text("cut")
    assert artifact.is_complete(), "sizes are checked, not contents"
    (artifact.path / "weights").write_text("shorter or longer")
    assert not artifact.is_complete()


def test_partial_directory_is_not_complete(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path, "load", "k")
    artifact.partial.mkdir(parents=True)
    write_json(artifact.partial / "manifest.json", {"files": {}})
    assert not artifact.is_complete()


def test_rebuilt_artifact_replaces_all_files_of_the_old_one(tmp_path: Path) -> None:
    artifact = _built(tmp_path)
    artifact.partial.mkdir()
    (artifact.partial / "other").write_text("x")
    artifact.commit({"key": "k"})
    assert sorted(path.name for path in artifact.path.iterdir()) == ["manifest.json", "other"]
    assert sorted(path.name for path in artifact.path.parent.iterdir()) == ["k"]


def test_invalidated_artifact_counts_as_missing_but_keeps_its_files_until_it_is_rebuilt(tmp_path: Path) -> None:
    artifact = _built(tmp_path)
    artifact.partial.mkdir()
    artifact.invalidate()
    assert not artifact.is_complete() and not artifact.partial.exists()
    assert (artifact.path / "weights").read_text() == "new"
    assert _built(tmp_path).is_complete()


# ----------------------------------------------------------------------------------------- attempts


def test_killed_attempt_lasts_until_its_last_write(tmp_path: Path) -> None:
    begin_attempt(tmp_path)
    write_json(tmp_path / ATTEMPTS_FILE, [{"started": 1000.0, "seconds": None}])
    (tmp_path / "metrics.jsonl").touch()
    for path in tmp_path.iterdir():
        os.utime(path, (1030.0, 1030.0))
    attempts = begin_attempt(tmp_path)
    first, second = read_json(tmp_path / ATTEMPTS_FILE)
    assert first == {"started": 1000.0, "seconds": 30.0}
    assert second["started"] == pytest.approx(time.time(), abs=5)
    number, seconds = finish_attempts(tmp_path, attempts)
    assert number == 2 and 30.0 <= seconds < 35.0
    assert not (tmp_path / ATTEMPTS_FILE).exists()


def test_duration_of_a_single_attempt(tmp_path: Path) -> None:
    attempts = begin_attempt(tmp_path)
    time.sleep(0.05)
    number, seconds = finish_attempts(tmp_path, attempts)
    assert number == 1 and 0.05 <= seconds < 5.0


def test_single_attempt_whose_record_disappears_still_has_its_duration(tmp_path: Path) -> None:
    attempts = begin_attempt(tmp_path)
    (tmp_path / ATTEMPTS_FILE).write_bytes(bytes(20))
    assert finish_attempts(tmp_path, attempts)[0] == 1
    assert not (tmp_path / ATTEMPTS_FILE).exists()

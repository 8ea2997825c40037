"""An artifact is whole or absent, named by what made it, and built by one process at a time."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.artifacts.store import Artifact, Fingerprints, RememberedFingerprints, make_key
from pipeline.files import read_json, sha256_file, write_json


def _built(root: Path, key: str = "k") -> Artifact:
    artifact = Artifact(root, "load", key)
    artifact.partial.mkdir(parents=True)
    (artifact.partial / "weights").write_text("new")
    artifact.commit({"key": key})
    return artifact


def test_a_key_changes_with_every_ingredient_and_with_nothing_else() -> None:
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


def test_an_artifact_is_complete_only_with_its_manifest_and_every_byte(tmp_path: Path) -> None:
    artifact = _built(tmp_path)
    assert artifact.is_complete()
    assert artifact.manifest()["files"]["weights"]["sha256"] == sha256_file(artifact.path / "weights")
    (artifact.path / "weights").write_text("cut")
    assert artifact.is_complete(), "sizes are checked, not contents"
    (artifact.path / "weights").write_text("shorter or longer")
    assert not artifact.is_complete()


def test_a_partial_directory_is_no_artifact(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path, "load", "k")
    artifact.partial.mkdir(parents=True)
    write_json(artifact.partial / "manifest.json", {"files": {}})
    assert not artifact.is_complete()


def test_a_redone_artifact_replaces_the_old_one_whole(tmp_path: Path) -> None:
    artifact = _built(tmp_path)
    artifact.partial.mkdir()
    (artifact.partial / "other").write_text("x")
    artifact.commit({"key": "k"})
    assert sorted(path.name for path in artifact.path.iterdir()) == ["manifest.json", "other"]
    assert sorted(path.name for path in artifact.path.parent.iterdir()) == ["k"]


def test_json_is_never_seen_half_written(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": 1})
    write_json(tmp_path / "a.json", {"new": 2})
    assert read_json(tmp_path / "a.json") == {"new": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_fingerprints_are_remembered_until_the_file_changes(tmp_path: Path) -> None:
    file = tmp_path / "corpus.txt"
    file.write_text("one")
    fingerprints = Fingerprints(tmp_path / "memo.json")
    first = fingerprints.of_file(file)
    assert first == sha256_file(file)
    memo = json.loads((tmp_path / "memo.json").read_text())
    (tmp_path / "memo.json").write_text(json.dumps(dict.fromkeys(memo, "remembered")))
    assert fingerprints.of_file(file) == "remembered"
    file.write_text("another length")
    assert fingerprints.of_file(file) == sha256_file(file)


def test_an_invalidated_artifact_is_missing_until_it_is_made_anew_and_keeps_its_files(tmp_path: Path) -> None:
    artifact = _built(tmp_path)
    artifact.partial.mkdir()
    artifact.invalidate()
    assert not artifact.is_complete() and not artifact.partial.exists()
    assert (artifact.path / "weights").read_text() == "new"
    assert _built(tmp_path).is_complete()


def test_what_is_only_remembered_is_neither_read_nor_written(tmp_path: Path) -> None:
    known, unknown = tmp_path / "known", tmp_path / "unknown"
    known.write_text("one")
    unknown.write_text("two")
    memo = tmp_path / "memo.json"
    wanted = Fingerprints(memo).of_file(known)
    before = memo.read_bytes()
    remembered = RememberedFingerprints(memo)
    assert remembered.of_file(known) == wanted
    assert remembered.of_file(unknown) != sha256_file(unknown)
    assert remembered.of_files([known]) == Fingerprints(memo).of_files([known])
    assert memo.read_bytes() == before
    assert not RememberedFingerprints(tmp_path / "none.json").memo.exists()

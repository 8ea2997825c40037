"""Keys, fingerprints, commits and attempts of artifacts."""

from __future__ import annotations

import json
import os
import time
from itertools import pairwise
from pathlib import Path

import pytest

from pipeline.artifacts.store import (
    ATTEMPTS_FILE,
    Artifact,
    Fingerprints,
    RememberedFingerprints,
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


def _lines(memo: Path) -> list[list[str]]:
    return [json.loads(line) for line in memo.read_text().splitlines()]


def test_fingerprints_are_cached_until_the_file_changes(tmp_path: Path) -> None:
    file, memo, remembered = tmp_path / "corpus.txt", tmp_path / "memo.jsonl", "0" * 64
    file.write_text("one")
    first = Fingerprints(memo).of_file(file)
    assert first == sha256_file(file)
    memo.write_text("".join(json.dumps([name, remembered]) + "\n" for name, _ in _lines(memo)))
    fingerprints = Fingerprints(memo)
    assert fingerprints.of_file(file) == remembered
    file.write_text("another length")
    assert fingerprints.of_file(file) == sha256_file(file)


def test_fingerprint_changes_with_content_of_the_same_size_and_modification_time(tmp_path: Path) -> None:
    file, fingerprints = tmp_path / "corpus.txt", Fingerprints(tmp_path / "memo.jsonl")
    file.write_text("one")
    before, status = fingerprints.of_file(file), file.stat()
    replaced = tmp_path / "new.txt"
    replaced.write_text("two")
    os.replace(replaced, file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprints.of_file(file) == sha256_file(file) != before


def test_memo_of_fingerprints_is_read_once_and_appended_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / f"{number}.txt" for number in range(50)]
    for file in files:
        file.write_text(file.name)
    memo = tmp_path / "artifacts" / "memo.jsonl"
    Fingerprints(memo).of_files(files[:25])
    reads, written, read_text = list[Path](), list[int](), Path.read_text

    def watched(path: Path, *arguments: str, **options: str) -> str:
        reads.append(path)
        return read_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", watched)
    fingerprints, inode = Fingerprints(memo), memo.stat().st_ino
    for file in files:
        fingerprints.of_file(file)
        written.append(memo.stat().st_size)
    assert reads == [memo] and memo.stat().st_ino == inode
    assert written[:25] == [written[0]] * 25, "known files are not written again"
    growth = [after - before for before, after in pairwise(written[24:])]
    assert len(growth) == 25 and max(growth) < 2 * min(growth), "one line per file"
    assert len(_lines(memo)) == 50


@pytest.mark.parametrize(
    "damage", [b"", bytes(70), b"\xff{", b'["name", "short"]', b'{\n  "name": "hash"\n}\n', b"[" * 100_000]
)
def test_unreadable_lines_of_the_memo_only_cost_hashing_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: bytes
) -> None:
    file, memo = tmp_path / "corpus.txt", tmp_path / "memo.jsonl"
    file.write_text("one")
    memo.write_bytes(damage)
    wanted = Fingerprints(memo).of_file(file)
    assert wanted == sha256_file(file)
    assert len(capsys.readouterr().err.splitlines()) == (damage != b"")
    assert RememberedFingerprints(memo).of_file(file) == wanted, "the new line is not joined to a damaged one"


def test_invalidated_artifact_counts_as_missing_but_keeps_its_files_until_it_is_rebuilt(tmp_path: Path) -> None:
    artifact = _built(tmp_path)
    artifact.partial.mkdir()
    artifact.invalidate()
    assert not artifact.is_complete() and not artifact.partial.exists()
    assert (artifact.path / "weights").read_text() == "new"
    assert _built(tmp_path).is_complete()


def test_remembered_fingerprints_read_no_input_and_write_nothing(tmp_path: Path) -> None:
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

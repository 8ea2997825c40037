"""Fingerprints of input files, and the file in which they are remembered."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest

from pipeline.artifacts.fingerprints import Fingerprints, RememberedFingerprints
from pipeline.files import sha256_file


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

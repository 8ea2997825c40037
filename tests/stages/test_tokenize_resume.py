"""A killed tokenize stage resumes, and its files are identical to those of an uninterrupted one."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts.task import StageTask, task_to_json
from pipeline.config import Source
from pipeline.data import dataset_builder, tokenizer
from pipeline.data.tokenizer import TokenizerPool
from pipeline.progress import ProgressBar
from pipeline.stages import tokenize
from tests.stages.test_tokenize import _source, _task

SAVING_ALWAYS = """
import json, sys
from pathlib import Path
from pipeline.data import dataset_builder
from pipeline.artifacts.task import task_from_json
from pipeline.stages import tokenize
dataset_builder.SAVE_EVERY_SECONDS = 0.0
tokenize.run(task_from_json(json.loads(Path(sys.argv[1]).read_text())))
"""


class Killed(Exception):
    pass


def _corpus(directory: Path, documents: int) -> list[Source]:
    """Two sources with documents of all lengths, some of them duplicates."""
    draw = random.Random(0)
    texts = [f"Document {number}. " + "some more words " * draw.randrange(40) for number in range(documents)]
    directory.mkdir()
    for number in range(3):
        rows = "\n".join(json.dumps({"text": draw.choice(texts)}) for _ in range(documents // 3))
        (directory / f"{number}.jsonl.gz").write_bytes(gzip.compress(rows.encode(), mtime=0))
    (directory / "other.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts[::-1]))
    return [_source("corpus", directory / "?.jsonl.gz", 0.7), _source("corpus", directory / "other.jsonl", 0.3)]


def _other_text(directory: Path, documents: int) -> list[Source]:
    """Documents of two lengths for the forgetting split, the first of which is also in the corpus of ``_corpus``."""
    directory.mkdir()
    texts = ["Document 0. ", *(f"Other text {number}. " + "words " * (number % 30) for number in range(documents))]
    (directory / "forgetting.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return [_source("corpus", directory / "forgetting.jsonl")]


def _chats(directory: Path, conversations: int) -> list[Source]:
    rows = [
        {"prompt": f"What is {number}?", "completion": "word " * (number % 17 + 1)} for number in range(conversations)
    ]
    directory.mkdir()
    (directory / "chats.jsonl").write_text("\n".join(map(json.dumps, [*rows, *rows[::9]])))
    return [_source("instructions", directory / "chats.jsonl")]


def _files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def _same_task(model: Path, out: Path, purpose: str, sources: list[Source], **changes: Any) -> StageTask:
    return _task(model, out, purpose, None, sources=sources, sequence_length=48, max_dropped=1.0, **changes)


@pytest.mark.parametrize(
    ("purpose", "make", "splits"),
    [
        ("corpus", _corpus, {"validation_fraction": 0.2, "max_forgetting_tokens": 5000}),
        ("instructions", _chats, {"validation_fraction": 0.0}),
    ],
)
def test_repeated_interruptions_do_not_change_the_result(
    purpose: str,
    make: Any,
    splits: Any,
    tiny_llama_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    sources = make(tmp_path / "texts", 300)
    if purpose == "corpus":
        splits = {**splits, "forgetting": _other_text(tmp_path / "forgetting", 200)}
    tokenize.run(_same_task(tiny_llama_dir, tmp_path / "complete", purpose, sources, **splits))
    save = dataset_builder.DatasetBuilder._save
    calls: list[int] = []

    def save_every_fifth_time(self: Any) -> None:
        calls.append(1)
        if len(calls) % 5 == 0:
            save(self)

    monkeypatch.setattr(dataset_builder, "SAVE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(dataset_builder.DatasetBuilder, "_save", save_every_fifth_time)
    task = _same_task(tiny_llama_dir, tmp_path / "interrupted", purpose, sources, **splits)
    for survived, cores in ((3, 2), (40, 1), (7, 3), (61, 2), (33, 1)):
        with monkeypatch.context() as patched:
            patched.setattr(tokenizer, "usable_cores", lambda cores=cores: cores)
            patched.setattr(ProgressBar, "advance", _dying_after(survived))
            with pytest.raises(Killed):
                tokenize.run(task)
    tokenize.run(task)
    assert _files(task.out) == _files(tmp_path / "complete")
    assert "damaged" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "damaged", ["train.input_ids.npy", "held_out.jsonl", "checkpoint/hashes.uint64", "checkpoint/progress.json"]
)
def test_tokenizing_starts_over_if_a_saved_file_is_damaged(
    damaged: str, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    sources = _corpus(tmp_path / "texts", 60)
    tokenize.run(_same_task(tiny_llama_dir, tmp_path / "complete", "corpus", sources))
    task = _same_task(tiny_llama_dir, tmp_path / "interrupted", "corpus", sources)
    monkeypatch.setattr(dataset_builder, "SAVE_EVERY_SECONDS", 0.0)
    with monkeypatch.context() as patched:
        patched.setattr(ProgressBar, "advance", _dying_after(50))
        with pytest.raises(Killed):
            tokenize.run(task)
    content = bytearray((task.out / damaged).read_bytes())
    place = content.rindex(b'"blocks": ') + len('"blocks": ') if damaged.endswith("json") else 150
    content[place] ^= 1
    (task.out / damaged).write_bytes(content)
    tokenize.run(task)
    assert _files(task.out) == _files(tmp_path / "complete")
    assert "damaged: tokenizing restarts" in capsys.readouterr().err


def test_nothing_is_read_again_after_a_kill_during_hashing(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = _same_task(tiny_llama_dir, tmp_path / "done", "corpus", _corpus(tmp_path / "texts", 30))
    metrics = tokenize.run(task)
    written = _files(task.out)
    monkeypatch.setattr(tokenize, "TextTokenizer", lambda directory: pytest.fail("it tokenized again"))
    assert tokenize.run(task) == metrics
    assert _files(task.out) == written and not (task.out / "checkpoint").exists()


@pytest.mark.parametrize("damaged", ["train.input_ids.npy", "held_out.jsonl", "dataset.json"])
def test_a_damaged_file_of_a_finished_attempt_is_written_again(
    damaged: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    task = _same_task(tiny_llama_dir, tmp_path / "done", "corpus", _corpus(tmp_path / "texts", 30))
    tokenize.run(task)
    written = _files(task.out)
    content = bytearray(written[damaged])
    content[content.rindex(b"1") if damaged == "dataset.json" else len(content) // 2] ^= 1
    (task.out / damaged).write_bytes(content)
    tokenize.run(task)
    assert _files(task.out) == written


def _dying_after(survived: int) -> Callable[..., None]:
    left = iter(range(survived))

    def advance(*_: object, **__: object) -> None:
        if next(left, None) is None:
            raise Killed

    return advance


def test_a_killed_process_is_resumed(tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = _corpus(tmp_path / "texts", 3000)
    tokenize.run(_same_task(tiny_llama_dir, tmp_path / "complete", "corpus", sources))
    task = _same_task(tiny_llama_dir, tmp_path / "killed", "corpus", sources)
    (tmp_path / "task.json").write_text(json.dumps(task_to_json(task)))
    progress = task.out / "checkpoint" / "progress.json"
    command = [sys.executable, "-c", SAVING_ALWAYS, str(tmp_path / "task.json")]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    while not (progress.exists() and _kept(progress) > 50):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = _kept(progress)
    tokenized: list[str] = []
    submit = TokenizerPool.submit
    monkeypatch.setattr(TokenizerPool, "submit", lambda self, texts: tokenized.extend(texts) or submit(self, texts))
    metrics = tokenize.run(task)
    assert 50 < kept < sum(metrics["documents"].values())
    assert len(tokenized) <= 6000 - kept  # nothing is tokenized twice
    assert _files(task.out) == _files(tmp_path / "complete")


def _kept(progress: Path) -> int:
    return sum(sum(part["documents"].values()) for part in json.loads(progress.read_text())["parts"])

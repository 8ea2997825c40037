"""The small writers: artifact, lock, checkpoint, weight files and tokenizer, for faults at each of their system calls.

``scripts/torture --writers`` interrupts each writer at every write, fsync, rename and creation of a file, and then runs
it again, as a repeated command would.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.artifacts.lock import Holder, Lock
from pipeline.artifacts.store import Artifact, begin_attempt, finish_attempts
from pipeline.data import dataset_builder
from pipeline.files import is_intact, sha256_file
from pipeline.models.tensors import TensorSpec
from pipeline.models.weight_files import INDEX
from pipeline.models.writing import ShardWriter
from pipeline.stages import tokenize
from pipeline.training import checkpoint
from pipeline.training.checkpoint_writer import CheckpointWriter
from tests.stages.test_tokenize import _task
from tests.training.test_checkpoint import DictOptimizerState

Files = Mapping[str, str]  # hashes by relative path


@dataclass(frozen=True)
class SmallWriter:
    """A writer under test.

    Attributes:
        prepare: creates what exists before the fault.
        write: writes, or continues what an interrupted call left.
        claims: returns what a reader would take for complete; nothing if that is nothing.
        is_committed_later: it writes in an artifact's partial directory, and the commit removes hidden files.
    """

    write: Callable[[Path], None]
    claims: Callable[[Path], Files]
    prepare: Callable[[Path], None] = lambda directory: None
    is_committed_later: bool = False


def hashes(directory: Path) -> dict[str, str]:
    """Returns the hashes of all files below a directory that are not hidden."""
    found = {str(path.relative_to(directory)): path for path in sorted(directory.rglob("*")) if path.is_file()}
    return {name: sha256_file(path) for name, path in found.items() if "/." not in f"/{name}"}


def _ignore(message: str) -> None:
    pass


# ------------------------------------------------------------------------------------ artifact and lock


def _artifact(directory: Path) -> Artifact:
    return Artifact(directory, "load", "0" * 64)


def _build(directory: Path, content: str, redo: bool) -> None:
    """Does what the driver does for one artifact."""
    artifact = _artifact(directory)
    with artifact.lock().held(_ignore):
        artifact.tidy()
        if redo:
            artifact.invalidate()
        if artifact.is_complete():
            return
        (artifact.partial / "inner").mkdir(parents=True, exist_ok=True)
        attempts = begin_attempt(artifact.partial)
        for name in ("weights", "inner/config"):
            (artifact.partial / name).write_text(f"{content} {name}")
        finish_attempts(artifact.partial, attempts)
        artifact.commit({}, ["weights"])


def _complete_artifact(directory: Path) -> Files:
    artifact = _artifact(directory)
    if not artifact.is_complete():
        return {}
    assert not artifact.damage(), artifact.damage()
    return {name: digest for name, digest in hashes(directory).items() if name.startswith(f"load/{artifact.key}/")}


def _hold_twice(directory: Path) -> None:
    for _ in range(2):
        lock = Lock(directory / "lock", Holder.current(os.environ))
        with lock.held(_ignore):
            lock.confirm()


# ------------------------------------------------------------------------------------------ checkpoint


def _save(directory: Path, step: int) -> None:
    log = directory / "metrics.jsonl"
    log.write_text("".join(f'{{"step": {number}}}\n' for number in range(1, step + 1)))
    place = directory / "checkpoints"
    state = {"progress": {"step": step}}
    writer = CheckpointWriter(place, DictOptimizerState(step), keep=1)
    writer.save(step, state, [log])
    writer.finish()


def _newest_checkpoint(directory: Path) -> Files:
    found = checkpoint.newest(directory / "checkpoints", _ignore)
    if found is None:
        return {}
    assert all(bool((tensor == found.step).all()) for tensor in found.tensors().values())
    log = found.metrics_log()
    assert log is not None and log.read_text().count("\n") == found.step
    return {f"checkpoints/{found.path.name}/{name}": digest for name, digest in hashes(found.path).items()}


# --------------------------------------------------------------------------------------- weight files


def _write_weights(directory: Path) -> None:
    specs = {name: TensorSpec(torch.float32, (4, 8)) for name in ("a", "b", "c", "d")}
    if (directory / INDEX).exists():
        return
    with ShardWriter(directory, specs, {"d": ("d.0", "d.1")}, max_shard_bytes=256) as writer:
        for number, name in enumerate(("a", "b", "c")):
            if name not in writer.written:
                writer.write(name, torch.full((4, 8), float(number)))
                writer.flush()
        for number, part in enumerate(("d.0", "d.1")):
            if part not in writer.written:
                writer.part("d", part)[2 * number : 2 * number + 2] = 3.0 + number
                writer.flush()


def _finished_weights(directory: Path) -> Files:
    return hashes(directory) if (directory / INDEX).exists() else {}


# ----------------------------------------------------------------------------------------- tokenizer


def tokenizer_writer(model: Path, corpus: Path) -> SmallWriter:
    """Returns the tokenize stage, which saves its progress after every document."""

    def write(directory: Path) -> None:
        dataset_builder.SAVE_EVERY_SECONDS = 0.0
        tokenize.run(_task(model, directory / "tokens", "corpus", corpus))

    def finished(directory: Path) -> Files:
        if not is_intact(directory / "tokens" / tokenize.DATASET_SEAL):
            return {}
        return {name: digest for name, digest in hashes(directory).items() if "/checkpoint/" not in name}

    return SmallWriter(write, finished, is_committed_later=True)


def small_writers(model: Path, corpus: Path) -> dict[str, SmallWriter]:
    """Returns all writers by name.

    Args:
        model: a Hugging Face directory with a tokenizer.
        corpus: a JSONL file of documents.
    """
    return {
        "artifact": SmallWriter(lambda directory: _build(directory, "new", redo=False), _complete_artifact),
        "replaced artifact": SmallWriter(
            lambda directory: _build(directory, "new", redo=True),
            _complete_artifact,
            lambda directory: _build(directory, "old", redo=False),
        ),
        "lock": SmallWriter(_hold_twice, lambda directory: {}),
        "checkpoint": SmallWriter(
            lambda directory: _save(directory, 2), _newest_checkpoint, lambda directory: _save(directory, 1)
        ),
        "shard writer": SmallWriter(_write_weights, _finished_weights, is_committed_later=True),
        "tokenizer": tokenizer_writer(model, corpus),
    }

"""Checkpoints of a training stage: trained master weights, their moments, and progress. No pickle.

A checkpoint is a directory ``step-00000100`` of safetensors shards, a copy of the metrics log and ``state.json``. The
latter lists every file with its hash, the progress, and what the checkpoint belongs to (base model and data by hash,
settings, seed). Frozen weights are not saved. Tensors are stored in full under the model's names, so a checkpoint can
be loaded with any number of ranks and any ZeRO stage. The directory is renamed to its final name after all of its
content has been flushed to disk, so a checkpoint is either complete or absent.

The data order and the random numbers need no state, since both are functions of (seed, step).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline.errors import TrainingFailure
from pipeline.files import (
    DISK_FULL_ERRNOS,
    disk_errno,
    free_bytes,
    fsync,
    fsync_directory,
    read_json,
    sha256_file,
    sha256_json,
    write_json,
)
from pipeline.tracking import METRICS_FILE
from pipeline.training.optimizer_state import OptimizerState

SHARD_BYTES = 2**30
STATE_FILE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk."""

    path: Path

    @property
    def step(self) -> int:
        """The optimizer step after which it was saved."""
        return int(self.path.name.removeprefix("step-"))

    def content(self) -> dict[str, Any]:
        """Returns ``state.json``: progress, identity, shard hashes, and the shard of every parameter."""
        content: dict[str, Any] = read_json(self.path / STATE_FILE)
        return content

    def fault(self) -> str | None:
        """Reads and hashes all files. Returns what is wrong with them, or None if the checkpoint is intact."""
        try:
            content = self.content()
            if content.pop("sha256") != sha256_json(content):
                return f"{STATE_FILE} does not match its recorded hash"
        except (OSError, ValueError, LookupError, AttributeError) as error:
            return f"{STATE_FILE} is missing or cannot be read ({type(error).__name__})"
        for name, expected in {**content["shards"], **content.get("files", {})}.items():
            file = self.path / name
            if not file.is_file():
                return f"{name} is missing"
            if sha256_file(file) != expected:
                return f"{name} does not match its recorded hash"
        return None

    def metrics_log(self) -> Path | None:
        """Returns the copy of the metrics log, or None for a checkpoint of an earlier version, which has none."""
        return self.path / METRICS_FILE if METRICS_FILE in self.content().get("files", {}) else None

    def tensors(self, key: str = "weight") -> CheckpointTensors:
        """Returns all weights, or other tensors of the optimizer state, by name, each read from disk on access."""
        return CheckpointTensors(self.path, self.content()["tensors"], key)


class CheckpointTensors(Mapping[str, torch.Tensor]):
    """One float32 tensor of every trained parameter in a checkpoint. Only the one being accessed is in memory."""

    def __init__(self, directory: Path, shard_of: Mapping[str, str], key: str = "weight") -> None:
        self._directory, self._shard_of, self._key = directory, shard_of, key

    def read(self, name: str, key: str) -> torch.Tensor:
        """Returns a parameter's weight, moment or average; ``key`` is one of ``OptimizerState.keys``."""
        with safe_open(self._directory / self._shard_of[name], framework="pt") as shard:
            tensor: torch.Tensor = shard.get_tensor(f"{key}.{name}")
        return tensor

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.read(name, self._key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard_of)

    def __len__(self) -> int:
        return len(self._shard_of)


def directory_name(step: int) -> str:
    """Returns the name of a checkpoint's directory."""
    return f"step-{step:08d}"


def newest(directory: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """Returns the newest intact checkpoint. Damaged ones are reported and skipped."""
    found = sorted(map(Checkpoint, directory.glob("step-????????")), key=lambda checkpoint: -checkpoint.step)
    for checkpoint in found:
        fault = checkpoint.fault()
        if fault is None:
            return checkpoint
        report(f"checkpoint {checkpoint.path} cannot be used: {fault}; trying the one before it")
    return None


def restore(checkpoint: Checkpoint, optimizer_state: OptimizerState) -> None:
    """Loads a checkpoint's tensors and step count into the engine. Every rank reads the same files."""
    tensors = checkpoint.tensors()
    for name in optimizer_state.names():
        for key in optimizer_state.keys(name):
            optimizer_state.write(name, key, tensors.read(name, key))
    optimizer_state.set_step(checkpoint.step)


# ------------------------------------------------------------------------------------------- saving


def save(
    directory: Path,
    step: int,
    optimizer_state: OptimizerState,
    state: Mapping[str, Any],
    is_writer: bool,
    keep: int,
    shard_bytes: int = SHARD_BYTES,
    files: Iterable[Path] = (),
) -> int:
    """Saves a checkpoint and removes old ones. Collective: all ranks read the state, and one of them writes it.

    Args:
        directory: where checkpoints are saved.
        step: the optimizer step that has just been taken.
        state: JSON values to be stored in ``state.json`` beside "shards", "tensors" and "files".
        is_writer: whether this rank writes.
        keep: how many of the newest checkpoints to keep, this one included.
        shard_bytes: a shard is written once it holds this many bytes, which bounds the memory used.
        files: small files to be copied into the checkpoint by the rank that writes.

    Returns:
        The checkpoint's size in bytes; 0 on ranks that do not write.

    Raises:
        TrainingFailure: the disk is full, or a value to be saved is not finite. Earlier checkpoints are intact.
    """
    final = directory / directory_name(step)
    partial = final.with_name(f"{final.name}.partial")
    if not is_writer:
        _write_shards(partial, optimizer_state, is_writer, shard_bytes)
        return 0
    with report_full_disk(partial, f"the checkpoint of step {step}"):
        for stale in directory.glob("step-*.partial"):  # of attempts that were killed while saving
            shutil.rmtree(stale, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)  # training only repeats a step if that step's checkpoint is damaged
        partial.mkdir(parents=True)
        shard_of, shards = _write_shards(partial, optimizer_state, is_writer, shard_bytes)
        copied = {path.name: sha256_file(shutil.copyfile(path, partial / path.name)) for path in files}
        content = {**state, "shards": shards, "tensors": shard_of, "files": copied}
        write_json(partial / STATE_FILE, {**content, "sha256": sha256_json(content)})
        fsync_directory(partial)
    os.replace(partial, final)
    fsync(directory)  # makes the rename itself durable before older checkpoints are removed
    _remove_old(final, keep)
    return sum(path.stat().st_size for path in final.iterdir())


def _write_shards(
    directory: Path, optimizer_state: OptimizerState, is_writer: bool, shard_bytes: int
) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the shard of every parameter and the hash of every shard."""
    shard_of: dict[str, str] = {}
    shards: dict[str, str] = {}
    pending: dict[str, torch.Tensor] = {}

    def write_pending() -> None:
        name = f"{len(shards):05d}.safetensors"
        shards[name] = ""  # other ranks only count the shards
        if is_writer:
            save_file(pending, directory / name)
            shards[name] = sha256_file(directory / name)
        pending.clear()

    for parameter in optimizer_state.names():
        for key in optimizer_state.keys(parameter):
            value = optimizer_state.read(parameter, key)
            _check_finite(value, parameter, key)
            # Other ranks take part in reading, which is collective, but need not hold what they read.
            pending[f"{key}.{parameter}"] = value if is_writer else value.new_empty(0)
        # Shards end between parameters, so a parameter's weight and moments are always in one file.
        shard_of[parameter] = f"{len(shards):05d}.safetensors"
        if sum(tensor.nbytes for tensor in pending.values()) >= shard_bytes:
            write_pending()
    if pending:
        write_pending()
    return shard_of, shards


def _check_finite(value: torch.Tensor, parameter: str, key: str) -> None:
    # All ranks read the same value, so they all raise at the same tensor and none is left waiting in a collective.
    if not torch.isfinite(value).all():
        raise TrainingFailure(
            f"the last step produced a non-finite {key} of {parameter}; it was not saved, and the last checkpoint is "
            "intact. Lower learning_rate or max_grad_norm, or raise warmup_fraction."
        )


def _remove_old(latest: Path, keep: int) -> None:
    """Removes all checkpoints but ``latest`` and the ``keep - 1`` before it.

    Checkpoints of later steps are removed too. Training resumed before them because they were damaged.
    """
    found = sorted(latest.parent.glob("step-????????"))
    end = found.index(latest) + 1
    for path in (*found[: max(0, end - keep)], *found[end:]):
        shutil.rmtree(path)


@contextmanager
def report_full_disk(partial: Path, what: str) -> Iterator[None]:
    """Replaces the errors of a full or failing disk by one message, and removes the partly written directory.

    Args:
        partial: the directory being written.
        what: its content, for the message.

    Raises:
        TrainingFailure: a disk, quota or file size limit was reached, or the disk fails.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if (number := disk_errno(error)) is None:
            raise
        shutil.rmtree(partial, ignore_errors=True)
        raise TrainingFailure(
            f"{what} could not be saved in {partial.parent}: {error}. Earlier checkpoints are intact; "
            f"{free_bytes(partial.parent) / 2**20:,.0f} MiB are free there. "
            f"{'Free some space' if number in DISK_FULL_ERRNOS else 'Check the disk'} and repeat "
            "the same command; it resumes from the last checkpoint."
        ) from error

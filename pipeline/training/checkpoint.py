"""What training changes, on disk: trained master weights, moments, counters. No pickle.

A checkpoint is a directory ``step-00000100`` of safetensors shards and ``state.json``, which names every shard with
its hash and says what the state belongs to (the base model and the data by hash, the settings). Frozen weights are
never written again. The directory gets its name by one rename after everything in it has reached the disk, so a
checkpoint is whole or absent; the newest few are kept. Tensors are whole and named as in the
model, so other numbers of ranks and other ZeRO stages can read them.

The order of data and the random numbers need no state: both are functions of (seed, step).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
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
    free_bytes,
    fsync,
    fsync_directory,
    read_json,
    sha256_file,
    sha256_json,
    write_json,
)
from pipeline.training.optimizer_state import PARTS, Masters

SHARD_BYTES = 2**30
STATE_FILE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path

    @property
    def step(self) -> int:
        """The optimizer step after which it was taken."""
        return int(self.path.name.removeprefix("step-"))

    def content(self) -> dict[str, Any]:
        """``state.json``: progress, identity, and where every tensor lies."""
        content: dict[str, Any] = read_json(self.path / STATE_FILE)
        return content

    def fault(self) -> str | None:
        """What is wrong with the files, read whole and hashed; None when nothing is."""
        try:
            content = self.content()
            if content.pop("sha256") != sha256_json(content):
                return f"{STATE_FILE} does not have the hash it was saved with"
        except (OSError, ValueError, LookupError, AttributeError) as error:
            return f"{STATE_FILE} is missing or cannot be read ({type(error).__name__})"
        for name, expected in content["shards"].items():
            shard = self.path / name
            if not shard.is_file():
                return f"{name} is missing"
            if sha256_file(shard) != expected:
                return f"{name} does not have the hash it was saved with"
        return None

    def tensors(self) -> CheckpointTensors:
        """All tensors by name, read from disk as they are asked for."""
        return CheckpointTensors(self.path, self.content()["tensors"])


class CheckpointTensors(Mapping[str, torch.Tensor]):
    """The trained float32 weights of a checkpoint; one is in memory at a time."""

    def __init__(self, directory: Path, shard_of: Mapping[str, str]) -> None:
        self._directory, self._shard_of = directory, shard_of

    def part(self, name: str, part: str) -> torch.Tensor:
        """A parameter's weight or one of its moments."""
        with safe_open(self._directory / self._shard_of[name], framework="pt") as shard:
            tensor: torch.Tensor = shard.get_tensor(f"{part}.{name}")
        return tensor

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.part(name, "weight")

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard_of)

    def __len__(self) -> int:
        return len(self._shard_of)


def newest(directory: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose files are as they were saved; damaged ones are reported and passed over."""
    found = sorted(map(Checkpoint, directory.glob("step-????????")), key=lambda checkpoint: -checkpoint.step)
    for checkpoint in found:
        fault = checkpoint.fault()
        if fault is None:
            return checkpoint
        report(f"checkpoint {checkpoint.path} cannot be used: {fault}; the one before it is tried")
    return None


# ------------------------------------------------------------------------------------------- saving


def directory_name(step: int) -> str:
    """A checkpoint's name in its directory."""
    return f"step-{step:08d}"


def save(
    directory: Path,
    step: int,
    masters: Masters,
    state: Mapping[str, Any],
    writes: bool,
    kept: int,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Saves everything that training changed. Collective: all ranks read, the one with ``writes`` writes.

    Args:
        state: JSON values that ``Checkpoint.content`` gives back, beside "shards" and "tensors".
        kept: older checkpoints than the newest so many are removed.
        shard_bytes: a shard is written when it holds so much, so that memory stays bounded.

    Returns:
        Its size in bytes; 0 where nothing was written.

    Raises:
        TrainingFailure: the disk is full, or a value to be saved is not finite. Earlier checkpoints are intact.
    """
    final = directory / directory_name(step)
    partial = final.with_name(f"{final.name}.partial")
    if not writes:
        _write_shards(partial, masters, writes, shard_bytes)
        return 0
    with named_when_disk_is_full(partial, f"the checkpoint of step {step}"):
        for stale in directory.glob("step-*.partial"):  # of attempts that were killed while saving
            shutil.rmtree(stale, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)  # only a damaged one can be there
        partial.mkdir(parents=True)
        shard_of, shards = _write_shards(partial, masters, writes, shard_bytes)
        content = {**state, "shards": shards, "tensors": shard_of}
        write_json(partial / STATE_FILE, {**content, "sha256": sha256_json(content)})
        fsync_directory(partial)
    os.replace(partial, final)
    fsync(directory)
    _remove_others(final, kept)
    return sum(path.stat().st_size for path in final.iterdir())


@contextmanager
def named_when_disk_is_full(partial: Path, what: str) -> Iterator[None]:
    """Turns the faults of a disk that takes no more into one message, and clears what was half written.

    Raises:
        TrainingFailure: instead of the system's error.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _is_disk_full(error):
            raise
        shutil.rmtree(partial, ignore_errors=True)
        raise TrainingFailure(
            f"{what} could not be saved in {partial.parent}: {error}. What was saved before is intact; "
            f"{free_bytes(partial.parent) / 2**20:,.0f} MiB are free there now. Free some space and give "
            "the same command again; it goes on from the last checkpoint."
        ) from error


def _is_disk_full(error: OSError | SafetensorError) -> bool:
    """safetensors tells the system's error number in its text only."""
    if isinstance(error, OSError):
        return error.errno in DISK_FULL_ERRNOS
    return any(f"os error {number})" in str(error) for number in DISK_FULL_ERRNOS)


def _write_shards(
    directory: Path, masters: Masters, writes: bool, shard_bytes: int
) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the shard of every parameter and the hash of every shard."""
    shard_of: dict[str, str] = {}
    shards: dict[str, str] = {}
    pending: dict[str, torch.Tensor] = {}

    def write_pending() -> None:
        name = f"{len(shards):05d}.safetensors"
        shards[name] = ""
        if writes:
            save_file(pending, directory / name)
            shards[name] = sha256_file(directory / name)
        pending.clear()

    for parameter in masters.names():
        for part in PARTS:
            value = masters.read(parameter, part)
            _refuse_not_finite(value, parameter, part)
            pending[f"{part}.{parameter}"] = value if writes else value.new_empty(0)
        shard_of[parameter] = f"{len(shards):05d}.safetensors"
        if sum(tensor.nbytes for tensor in pending.values()) >= shard_bytes:
            write_pending()
    if pending:
        write_pending()
    return shard_of, shards


def _refuse_not_finite(value: torch.Tensor, parameter: str, part: str) -> None:
    """Every rank reads the same and raises at the same tensor."""
    if not torch.isfinite(value).all():
        raise TrainingFailure(
            f"the last step left a {part} of {parameter} that is not finite; it was not saved, and the last saved "
            "state is kept. Lower learning_rate or max_grad_norm, or raise warmup_fraction."
        )


def _remove_others(newest: Path, kept: int) -> None:
    """All but the newest so many. Later steps than this one's were passed over as damaged, or it would not be new."""
    found = sorted(newest.parent.glob("step-????????"))
    last = found.index(newest) + 1
    for path in (*found[: max(0, last - kept)], *found[last:]):
        shutil.rmtree(path)


def restore(checkpoint: Checkpoint, masters: Masters) -> None:
    """Puts a checkpoint's tensors and step back into the engine. Every rank reads the same files."""
    tensors = checkpoint.tensors()
    for name in masters.names():
        for part in PARTS:
            masters.write(name, part, tensors.part(name, part))
    masters.set_step(checkpoint.step)

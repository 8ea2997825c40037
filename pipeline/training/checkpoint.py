"""Checkpoints of a training stage: trained master weights, their moments, and progress. No pickle.

A checkpoint is a directory ``step-00000100`` with one safetensors file per rank that saved it, a copy of the metrics
log and ``state.json``. The latter lists every file with its hash, the progress, and what the checkpoint belongs to
(base model and data by hash, settings, seed). Frozen weights are not saved. Every file contains the elements that its
rank owned, under the model's names, and ``state.json`` says where they belong. Full tensors are assembled from them on
reading, so a checkpoint can be loaded with any number of ranks and any ZeRO stage. ``checkpoint_writer`` writes it.

The data order and the random numbers need no state, since both are functions of (seed, step).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from pipeline.files import read_json, sha256_file, sha256_json
from pipeline.tracking import METRICS_FILE
from pipeline.training.optimizer_state import OptimizerState

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
        """Returns ``state.json``: progress, identity, hashes of all files, and where every parameter is stored."""
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
    """One float32 tensor of every trained parameter in a checkpoint. Only the one being accessed is in memory.

    Args:
        directory: of the checkpoint.
        places: where each parameter is stored: its shape and its parts, as ``checkpoint_writer.Parts`` has them, or
            the file with the full tensors, in checkpoints of earlier versions.
        key: which tensor of the optimizer state.
    """

    def __init__(self, directory: Path, places: Mapping[str, Any], key: str = "weight") -> None:
        self._directory, self._places, self._key = directory, places, key
        self._files: dict[str, Any] = {}

    def read(self, name: str, key: str) -> torch.Tensor:
        """Returns a parameter's weight, moment or average; ``key`` is one of ``OptimizerState.keys``."""
        place = self._places[name]
        if isinstance(place, str):
            return self._stored(place, f"{key}.{name}")
        value = torch.empty(math.prod(place["shape"]))
        for file, start, elements in place["parts"]:
            value[start : start + elements] = self._stored(file, f"{key}.{name}")
        return value.view(place["shape"])

    def _stored(self, file: str, entry: str) -> torch.Tensor:
        if file not in self._files:
            self._files[file] = safe_open(self._directory / file, framework="pt")
        tensor: torch.Tensor = self._files[file].get_tensor(entry)
        return tensor

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.read(name, self._key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


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

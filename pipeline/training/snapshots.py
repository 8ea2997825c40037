"""Snapshots: the trained weights at chosen fractions of the steps, saved inside a training stage's artifact.

A snapshot holds the trained parameters only, in the model's own dtype, so its size is that of the trained layers. All
other weights are unchanged in the finished artifact. The full model is materialized from both while it is evaluated.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from pipeline.files import fsync_directory, is_intact, seal
from pipeline.models.reading import ModelDirectory
from pipeline.models.replacing import write_with_replaced
from pipeline.models.stored_parameters import StoredParameters
from pipeline.models.writing import ShardWriter
from pipeline.training.job import snapshot_dir

SNAPSHOT_SEAL = ".snapshot.sha256"  # hashes of its files, until the training is committed


def save_snapshot(
    directory: Path, base: StoredParameters, names: Iterable[str], weights: Iterator[tuple[str, torch.Tensor]]
) -> None:
    """Writes trained weights to ``directory``. An existing snapshot is removed once its replacement is complete.

    Args:
        directory: the snapshot's directory.
        base: the model being trained. Weights are written as it stores them, in its dtypes.
        names: of all trained parameters, in memory.
        weights: pairs of name and tensor, consumed one at a time.
    """
    partial = partial_snapshot(directory)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with ShardWriter(partial, {name: base.specs[name] for each in names for name in base.names(each)}) as writer:
        for parameter, weight in weights:
            for name in base.names(parameter):
                writer.write(name, base.part(parameter, name, weight))
    seal(partial / SNAPSHOT_SEAL, partial.glob("*.safetensors*"))
    fsync_directory(partial)
    # An existing snapshot is of an earlier attempt at the same steps, and holds the same weights.
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(partial, directory)


def is_damaged(directory: Path) -> bool:
    """Whether a snapshot of an interrupted training differs from what was saved."""
    hashes = directory / SNAPSHOT_SEAL
    return hashes.exists() and not is_intact(hashes)  # earlier versions wrote none


def partial_snapshot(directory: Path) -> Path:
    """Returns the directory in which the snapshot ``directory`` is written before it is complete."""
    return directory.with_name(f".{directory.name}.partial")


def materialize_snapshot(artifact: Path, fraction: float, out: Path) -> None:
    """Writes the full model as it was after ``fraction`` of the steps of a finished training stage."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    snapshot = snapshot_dir(artifact, fraction)
    trained = ModelDirectory(snapshot, sorted(snapshot.glob("*.safetensors")))  # a snapshot has no config
    write_with_replaced(artifact, out, trained.tensors())

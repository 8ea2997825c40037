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

from pipeline.files import fsync_directory
from pipeline.models.export import export_with_replaced
from pipeline.models.reading import ModelDirectory
from pipeline.models.writing import ShardWriter
from pipeline.training.job import snapshot_dir


def save_snapshot(
    place: Path, base: ModelDirectory, names: Iterable[str], weights: Iterator[tuple[str, torch.Tensor]]
) -> None:
    """Writes trained weights into the new directory ``place``, which is whole or absent, or as it was.

    Args:
        base: the model that is trained; weights are rounded to its dtypes.
        names: of all trained weights.
        weights: name and tensor, one at a time.
    """
    partial = partial_snapshot(place)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with ShardWriter(partial, {name: base.specs[name] for name in names}) as writer:
        for name, weight in weights:
            writer.write(name, weight.to(base.specs[name].dtype))
    fsync_directory(partial)
    shutil.rmtree(place, ignore_errors=True)  # the same weights, of an attempt that was stopped after this step
    os.replace(partial, place)


def partial_snapshot(place: Path) -> Path:
    """Where ``place`` is while it is not whole."""
    return place.with_name(f".{place.name}.partial")


def materialize_snapshot(artifact: Path, fraction: float, out: Path) -> None:
    """Writes the full model as it was after ``fraction`` of the steps of a finished training stage."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    snapshot = snapshot_dir(artifact, fraction)
    trained = ModelDirectory(snapshot, sorted(snapshot.glob("*.safetensors")))  # a snapshot has no config of its own
    export_with_replaced(artifact, out, trained.tensors())

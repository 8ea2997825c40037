"""Models on the way: at chosen fractions of the steps, what training has changed until then stays with the artifact.

Only trained weights are kept, in the model's own dtype, so that a kept model costs the new layers' size; everything
else stands in the finished artifact, unchanged. A whole directory is made of both for as long as it is scored.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from pipeline.files import sync_directory
from pipeline.models.reading import ModelDirectory, export_with_replaced
from pipeline.models.writing import ShardWriter
from pipeline.training.job import kept_model


def keep(place: Path, base: ModelDirectory, names: Iterable[str], weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Writes trained weights into the new directory ``place``, which is whole or absent, or as it was.

    Args:
        base: the model that is trained; weights are rounded to its dtypes.
        names: of all trained weights.
        weights: name and tensor, one at a time.
    """
    partial = half_kept(place)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with ShardWriter(partial, {name: base.specs[name] for name in names}) as writer:
        for name, weight in weights:
            writer.write(name, weight.to(base.specs[name].dtype))
    sync_directory(partial)
    shutil.rmtree(place, ignore_errors=True)  # the same weights, of an attempt that was stopped after this step
    os.replace(partial, place)


def half_kept(place: Path) -> Path:
    """Where ``place`` is while it is not whole."""
    return place.with_name(f".{place.name}.partial")


def rebuild(artifact: Path, fraction: float, out: Path) -> None:
    """Writes the whole model as it was after ``fraction`` of a finished training artifact's steps."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    kept = kept_model(artifact, fraction)
    trained = ModelDirectory(kept, sorted(kept.glob("*.safetensors")))  # a part of a model has no config
    export_with_replaced(artifact, out, trained.tensors())

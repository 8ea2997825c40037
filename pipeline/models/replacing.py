"""Writes a model directory that differs from an existing one in some tensors only."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from pipeline.models.reading import EXPANSION_FILE, ModelDirectory, copy_side_files
from pipeline.models.stored_parameters import StoredParameters
from pipeline.models.writing import ShardWriter


def write_with_replaced(base_dir: Path, out_dir: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a model directory equal to ``base_dir`` except for the given parameters.

    Args:
        base_dir: a model directory. Its config, tokenizer and expansion.json are copied byte for byte.
        out_dir: an existing directory.
        tensors: replacements by their names in memory or on disk, with the base's shapes. They are written under the
            base's names, in its dtypes. Each is looked up when it is written, so the mapping may load them lazily.

    Raises:
        ValueError: the base has no tensor of a name, or has it with another shape.
    """
    base = ModelDirectory(base_dir)
    stored = StoredParameters(base)
    # In the order of stored names, a layer's experts alternate between two parameters: gate_up_proj and down_proj.
    tensor_of = lru_cache(maxsize=2)(tensors.__getitem__)
    parameter_of: dict[str, str] = {}
    for given, tensor in tensors.items():
        parameter_of |= dict.fromkeys(stored.names(given), given)
        if tuple(tensor.shape) != (shape := stored.shape(given)):
            raise ValueError(f"{given} has shape {tuple(tensor.shape)}, but {shape} in {base_dir}")
    with ShardWriter(out_dir, base.specs) as writer:
        for name in base.specs:
            parameter = parameter_of.get(name)
            if parameter is None:
                writer.write(name, base.read(name))
            else:
                writer.write(name, stored.part(parameter, name, tensor_of(parameter).detach().cpu()))
    copy_side_files(base_dir, out_dir)
    for name in ("config.json", EXPANSION_FILE):
        if (base_dir / name).is_file():
            shutil.copyfile(base_dir / name, out_dir / name)

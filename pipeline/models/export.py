"""Writes a model directory that differs from an existing one in some tensors only.

Parameters are given by their names in memory. Transformers stacks the experts of a layer into one parameter and
renames some tensors when it loads a model, so both are reverted before a parameter is written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from pipeline.models.reading import EXPANSION_FILE, ModelDirectory, copy_side_files
from pipeline.models.writing import ShardWriter


def export_with_replaced(base_dir: Path, out_dir: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a model directory equal to ``base_dir`` except for the given tensors.

    Args:
        base_dir: a model directory. Its config, tokenizer and expansion.json are copied byte for byte.
        out_dir: an existing directory.
        tensors: replacements by their names in memory or on disk, with the base's shapes. They are cast to the base's
            dtypes. Each is looked up when it is written, so the mapping may load them lazily.

    Raises:
        ValueError: the base has no tensor of a name, or has it with another shape.
    """
    base = ModelDirectory(base_dir)
    if not set(tensors) <= set(base.specs):
        tensors = _TensorsByStoredName(base_dir, base.specs, tensors)
    for name, tensor in tensors.items():
        if name not in base.specs:
            raise ValueError(f"{base_dir} has no tensor {name}")
        if tuple(tensor.shape) != base.specs[name].shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but {base.specs[name].shape} in {base_dir}")
    with ShardWriter(out_dir, base.specs) as writer:
        for name, spec in base.specs.items():
            tensor = tensors[name].detach().cpu() if name in tensors else base.read(name)
            writer.write(name, tensor.to(spec.dtype))
    copy_side_files(base_dir, out_dir)
    for name in ("config.json", EXPANSION_FILE):
        if (base_dir / name).is_file():
            shutil.copyfile(base_dir / name, out_dir / name)


class _TensorsByStoredName(Mapping[str, Tensor]):
    """A model's parameters by the names they have in its directory, split where they are stored in parts.

    Args:
        stored: all names in the directory.
        tensors: some of the model's parameters by their names in memory.
    """

    def __init__(self, model_dir: Path, stored: Collection[str], tensors: Mapping[str, Tensor]) -> None:
        # Imported here because it takes more than a second, and most models are stored as they are held in memory.
        from transformers.core_model_loading import revert_weight_conversion

        from pipeline.models.built import build_on_meta

        model = build_on_meta(model_dir)

        def revert(parameter: str) -> dict[str, Tensor]:
            reverted: dict[str, Tensor] = revert_weight_conversion(model, {parameter: tensors[parameter]})
            return reverted

        self._tensors = tensors
        # In the order of stored names, a layer's experts alternate between two parameters: gate_up_proj and down_proj.
        self._revert: Callable[[str], dict[str, Tensor]] = lru_cache(maxsize=2)(revert)
        self._parameter_of: dict[str, str] = {}  # by stored name
        on_meta = dict(model.named_parameters())
        for name in tensors:
            converted = name not in stored and name in on_meta
            parts = revert_weight_conversion(model, {name: on_meta[name].data}) if converted else (name,)
            self._parameter_of.update(dict.fromkeys(parts, name))

    def __getitem__(self, name: str) -> Tensor:
        parameter = self._parameter_of[name]
        return self._tensors[name] if parameter == name else self._revert(parameter)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameter_of)

    def __len__(self) -> int:
        return len(self._parameter_of)

"""A Hugging Face model directory as streamed tensors: shards are mapped into memory, and what is asked for is read."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, dtype

from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.models.source import SIDE_FILES
from pipeline.models.stored_names import by_stored_name
from pipeline.models.weight_files import read_header, read_headers
from pipeline.models.writing import DTYPES, ShardWriter, StoredBytes, TensorSpec

EXPANSION_FILE = "expansion.json"


class ModelDirectory:
    """A model directory whose tensors are read one at a time.

    Args:
        files: its weight files; None: those of a whole model, as its index names them.

    Attributes:
        specs: every tensor by name.

    Raises:
        UserError: it holds no whole safetensors model, or tensors of a packed type.
    """

    def __init__(self, path: Path, files: Iterable[Path] | None = None) -> None:
        self.path = path
        self.specs: dict[str, TensorSpec] = {}
        self._places: dict[str, StoredBytes] = {}
        self._open: dict[Path, Any] = {}
        shards = read_headers(path) if files is None else {shard: read_header(shard) for shard in files}
        for shard, (entries, first) in shards.items():
            for name, entry in entries.items():
                self.specs[name] = TensorSpec(_dtype(entry.dtype, name, path), entry.shape)
                self._places[name] = StoredBytes(shard, first + entry.begin)

    @property
    def config(self) -> dict[str, Any]:
        """config.json as it stands."""
        config: dict[str, Any] = read_json(self.path / "config.json")
        return config

    def read(self, name: str) -> Tensor:
        """One tensor, as stored."""
        shard = self._places[name].file
        if shard not in self._open:
            self._open[shard] = safe_open(shard, framework="pt")
        tensor: Tensor = self._open[shard].get_tensor(name)
        return tensor

    def tensors(self) -> Mapping[str, Tensor]:
        """All tensors by name, each read from disk whenever it is asked for."""
        return _StoredTensors(self)

    def place(self, name: str) -> StoredBytes:
        """Where one tensor's bytes lie; for ``ShardWriter.copy``."""
        return self._places[name]


class _StoredTensors(Mapping[str, Tensor]):
    def __init__(self, directory: ModelDirectory) -> None:
        self._directory = directory

    def __getitem__(self, name: str) -> Tensor:
        return self._directory.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._directory.specs)

    def __len__(self) -> int:
        return len(self._directory.specs)


def _dtype(name: str, tensor: str, path: Path) -> dtype:
    if name not in DTYPES:
        raise UserError(
            setting="model.path",
            value=path,
            rule=f"{tensor} is stored as {name}, a packed type that cannot be computed with here",
            remedy="Give the model as it was before quantisation, in bfloat16, float16 or float32.",
        )
    return DTYPES[name]


def copy_side_files(source: Path, target: Path) -> None:
    """Copies tokenizer, chat template and generation config byte for byte."""
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def export_with_replaced(base_dir: Path, out_dir: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a model directory equal to ``base_dir`` but for some tensors.

    Args:
        base_dir: a model directory; its config, tokenizer and expansion.json are copied byte for byte.
        tensors: replacements by their names in memory or on disk, shaped as the base's and rounded to its dtype.

    Raises:
        ValueError: a name that the base does not have, or another shape.
    """
    base = ModelDirectory(base_dir)
    tensors = by_stored_name(base_dir, base.specs, tensors)
    for name, tensor in tensors.items():
        if name not in base.specs:
            raise ValueError(f"{base_dir} has no tensor {name}")
        if tuple(tensor.shape) != base.specs[name].shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, and the base's has {base.specs[name].shape}")
    with ShardWriter(out_dir, base.specs) as writer:
        for name, spec in base.specs.items():
            tensor = tensors[name].detach().cpu() if name in tensors else base.read(name)
            writer.write(name, tensor.to(spec.dtype))
    copy_side_files(base_dir, out_dir)
    for name in ("config.json", EXPANSION_FILE):
        if (base_dir / name).is_file():
            shutil.copyfile(base_dir / name, out_dir / name)

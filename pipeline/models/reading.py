"""Reads Hugging Face model directories: shards are memory-mapped, and tensors are loaded one at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import safe_open
from torch import Tensor

from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.models.source import code_files, side_files
from pipeline.models.tensors import SAFETENSORS_DTYPES, TensorSpec
from pipeline.models.weight_files import StoredBytes, read_header, read_headers

EXPANSION_FILE = "expansion.json"


class StoredWeights(Protocol):
    """The tensors of a checkpoint: dtype and shape by name, and their values one at a time."""

    specs: dict[str, TensorSpec]

    def read(self, name: str) -> Tensor:
        """Reads one tensor, perhaps in a wider dtype than the stored one."""
        ...


class ModelDirectory:
    """A model directory whose tensors are read one at a time.

    Args:
        path: the directory.
        files: its weight files. By default those of a complete model, as listed in its index.

    Attributes:
        specs: dtype and shape of every tensor by name.

    Raises:
        UserError: the directory does not hold a complete safetensors model, or a tensor has a packed dtype.
    """

    dtypes = SAFETENSORS_DTYPES  # that may be read, by their names in headers

    def __init__(self, path: Path, files: Iterable[Path] | None = None) -> None:
        self.path = path
        self.specs: dict[str, TensorSpec] = {}
        self._places: dict[str, StoredBytes] = {}
        self._open: dict[Path, Any] = {}
        shards = read_headers(path) if files is None else {shard: read_header(shard) for shard in files}
        for shard, (entries, first) in shards.items():
            for name, entry in entries.items():
                if entry.dtype not in self.dtypes:
                    raise UserError(
                        setting="model.path",
                        value=path,
                        rule=f"{name} has the packed dtype {entry.dtype}, which is not supported",
                        remedy="Set model.path to the unquantized model, in bfloat16, float16 or float32.",
                    )
                self.specs[name] = TensorSpec(self.dtypes[entry.dtype], entry.shape)
                self._places[name] = StoredBytes(shard, first + entry.begin)

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        config: dict[str, Any] = read_json(self.path / "config.json")
        return config

    def read(self, name: str) -> Tensor:
        """Reads one tensor in its stored dtype."""
        shard = self._places[name].file
        if shard not in self._open:
            self._open[shard] = safe_open(shard, framework="pt")
        tensor: Tensor = self._open[shard].get_tensor(name)
        return tensor

    def tensors(self) -> Mapping[str, Tensor]:
        """Returns all tensors by name. Each is read from disk on every access."""
        return _LazyTensors(self)

    def place(self, name: str) -> StoredBytes:
        """Returns the location of a tensor's bytes, for ``ShardWriter.copy``."""
        return self._places[name]


class _LazyTensors(Mapping[str, Tensor]):
    def __init__(self, directory: ModelDirectory) -> None:
        self._directory = directory

    def __getitem__(self, name: str) -> Tensor:
        return self._directory.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._directory.specs)

    def __len__(self) -> int:
        return len(self._directory.specs)


def copy_side_files(source: Path, target: Path, with_code: bool = True) -> None:
    """Copies tokenizer, chat template, generation config and, of a model that reads images, its processor.

    Args:
        source: the model directory.
        target: an existing directory.
        with_code: whether the model's own code is copied as well. Directories that the pipeline has written only have
            it if the settings ask for it.
    """
    for name in (*side_files(source), *(code_files(source) if with_code else ())):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)

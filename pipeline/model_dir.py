"""A Hugging Face model directory as streamed tensors: read one by name, write shards one tensor at a time.

Nothing here holds a model. A reader maps shards into memory and gives what is asked for; a writer is told all names,
dtypes and shapes first, lays the files out, and then takes the tensors in any order.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.artifact import read_json, write_json
from pipeline.errors import UserError
from pipeline.source import SIDE_FILES
from pipeline.weight_files import INDEX, SINGLE, find_weights, read_header

MAX_SHARD_BYTES = 5_000_000_000
EXPANSION_FILE = "expansion.json"

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor before it is read or written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size in a file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


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
        self._files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for shard in find_weights(path) if files is None else files:
            for name, entry in read_header(shard).items():
                self.specs[name] = TensorSpec(_dtype(entry.dtype, name, path), entry.shape)
                self._files[name] = shard

    @property
    def config(self) -> dict[str, Any]:
        """config.json as it stands."""
        config: dict[str, Any] = read_json(self.path / "config.json")
        return config

    def read(self, name: str) -> Tensor:
        """One tensor, as stored."""
        shard = self._files[name]
        if shard not in self._open:
            self._open[shard] = safe_open(shard, framework="pt")
        tensor: Tensor = self._open[shard].get_tensor(name)
        return tensor

    def tensors(self) -> Mapping[str, Tensor]:
        """All tensors by name, each read from disk whenever it is asked for."""
        return _StoredTensors(self)


class _StoredTensors(Mapping[str, Tensor]):
    def __init__(self, directory: ModelDirectory) -> None:
        self._directory = directory

    def __getitem__(self, name: str) -> Tensor:
        return self._directory.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._directory.specs)

    def __len__(self) -> int:
        return len(self._directory.specs)


def _dtype(name: str, tensor: str, path: Path) -> torch.dtype:
    if name not in _DTYPES:
        raise UserError(
            setting="model.path",
            value=path,
            rule=f"{tensor} is stored as {name}, a packed type that cannot be computed with here",
            remedy="Give the model as it was before quantisation, in bfloat16, float16 or float32.",
        )
    return _DTYPES[name]


class ShardWriter:
    """Writes a directory's weight files, tensors in any order; the files get their names in ``finish``.

    Args:
        directory: weight files that an earlier attempt left there are removed.
        specs: every tensor that will be written.
        max_shard_bytes: of tensors in one file; a larger tensor gets a file of its own.
    """

    def __init__(
        self, directory: Path, specs: Mapping[str, TensorSpec], max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        remove_weights(directory)
        self._directory, self._specs = directory, specs
        self._shards = _fill_shards(specs, max_shard_bytes)
        self._begin: dict[str, int] = {}
        for shard, names in enumerate(self._shards):
            header, begin = _lay_out(names, specs)
            self._begin.update(begin)
            self._partial(shard).write_bytes(header)
        self._shard_of = {name: shard for shard, names in enumerate(self._shards) for name in names}
        self._missing = set(specs)

    def _partial(self, shard: int) -> Path:
        return self._directory / f".model-{shard}.partial"

    def write(self, name: str, tensor: Tensor) -> None:
        """Puts one tensor in its place, once; its dtype and shape are those announced."""
        spec = self._specs[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), f"{name} is not as announced"
        self._missing.remove(name)
        with open(self._partial(self._shard_of[name]), "r+b") as stream:
            stream.seek(self._begin[name])
            stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Gives the files their names and writes the index; every announced tensor has been written by now."""
        assert not self._missing, f"not written: {', '.join(sorted(self._missing))}"
        count = len(self._shards)
        names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for shard, name in enumerate(names):
            self._partial(shard).replace(self._directory / name)
        if count > 1:
            total = sum(spec.bytes for spec in self._specs.values())
            weight_map = {tensor: names[shard] for tensor, shard in self._shard_of.items()}
            write_json(self._directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()


def remove_weights(directory: Path) -> None:
    """Removes what an earlier attempt at writing weights left there."""
    for stale in [*directory.glob("model*.safetensors*"), *directory.glob(".model*.partial")]:
        stale.unlink()


def _fill_shards(specs: Mapping[str, TensorSpec], max_bytes: int) -> list[list[str]]:
    """Names by file, in their order."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.bytes
    return shards


def _lay_out(names: Iterable[str], specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """A safetensors file's first bytes, and where in the file each tensor begins."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin: dict[str, int] = {}
    end = 0
    for name in names:
        begin[name], end = end, end + specs[name].bytes
        dtype, shape = _DTYPE_NAMES[specs[name].dtype], list(specs[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = len(text).to_bytes(8, "little") + text
    return first, {name: len(first) + offset for name, offset in begin.items()}


def copy_side_files(source: Path, target: Path) -> None:
    """Copies tokenizer, chat template and generation config byte for byte."""
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def export_with_replaced(base_dir: Path, out_dir: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a model directory equal to ``base_dir`` but for some tensors.

    Args:
        base_dir: a model directory; its config, tokenizer and expansion.json are copied byte for byte.
        tensors: replacements by name, shaped as the base's and rounded to the base's dtype.

    Raises:
        ValueError: a name that the base does not have, or another shape.
    """
    base = ModelDirectory(base_dir)
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

"""A Hugging Face model directory as streamed tensors: read one by name, write shards one tensor at a time.

Nothing here holds a model. A reader maps shards into memory and gives what is asked for; a writer is told all names,
dtypes and shapes first, lays the files out, and then takes the tensors in any order.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
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
KEPT = ".model.kept"  # the names of tensors that outlast an interruption, a line each

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


@dataclass(frozen=True)
class StoredBytes:
    """Where a tensor begins in a file."""

    file: Path
    offset: int


class ModelDirectory:
    """A model directory whose tensors are read one at a time.

    Attributes:
        specs: every tensor by name.

    Raises:
        UserError: it holds no whole safetensors model, or tensors of a packed type.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.specs: dict[str, TensorSpec] = {}
        self._places: dict[str, StoredBytes] = {}
        self._open: dict[Path, Any] = {}
        for shard in find_weights(path):
            entries, first = read_header(shard)
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

    def place(self, name: str) -> StoredBytes:
        """Where one tensor's bytes lie; for ``ShardWriter.copy``."""
        return self._places[name]


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
    """Writes a directory's weight files, tensors in any order; the files get their names at the end.

    Nothing that was written is lost by an interruption after ``keep``: a writer of the same tensors in the same
    directory finds it in ``written``.

    Args:
        directory: weight files of other tensors that an earlier attempt left there are removed.
        specs: every tensor that will be written.
        max_shard_bytes: of tensors in one file; a larger tensor gets a file of its own.

    Attributes:
        written: names that need not be written any more.
    """

    def __init__(
        self, directory: Path, specs: Mapping[str, TensorSpec], max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        self._directory, self._specs = directory, specs
        self._shards = _fill_shards(specs, max_shard_bytes)
        self._shard_of = {name: shard for shard, names in enumerate(self._shards) for name in names}
        self._begin: dict[str, int] = {}
        headers = []
        for names in self._shards:
            header, begin = _lay_out(names, specs)
            headers.append(header)
            self._begin.update(begin)
        self.written = self._kept(headers)
        self._unkept: list[str] = []
        if not self.written:
            remove_weights(directory)
        self._files = [os.open(self._partial(shard), os.O_RDWR | os.O_CREAT, 0o666) for shard in range(len(headers))]
        for file, header in zip(self._files, headers, strict=True):
            _write_at(file, header, 0)

    def _partial(self, shard: int) -> Path:
        return self._directory / f".model-{shard}.partial"

    def _kept(self, headers: Iterable[bytes]) -> set[str]:
        """What an interrupted writer of the very same files had kept."""
        journal = self._directory / KEPT
        if not journal.is_file():
            return set()
        for shard, header in enumerate(headers):
            if not self._partial(shard).is_file():
                return set()
            with open(self._partial(shard), "rb") as stream:
                if stream.read(len(header)) != header:
                    return set()
        *names, _cut_short = journal.read_text().split("\n")
        return set(names)

    def write(self, name: str, tensor: Tensor) -> None:
        """Puts one tensor in its place, once; its dtype and shape are those announced."""
        spec = self._specs[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), f"{name} is not as announced"
        assert name not in self.written, f"{name} is written twice"
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        _write_at(self._files[self._shard_of[name]], data, self._begin[name])
        self._note_written(name)

    def copy(self, name: str, source: StoredBytes) -> None:
        """Puts a tensor of the announced dtype and shape in its place, once, without bringing it into this process."""
        with open(source.file, "rb") as stream:
            _copy_to(self._files[self._shard_of[name]], self._begin[name], stream.fileno(), source.offset,
                     self._specs[name].bytes)
        self._note_written(name)

    def _note_written(self, name: str) -> None:
        self.written.add(name)
        self._unkept.append(name)

    def keep(self) -> None:
        """Makes what has been written so far outlast an interruption, a power cut included."""
        for shard in {self._shard_of[name] for name in self._unkept}:
            os.fsync(self._files[shard])
        with open(self._directory / KEPT, "a") as journal:
            journal.writelines(f"{name}\n" for name in self._unkept)
            journal.flush()
            os.fsync(journal.fileno())
        self._unkept.clear()

    def finish(self) -> None:
        """Gives the files their names and writes the index; every announced tensor has been written by now."""
        missing = self._specs.keys() - self.written
        assert not missing, f"not written: {', '.join(sorted(missing))}"
        count = len(self._shards)
        names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for shard, name in enumerate(names):
            self._partial(shard).replace(self._directory / name)
        if count > 1:
            total = sum(spec.bytes for spec in self._specs.values())
            weight_map = {tensor: names[shard] for tensor, shard in self._shard_of.items()}
            write_json(self._directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        (self._directory / KEPT).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            os.close(file)
        if kind is None:
            self.finish()


def _write_at(file: int, data: bytes | memoryview, offset: int) -> None:
    """All of it; one call may write less."""
    rest = memoryview(data)
    while rest:
        count = os.pwrite(file, rest, offset)
        rest, offset = rest[count:], offset + count


def _copy_to(target: int, at: int, source: int, begin: int, count: int) -> None:
    """Has the kernel copy ``count`` bytes from file to file (Linux), as ``cp`` does."""
    os.lseek(target, at, os.SEEK_SET)
    end = begin + count
    while begin < end:
        begin += os.sendfile(target, source, begin, end - begin)


def remove_weights(directory: Path) -> None:
    """Removes what an earlier attempt at writing weights left there."""
    for stale in [*directory.glob("model*.safetensors*"), *directory.glob(".model*.partial"), directory / KEPT]:
        stale.unlink(missing_ok=True)


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

"""Writes the weight files of a model directory one tensor at a time, in any order, and resumes after an interruption.

Nothing here holds a model in memory. All names, dtypes and shapes are given in advance, so the files are laid out and
their disk space is allocated before the first tensor is written.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.files import disk_errors_as_user_errors, report_once, write_json
from pipeline.models.tensors import SAFETENSORS_NAMES, TensorSpec
from pipeline.models.weight_files import INDEX, SINGLE, StoredBytes

MAX_SHARD_BYTES = 5_000_000_000
HASHED_BYTES = 2**20  # at a time
# Names of the tensors and parts that survive an interruption, one per line. The name of a tensor, or of the last
# part of one, is followed by the tensor's hash.
PROGRESS_FILE = ".model.kept"


class ShardWriter:
    """Writes the weight files of a directory, and renames them to their final names when all tensors are written.

    Tensors written before the last ``flush`` survive an interruption: a new writer of the same tensors in the same
    directory lists them in ``written``.

    Args:
        directory: an existing directory. Weight files that an earlier attempt wrote there with other tensors are
            removed.
        specs: every tensor that will be written.
        parts: for every tensor that is written in parts, the names of all its parts.
        max_shard_bytes: bytes of tensors per file. A larger tensor gets its own file.

    Attributes:
        written: names of the tensors and parts that need not be written again.

    Raises:
        UserError: the disk has too little space for the files.
    """

    def __init__(
        self,
        directory: Path,
        specs: Mapping[str, TensorSpec],
        parts: Mapping[str, Iterable[str]] | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self._directory, self._specs, self._parts = directory, specs, parts or {}
        self._shards = _assign_shards(specs, max_shard_bytes)
        self._shard_of = {name: shard for shard, names in enumerate(self._shards) for name in names}
        self._stored_of = {part: name for name in specs for part in self._parts.get(name, (name,))}
        self._begin: dict[str, int] = {}
        headers = []
        for names in self._shards:
            header, begin = safetensors_header({name: specs[name] for name in names}, {"format": "pt"})
            headers.append(header)
            self._begin.update(begin)
        self.written = self._read_progress(headers)
        self._unflushed: dict[str, int] = {}  # shard by name
        self._mapped: dict[str, Tensor] = {}
        if not self.written:
            remove_weights(directory)
        self._files = [os.open(self._partial(shard), os.O_RDWR | os.O_CREAT, 0o666) for shard in range(len(headers))]
        self._allocate(headers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mapped.clear()
        self._close()
        if kind is None:
            self.finish()

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor, once, with the dtype and shape of its spec."""
        spec = self._specs[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), f"{name} differs from its spec"
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        _write_at(self._files[self._shard_of[name]], data, self._begin[name])
        self._mark_written(name, self._shard_of[name])

    def copy(self, name: str, source: StoredBytes) -> None:
        """Copies one tensor, once, from another file without reading it into this process.

        Args:
            source: where a tensor with the dtype and shape of the spec is stored.
        """
        shard = self._shard_of[name]
        with open(source.file, "rb") as stream:
            _copy(stream.fileno(), source.offset, self._files[shard], self._begin[name], self._specs[name].bytes)
        self._mark_written(name, shard)

    def part(self, name: str, part: str) -> Tensor:
        """Returns a tensor that shares its memory with the file, for the caller to fill in one of its parts.

        The part counts as written.
        """
        shard = self._shard_of[name]
        if name not in self._mapped:
            self._mapped[name] = _map(self._files[shard], self._specs[name], self._begin[name])
        self._mark_written(part, shard)
        return self._mapped[name]

    def flush(self) -> None:
        """Makes everything written so far survive an interruption, including a power failure."""
        # The data must be on disk before the file that lists it.
        for shard in set(self._unflushed.values()):
            os.fsync(self._files[shard])
        lines = [self._progress_line(name) for name in self._unflushed]
        with open(self._directory / PROGRESS_FILE, "a") as progress:
            progress.writelines(lines)
            progress.flush()
            os.fsync(progress.fileno())
        self._unflushed.clear()

    def finish(self) -> None:
        """Renames the files and writes the index. All tensors of ``specs`` must have been written."""
        expected = {part for name in self._specs for part in self._parts.get(name, (name,))}
        assert expected <= self.written, f"not written: {', '.join(sorted(expected - self.written))}"
        count = len(self._shards)
        names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for shard, name in enumerate(names):
            self._partial(shard).replace(self._directory / name)
        if count > 1:
            total = sum(spec.bytes for spec in self._specs.values())
            weight_map = {tensor: names[shard] for tensor, shard in self._shard_of.items()}
            write_json(self._directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        (self._directory / PROGRESS_FILE).unlink(missing_ok=True)

    def _partial(self, shard: int) -> Path:
        return self._directory / f".model-{shard}.partial"

    def _mark_written(self, name: str, shard: int) -> None:
        assert name not in self.written, f"{name} is written twice"
        self.written.add(name)
        self._unflushed[name] = shard

    def _read_progress(self, headers: Iterable[bytes]) -> set[str]:
        """Returns the names that an interrupted writer of exactly the same files had flushed."""
        progress = self._directory / PROGRESS_FILE
        if not progress.is_file():
            return set()
        for shard, header in enumerate(headers):
            if not self._partial(shard).is_file():
                return set()
            with open(self._partial(shard), "rb") as stream:
                if stream.read(len(header)) != header:
                    return set()
        # The last line is empty, or one that an interruption truncated.
        *lines, _truncated = progress.read_text(errors="replace").split("\n")
        names = set()
        for line in lines:
            name, _, digest = line.partition(" ")
            if (stored := self._stored_of.get(name)) is None:
                continue  # after a truncated name
            if digest and digest != self._hash(stored):
                report_once(f"{name} in {self._directory} is damaged: all weights are written again")
                return set()
            names.add(name)
        return names

    def _progress_line(self, name: str) -> str:
        stored = self._stored_of[name]
        is_complete = self.written.issuperset(self._parts.get(stored, (stored,)))
        return f"{name} {self._hash(stored)}\n" if is_complete else f"{name}\n"

    def _hash(self, stored: str) -> str:
        """Returns the hash of a stored tensor, as its file has it."""
        digest = hashlib.sha256()
        with open(self._partial(self._shard_of[stored]), "rb") as stream:
            stream.seek(self._begin[stored])
            left = self._specs[stored].bytes
            while left and (chunk := stream.read(min(left, HASHED_BYTES))):
                digest.update(chunk)
                left -= len(chunk)
        return digest.hexdigest()

    def _allocate(self, headers: Iterable[bytes]) -> None:
        """Allocates the files at their full size, so that a lack of disk space is detected before any work is done."""
        try:
            with disk_errors_as_user_errors(self._directory, sum(spec.bytes for spec in self._specs.values())):
                for file, header, names in zip(self._files, headers, self._shards, strict=True):
                    os.posix_fallocate(file, 0, len(header) + sum(self._specs[name].bytes for name in names))
                    _write_at(file, header, 0)
        except UserError:
            self._close()
            # Free the space that was allocated, unless the files hold the work of an earlier attempt.
            if not self.written:
                remove_weights(self._directory)
            raise

    def _close(self) -> None:
        for file in self._files:
            os.close(file)


def remove_weights(directory: Path) -> None:
    """Removes the weight files, complete and partial, that an earlier attempt wrote to a directory."""
    files = [*directory.glob("model*.safetensors*"), *directory.glob(".model*.partial"), directory / PROGRESS_FILE]
    for file in files:
        file.unlink(missing_ok=True)


def _assign_shards(specs: Mapping[str, TensorSpec], max_bytes: int) -> list[list[str]]:
    """Returns the names of the tensors in each file, in the order of ``specs``."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.bytes
    return shards


def safetensors_header(
    specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """Returns the bytes of a safetensors file before its first tensor, and the offset of every tensor in the file."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    begin: dict[str, int] = {}
    end = 0
    for name, spec in specs.items():
        begin[name], end = end, end + spec.bytes
        dtype, shape = SAFETENSORS_NAMES[spec.dtype], list(spec.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    prefix = len(text).to_bytes(8, "little") + text
    return prefix, {name: len(prefix) + offset for name, offset in begin.items()}


def _write_at(file: int, data: bytes | memoryview, offset: int) -> None:
    """Writes all of the data, since a single call to ``pwrite`` may write less."""
    rest = memoryview(data)
    while rest:
        count = os.pwrite(file, rest, offset)
        rest, offset = rest[count:], offset + count


def _copy(source: int, begin: int, target: int, at: int, count: int) -> None:
    """Copies ``count`` bytes from file to file within the kernel (Linux), as ``cp`` does."""
    os.lseek(target, at, os.SEEK_SET)
    end = begin + count
    while begin < end:
        begin += os.sendfile(target, source, begin, end - begin)


def _map(file: int, spec: TensorSpec, begin: int) -> Tensor:
    """Returns a tensor that shares its memory with a file."""
    content = mmap.mmap(file, begin + spec.bytes)
    return torch.frombuffer(content, dtype=spec.dtype, offset=begin).view(spec.shape)

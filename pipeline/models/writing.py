"""Writes a model directory's weight files one tensor at a time, in any order, and goes on where it was interrupted.

Nothing here holds a model. All names, dtypes and shapes are told first, so that the files are laid out, and their
room on the disk is taken, before the first tensor comes.
"""

from __future__ import annotations

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
from pipeline.files import disk_full_as_user_error, write_json
from pipeline.models.tensors import SAFETENSORS_NAMES, TensorSpec
from pipeline.models.weight_files import INDEX, SINGLE, StoredBytes

MAX_SHARD_BYTES = 5_000_000_000
KEPT = ".model.kept"  # names of what outlasts an interruption, a line each


class ShardWriter:
    """Writes a directory's weight files; they get their names at the end.

    What was written before ``keep`` outlasts an interruption: a writer of the same tensors in the same directory finds
    it in ``written``.

    Args:
        directory: weight files of other tensors that an earlier attempt left there are removed.
        specs: every tensor that will be written.
        parts: for tensors that come in parts, all the parts' names.
        max_shard_bytes: of tensors in one file; a larger tensor gets a file of its own.

    Attributes:
        written: names of tensors and parts that need not be written any more.

    Raises:
        UserError: the disk has no room for them.
    """

    def __init__(
        self,
        directory: Path,
        specs: Mapping[str, TensorSpec],
        parts: Mapping[str, Iterable[str]] | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self._directory, self._specs, self._parts = directory, specs, parts or {}
        self._shards = _fill_shards(specs, max_shard_bytes)
        self._shard_of = {name: shard for shard, names in enumerate(self._shards) for name in names}
        self._begin: dict[str, int] = {}
        headers = []
        for names in self._shards:
            header, begin = _lay_out(names, specs)
            headers.append(header)
            self._begin.update(begin)
        self.written = self._kept(headers)
        self._unkept: dict[str, int] = {}  # name -> shard
        self._mapped: dict[str, Tensor] = {}
        if not self.written:
            remove_weights(directory)
        self._files = [os.open(self._partial(shard), os.O_RDWR | os.O_CREAT, 0o666) for shard in range(len(headers))]
        self._take_room(headers)

    def _partial(self, shard: int) -> Path:
        return self._directory / f".model-{shard}.partial"

    def _take_room(self, headers: Iterable[bytes]) -> None:
        """Gives every file all the room it needs, so that a disk that is too small says so before work is put in."""
        try:
            with disk_full_as_user_error(self._directory, sum(spec.bytes for spec in self._specs.values())):
                for file, header, names in zip(self._files, headers, self._shards, strict=True):
                    os.posix_fallocate(file, 0, len(header) + sum(self._specs[name].bytes for name in names))
                    _write_at(file, header, 0)
        except UserError:
            self._close()
            if not self.written:
                remove_weights(self._directory)  # what little room there was is the user's
            raise

    def _close(self) -> None:
        for file in self._files:
            os.close(file)

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
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        _write_at(self._files[self._shard_of[name]], data, self._begin[name])
        self._note_written(name, self._shard_of[name])

    def copy(self, name: str, source: StoredBytes) -> None:
        """Puts a tensor of the announced dtype and shape in its place, once, without bringing it into this process."""
        shard = self._shard_of[name]
        with open(source.file, "rb") as stream:
            _copy(stream.fileno(), source.offset, self._files[shard], self._begin[name], self._specs[name].bytes)
        self._note_written(name, shard)

    def part(self, name: str, part: str) -> Tensor:
        """A tensor as it lies in its file, for one of its parts to be put in; that counts as written."""
        shard = self._shard_of[name]
        if name not in self._mapped:
            self._mapped[name] = _map(self._files[shard], self._specs[name], self._begin[name])
        self._note_written(part, shard)
        return self._mapped[name]

    def _note_written(self, name: str, shard: int) -> None:
        assert name not in self.written, f"{name} is written twice"
        self.written.add(name)
        self._unkept[name] = shard

    def keep(self) -> None:
        """Makes what has been written so far outlast an interruption, a power cut included."""
        for shard in set(self._unkept.values()):
            os.fsync(self._files[shard])
        with open(self._directory / KEPT, "a") as journal:
            journal.writelines(f"{name}\n" for name in self._unkept)
            journal.flush()
            os.fsync(journal.fileno())
        self._unkept.clear()

    def finish(self) -> None:
        """Gives the files their names and writes the index; every announced tensor has been written by now."""
        announced = {part for name in self._specs for part in self._parts.get(name, (name,))}
        assert announced <= self.written, f"not written: {', '.join(sorted(announced - self.written))}"
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
        self._mapped.clear()
        self._close()
        if kind is None:
            self.finish()


def _write_at(file: int, data: bytes | memoryview, offset: int) -> None:
    """All of it; one call may write less."""
    rest = memoryview(data)
    while rest:
        count = os.pwrite(file, rest, offset)
        rest, offset = rest[count:], offset + count


def _copy(source: int, begin: int, target: int, at: int, count: int) -> None:
    """Has the kernel (Linux) copy ``count`` bytes from file to file, as ``cp`` does."""
    os.lseek(target, at, os.SEEK_SET)
    end = begin + count
    while begin < end:
        begin += os.sendfile(target, source, begin, end - begin)


def _map(file: int, spec: TensorSpec, begin: int) -> Tensor:
    """A tensor that shares its memory with a file."""
    content = mmap.mmap(file, begin + spec.bytes)
    return torch.frombuffer(content, dtype=spec.dtype, offset=begin).view(spec.shape)


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
        dtype, shape = SAFETENSORS_NAMES[specs[name].dtype], list(specs[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = len(text).to_bytes(8, "little") + text
    return first, {name: len(first) + offset for name, offset in begin.items()}

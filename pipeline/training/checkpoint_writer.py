"""Writes checkpoints while training continues.

``save`` stops training for as long as it takes to check that the state is finite, on its device, and to copy what this
rank owns of it to host memory. A background thread then writes the copy to the rank's file, hashes it while writing,
and flushes it to disk. Rank 0's thread waits until all ranks have done so, writes ``state.json`` last, and renames the
directory to its final name. A checkpoint is therefore either complete or absent.

After the last step nothing changes the state any more, so that on CPUs the last checkpoint is written from the state
itself: training has its peak memory before.

The threads of different ranks synchronize through files, since collectives of two threads would interleave.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import distributed

from pipeline.errors import TrainingFailure
from pipeline.files import (
    DISK_FULL_ERRNOS,
    disk_errno,
    free_bytes,
    fsync,
    read_json,
    sha256_json,
    write_json,
)
from pipeline.launch.ranks import refresh_directory
from pipeline.models.tensors import TensorSpec
from pipeline.models.writing import safetensors_header
from pipeline.training.checkpoint import STATE_FILE, directory_name
from pipeline.training.optimizer_state import OptimizerState, StateKey
from pipeline.training.process_group import wait_for_all

WRITTEN_AT_ONCE = 2**22  # bytes that are hashed and written while they are in the cache
RECORD_POLL_SECONDS, LOOK_AGAIN_SECONDS = 0.01, 5.0


@dataclass(frozen=True)
class Part:
    """The elements of one tensor that this rank saves.

    Attributes:
        start: index of the first one in the flattened tensor.
        elements: how many there are.
    """

    name: str
    key: StateKey
    start: int
    elements: int


class CheckpointWriter:
    """Saves the checkpoints of a training run on one rank.

    As a context manager it waits for the last checkpoint when the body fails: the state it was taken from was good.

    Args:
        directory: where checkpoints are saved.
        optimizer_state: what they contain.
        keep: how many of the newest checkpoints to keep.
        device: of the rank, for collectives.
        timeout: how long to wait for the last checkpoint, in seconds, when the body fails. Other ranks may be dead.
    """

    def __init__(
        self,
        directory: Path,
        optimizer_state: OptimizerState,
        keep: int,
        device: torch.device | None = None,
        timeout: float = 900.0,
    ) -> None:
        self._directory, self._state, self._keep = directory, optimizer_state, keep
        self._device, self._timeout = device or torch.device("cpu"), timeout
        in_group = distributed.is_initialized()
        self._rank = distributed.get_rank() if in_group else 0
        self._ranks = distributed.get_world_size() if in_group else 1
        self._copy: torch.Tensor | None = None
        self._running: _Background | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._running is not None:
            self._running.join(self._timeout)

    @property
    def has_failed(self) -> bool:
        """Whether the background thread has ended with an error, which the next ``finish`` or ``save`` raises."""
        return self._running is not None and self._running.error is not None

    def save(self, step: int, state: Mapping[str, Any], files: Iterable[Path] = (), *, last: bool = False) -> None:
        """Takes a checkpoint, and writes it in the background. Collective.

        Args:
            step: the optimizer step that has just been taken.
            state: JSON values to be stored in ``state.json`` beside "shards", "tensors" and "files".
            files: small files of which rank 0 adds a copy.
            last: whether training ends here. The state must not change before ``finish`` has returned.

        Raises:
            TrainingFailure: a value is not finite, or the disk is full, perhaps while the previous checkpoint was
                written. Earlier checkpoints are intact.
            Exception: any other error while the previous checkpoint was written.
        """
        started = time.perf_counter()
        self.finish()
        wait_for_all("writing the previous checkpoint")
        partial = self._directory / f"{directory_name(step)}.partial"
        what = f"the checkpoint of step {step}"
        copied: dict[str, bytes] = {}
        if self._rank == 0:
            with report_full_disk(self._directory, what):
                self._make_directory(partial)
                copied = {path.name: path.read_bytes() for path in files}
        parts = self._check_finite()  # no rank passes its collective before rank 0 has made the directory
        values = self._read_state(parts) if last and self._device.type == "cpu" else self._copy_state(parts)

        def write() -> None:
            if self._device.type == "cuda":  # a thread begins on the first GPU, and would create a context there
                torch.cuda.set_device(self._device)
            own = partial / _file_name(self._rank)
            with report_full_disk(self._directory, what, lambda: self._remove(own)):
                if self._rank != 0:
                    partial.mkdir(exist_ok=True)  # on network file systems it may not be visible yet
                record = {"sha256": _write_tensors(own, parts, values), "parts": [vars(part) for part in parts]}
                if self._rank != 0:
                    write_json(_record(partial, self._rank), record)
            if self._rank == 0:
                with report_full_disk(self._directory, what, lambda: shutil.rmtree(partial, ignore_errors=True)):
                    self._commit(partial, record, state, copied)

        self._running = _Background(write, started)
        self._running.start()

    def finish(self) -> float:
        """Waits until this rank's thread has ended, if it is running. Rank 0's ends when the checkpoint is complete.

        Returns:
            The seconds from the start of ``save`` until the checkpoint was written; 0 if none was being written.

        Raises:
            TrainingFailure: the disk is full.
            Exception: any other error of the thread.
        """
        running, self._running = self._running, None
        if running is None:
            return 0.0
        running.join()
        if running.error is not None:
            raise running.error
        return running.seconds

    # ------------------------------------------------------------------------- while training waits

    def _make_directory(self, partial: Path) -> None:
        for stale in self._directory.glob("step-*.partial"):  # of attempts that were killed while saving
            shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir(parents=True)

    def _check_finite(self) -> list[Part]:
        """Checks all values on their device, and waits for the device once. Returns the parts that this rank owns."""
        parts: list[Part] = []
        extremes: list[torch.Tensor] = []
        for name in self._state.names():
            for key in self._state.keys(name):
                # Not kept: at ZeRO 3, values that are offloaded are copied to the device for this.
                start, values = self._state.owned(name, key)
                parts.append(Part(name, key, start, len(values)))
                # Both are NaN if any value is. On CPUs this takes a fraction of the time of isfinite.
                extreme = torch.stack(torch.aminmax(values)) if len(values) else values.new_zeros(2)
                extremes.append(extreme.to(self._device))  # with an offloaded optimizer, values are on the host
        is_bad = ~torch.isfinite(torch.stack(extremes)).all(1)
        first = torch.where(is_bad.any(), is_bad.int().argmax(), len(parts)).to(self._device)
        if self._ranks > 1:  # the lists of all ranks have the same names and keys, so all raise the same error
            distributed.all_reduce(first, op=distributed.ReduceOp.MIN)
        if (index := int(first)) < len(parts):
            raise TrainingFailure(
                f"the last step produced a non-finite {parts[index].key} of {parts[index].name}; it was not saved, and "
                "the last checkpoint is intact. Lower learning_rate or max_grad_norm, or raise warmup_fraction."
            )
        return [part for part in parts if part.elements]

    def _read_state(self, parts: list[Part]) -> Iterator[torch.Tensor]:
        """Returns the elements of each part, without a copy if they are float32, and frees the memory for copies."""
        self._copy = None
        return (self._state.owned(part.name, part.key)[1].float() for part in parts)

    def _copy_state(self, parts: list[Part]) -> Iterator[torch.Tensor]:
        """Copies the parts to host memory that is kept between checkpoints. Returns the elements of each.

        On a GPU the copies are only queued. The next optimizer step comes after them in the same stream, and the
        iterator waits for them.
        """
        total, begin, on_gpu = sum(part.elements for part in parts), 0, self._device.type == "cuda"
        if self._copy is None or len(self._copy) != total:
            self._copy = host_memory(total, on_gpu)
        for part in parts:
            _, values = self._state.owned(part.name, part.key)
            self._copy[begin : begin + part.elements].copy_(values, non_blocking=on_gpu and values.is_cuda)
            begin += part.elements
        copied = torch.cuda.Event() if on_gpu else None
        if copied is not None:
            copied.record()
        return self._copied(copied, [part.elements for part in parts])

    def _copied(self, ready: torch.cuda.Event | None, sizes: list[int]) -> Iterator[torch.Tensor]:
        if ready is not None:
            ready.synchronize()
        assert self._copy is not None
        yield from self._copy.split(sizes)

    # --------------------------------------------------------------------------- in the background

    def _remove(self, file: Path) -> None:
        """Removes what this rank has written, and on rank 0 the directory if the others have not written to it yet.

        Another rank may remove nothing else: rank 0 may be about to write to the directory.
        """
        file.unlink(missing_ok=True)
        if self._rank == 0:
            with suppress(OSError):
                file.parent.rmdir()

    def _commit(
        self, partial: Path, own: dict[str, Any], state: Mapping[str, Any], copied: Mapping[str, bytes]
    ) -> None:
        """Waits for the other ranks, and completes the checkpoint."""
        records = [own, *(_wait_for(_record(partial, rank)) for rank in range(1, self._ranks))]
        shards = {_file_name(rank): record["sha256"] for rank, record in enumerate(records)}
        tensors = self._places([[Part(**part) for part in record["parts"]] for record in records])
        for name, content in copied.items():
            _write(partial / name, [content])
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in copied.items()}
        complete = {**state, "shards": shards, "tensors": tensors, "files": hashes}
        write_json(partial / STATE_FILE, {**complete, "sha256": sha256_json(complete)})
        for rank in range(1, self._ranks):
            _record(partial, rank).unlink()
        fsync(partial)
        final = partial.with_suffix("")
        shutil.rmtree(final, ignore_errors=True)  # training only repeats a step if that step's checkpoint is damaged
        os.replace(partial, final)
        fsync(final.parent)  # makes the rename itself durable before older checkpoints are removed
        _remove_old(final, self._keep)

    def _places(self, owned: Sequence[Sequence[Part]]) -> dict[str, Any]:
        """Returns the shape of every parameter, and its parts as ``[file, start, elements]``, in order.

        Args:
            owned: the parts of every rank.

        Raises:
            RuntimeError: the parts of a tensor are not exactly the tensor.
        """
        found: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
        for rank, parts in enumerate(owned):
            for part in parts:
                found.setdefault((part.name, part.key), []).append((part.start, part.elements, _file_name(rank)))
        places = {}
        for name in self._state.names():
            shape = self._state.shape(name)
            first, *others = (sorted(found.get((name, key), [])) for key in self._state.keys(name))
            ends = list(accumulate((elements for _, elements, _ in first), initial=0))
            starts = [start for start, *_ in first]
            if starts != ends[:-1] or ends[-1] != math.prod(shape) or any(other != first for other in others):
                raise RuntimeError(f"what the ranks own of {name} {shape} does not add up: {[first, *others]}")
            places[name] = {"shape": shape, "parts": [[file, start, elements] for start, elements, file in first]}
        return places


class _Background(threading.Thread):
    """Runs a function in a thread, and keeps its error. A daemon, so that it cannot keep a failed rank alive."""

    def __init__(self, function: Callable[[], None], started: float) -> None:
        super().__init__(name="checkpoint writer", daemon=True)
        self._function, self._since = function, started
        self.error: Exception | None = None
        self.seconds = 0.0

    def run(self) -> None:
        try:
            self._function()
        except Exception as error:  # noqa: BLE001  # raised by finish
            self.error = error
        self.seconds = time.perf_counter() - self._since


def host_memory(elements: int, pinned: bool) -> torch.Tensor:
    """Returns float32 memory on the host, ``[elements]``, page-locked if ``pinned`` so that GPUs copy to it directly.

    PyTorch's own page-locked memory would be rounded up to a power of two.

    Raises:
        RuntimeError: the memory cannot be page-locked.
    """
    memory = torch.empty(elements)
    if pinned and elements:
        runtime = torch.cuda.cudart()
        torch.cuda.check_error(int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 1)))
        weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr())
    return memory


def _file_name(rank: int) -> str:
    return f"{rank:05d}.safetensors"


def _record(partial: Path, rank: int) -> Path:
    """The file in which a rank tells rank 0 that its part is on disk."""
    return partial / f"{rank:05d}.json"


def _wait_for(record: Path) -> Any:
    looked = time.monotonic()
    while not record.exists():
        time.sleep(RECORD_POLL_SECONDS)
        if time.monotonic() - looked > LOOK_AGAIN_SECONDS:
            refresh_directory(record.parent)
            looked = time.monotonic()
    return read_json(record)


def _write_tensors(path: Path, parts: Iterable[Part], values: Iterable[torch.Tensor]) -> str:
    """Writes a safetensors file of one-dimensional float32 tensors. Returns its SHA-256.

    Args:
        path: the file.
        parts: the tensors.
        values: the elements of each, on the CPU.
    """
    specs = {f"{part.key}.{part.name}": TensorSpec(torch.float32, (part.elements,)) for part in parts}
    header, _ = safetensors_header(specs)
    contents = (value.view(torch.uint8).numpy().data for value in values)
    return _write(path, chain([header], contents))


def _write(path: Path, contents: Iterable[bytes | memoryview]) -> str:
    """Writes a file and flushes it to disk. Returns the SHA-256 of its content."""
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as stream:
        for content in contents:
            view = memoryview(content)
            for begin in range(0, len(view), WRITTEN_AT_ONCE):
                chunk = view[begin : begin + WRITTEN_AT_ONCE]
                digest.update(chunk)
                while chunk:
                    chunk = chunk[stream.write(chunk) :]
        os.fsync(stream.fileno())
    return digest.hexdigest()


def _remove_old(latest: Path, keep: int) -> None:
    """Removes all checkpoints but ``latest`` and the ``keep - 1`` before it.

    Checkpoints of later steps are removed too. Training resumed before them because they were damaged.
    """
    found = sorted(latest.parent.glob("step-????????"))
    end = found.index(latest) + 1
    for path in (*found[: max(0, end - keep)], *found[end:]):
        shutil.rmtree(path)


@contextmanager
def report_full_disk(directory: Path, what: str, clean_up: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Replaces the errors of a full or failing disk by one message.

    Args:
        directory: where the body of the ``with`` statement writes.
        what: what it writes, for the message.
        clean_up: removes what has been written, to free the space.

    Raises:
        TrainingFailure: a disk, quota or file size limit was reached, or the disk fails.
    """
    try:
        yield
    except Exception as error:
        if (number := disk_errno(error)) is None:
            raise
        clean_up()
        raise TrainingFailure(
            f"{what} could not be saved in {directory}: {error}. Earlier checkpoints are intact; "
            f"{free_bytes(directory) / 2**20:,.0f} MiB are free there. "
            f"{'Free some space' if number in DISK_FULL_ERRNOS else 'Check the disk'} and repeat "
            "the same command; it resumes from the last checkpoint."
        ) from error

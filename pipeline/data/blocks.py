"""Token blocks on disk: arrays of shape [blocks, sequence_length] that training memory-maps, written in bounded memory.

Each block consists of three arrays: token ids; position ids, which restart at 0 at the beginning of every document and
block, so that attention can tell documents apart; and a loss mask, which is 1 where a token is predicted from its
predecessor in the same document and block.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.uint32]
Mask = npt.NDArray[np.uint8]
State = dict[str, Any]  # JSON values from which an interrupted writer or packer can be restored

COLUMN_DTYPES: dict[str, type[np.unsignedinteger]] = {
    "input_ids": np.uint32, "position_ids": np.uint32, "loss_mask": np.uint8,
}  # fmt: skip
BUFFERED_BLOCKS = 256  # documents are packed and written once they fill this many blocks
OPEN_BLOCKS = 64  # partially filled blocks kept in memory while packing examples


def open_blocks(directory: Path, split: str) -> dict[str, npt.NDArray[Any]]:
    """Returns the memory-mapped arrays of a split by name, each of shape [blocks, sequence_length].

    Raises:
        ValueError: the files are not blocks as ``BlockWriter`` writes them.
    """
    arrays = {
        name: np.load(directory / f"{split}.{name}.npy", mmap_mode="r", allow_pickle=False) for name in COLUMN_DTYPES
    }
    blocks, *others = {array.shape for array in arrays.values()}
    if others or len(blocks) != 2 or any(array.dtype != COLUMN_DTYPES[name] for name, array in arrays.items()):
        found = {name: f"{array.dtype}{list(array.shape)}" for name, array in arrays.items()}
        raise ValueError(f"the arrays of {directory / split} are not token blocks: {found}")
    return arrays


class BlockWriter:
    """Appends blocks to ``<split>.<array>.npy``. The headers get the final shape on closing.

    Args:
        state: a value returned by ``save()``; writing resumes there, and whatever was written later is cut off.

    Attributes:
        blocks: number of blocks written.
        supervised_tokens: number of tokens in them whose loss mask is 1.
    """

    def __init__(self, directory: Path, split: str, sequence_length: int, state: State | None = None) -> None:
        self.blocks: int = state["blocks"] if state else 0
        self.supervised_tokens: int = state["supervised_tokens"] if state else 0
        self._length = sequence_length
        mode = "r+b" if state else "wb"
        self._streams = {name: open(directory / f"{split}.{name}.npy", mode) for name in COLUMN_DTYPES}
        self._write_headers()
        for name, stream in self._streams.items():
            header_bytes = stream.tell()
            stream.truncate(header_bytes + self.blocks * sequence_length * np.dtype(COLUMN_DTYPES[name]).itemsize)
            stream.seek(0, os.SEEK_END)

    def append(self, input_ids: Ids, position_ids: Ids, loss_mask: Mask) -> None:
        """Writes blocks. Every argument has the shape [blocks, sequence_length]."""
        arrays: tuple[npt.NDArray[Any], ...] = (input_ids, position_ids, loss_mask)
        for stream, array in zip(self._streams.values(), arrays, strict=True):
            assert array.ndim == 2 and array.shape[1] == self._length, array.shape
            # Not ndarray.tofile, which does not report a full disk.
            stream.write(np.ascontiguousarray(array).data)
        self.blocks += len(input_ids)
        self.supervised_tokens += int(loss_mask.sum())

    def save(self) -> State:
        """Flushes everything to disk and returns the state to resume from."""
        for stream in self._streams.values():
            stream.flush()
            os.fsync(stream.fileno())
        return {"blocks": self.blocks, "supervised_tokens": self.supervised_tokens}

    def _write_headers(self) -> None:
        # numpy pads headers so that the first dimension can grow without moving the data.
        for name, stream in self._streams.items():
            stream.seek(0)
            header = {
                "descr": np.lib.format.dtype_to_descr(np.dtype(COLUMN_DTYPES[name])),
                "fortran_order": False,
                "shape": (self.blocks, self._length),
            }
            np.lib.format.write_array_header_1_0(stream, header)

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write_headers()
        for stream in self._streams.values():
            stream.close()


class DocumentPacker:
    """Concatenates documents and cuts the result into blocks. A document may continue in the next block.

    Args:
        writer: receives full blocks.
        sequence_length: tokens per block.
        padding: id that fills up the last block; never a target.
        state: a value returned by ``state()``; packing resumes there.
    """

    def __init__(self, writer: BlockWriter, sequence_length: int, padding: int, state: State | None = None) -> None:
        self._writer, self._length, self._padding = writer, sequence_length, padding
        self._pending: list[Ids] = []  # documents that have not been written to a block
        self._pending_tokens = 0
        self._continued = False  # whether the first of them is the remainder of a document that is partly written
        if state:
            self._pending = [np.array(document, np.uint32) for document in state["waiting"]]
            self._pending_tokens, self._continued = sum(map(len, self._pending)), state["cut"]

    def add(self, document: Sequence[int] | Ids) -> None:
        """Appends the token ids of a document."""
        self._pending.append(np.asarray(document, np.uint32))
        self._pending_tokens += len(document)
        if self._pending_tokens >= BUFFERED_BLOCKS * self._length:
            self._write_full_blocks()

    def state(self) -> State:
        """Writes all full blocks and returns the remaining tokens, as JSON values."""
        self._write_full_blocks()
        return {"waiting": [document.tolist() for document in self._pending], "cut": self._continued}

    def finish(self) -> None:
        """Writes the last block, padded. The padding counts as a document without targets."""
        self._write_full_blocks()
        if not self._pending_tokens:
            return
        used = self._pending_tokens
        self._pending.append(np.full(self._length - used, self._padding, np.uint32))
        ids, starts = self._joined()
        positions, mask = positions_and_mask(starts[None])
        mask[0, used:] = 0
        self._writer.append(ids[None], positions, mask)
        self._pending, self._pending_tokens = [], 0

    def _write_full_blocks(self) -> None:
        full = self._pending_tokens // self._length * self._length  # tokens
        if not full:
            return
        ids, starts = self._joined()
        blocks = ids[:full].reshape(-1, self._length)
        self._writer.append(blocks, *positions_and_mask(starts[:full].reshape(-1, self._length)))
        rest, rest_starts = ids[full:], np.flatnonzero(starts[full:])
        self._continued = bool(len(rest)) and not starts[full]
        self._pending = [piece for piece in np.split(rest, rest_starts) if len(piece)]
        self._pending_tokens = len(rest)

    def _joined(self) -> tuple[Ids, npt.NDArray[np.bool_]]:
        """Returns all pending tokens in one array, and a mask that is True where a document starts."""
        ids = np.concatenate(self._pending)
        # One element more than there are tokens, because an empty last document starts after the last token.
        starts = np.zeros(len(ids) + 1, np.bool_)
        starts[np.cumsum([0, *map(len, self._pending)])[:-1]] = True
        starts[0] &= not self._continued
        return ids, starts[:-1]


def positions_and_mask(starts: npt.NDArray[np.bool_]) -> tuple[Ids, Mask]:
    """Returns position ids and loss mask for the starts of documents. All have the shape [blocks, sequence_length]."""
    starts = starts.copy()
    starts[:, 0] = True  # a block's first token has no predecessor in the block
    index = np.arange(starts.shape[1])
    latest_start = np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    return (index - latest_start).astype(np.uint32), (~starts).astype(np.uint8)


class ExamplePacker:
    """Packs examples into blocks without truncating them, each into the first open block with enough space (first fit).

    Args:
        writer: receives full blocks.
        sequence_length: tokens per block.
        padding: id that fills up a block; never a target.
        state: a value returned by ``state()``; packing resumes there.
    """

    def __init__(self, writer: BlockWriter, sequence_length: int, padding: int, state: State | None = None) -> None:
        self._writer, self._length, self._padding = writer, sequence_length, padding
        self._open: list[list[tuple[Ids, Mask]]] = [
            [(np.array(ids, np.uint32), np.array(mask, np.uint8)) for ids, mask in block]
            for block in (state["open"] if state else [])
        ]
        self._space = [sequence_length - sum(len(ids) for ids, _ in block) for block in self._open]  # tokens, per block

    def add(self, input_ids: Sequence[int], loss_mask: Sequence[int]) -> None:
        """Adds one example of at most ``sequence_length`` tokens."""
        assert len(input_ids) == len(loss_mask) <= self._length
        example = np.asarray(input_ids, np.uint32), np.asarray(loss_mask, np.uint8)
        for number, space in enumerate(self._space):
            if len(input_ids) <= space:
                self._open[number].append(example)
                self._space[number] -= len(input_ids)
                return
        if len(self._open) == OPEN_BLOCKS:
            self._write(self._space.index(min(self._space)))  # the fullest block is the least likely to fit another
        self._open.append([example])
        self._space.append(self._length - len(input_ids))

    def state(self) -> State:
        """Returns the open blocks, as JSON values."""
        return {"open": [[(ids.tolist(), mask.tolist()) for ids, mask in block] for block in self._open]}

    def finish(self) -> None:
        """Writes the blocks that are still open."""
        while self._open:
            self._write(0)

    def _write(self, number: int) -> None:
        examples = self._open.pop(number)
        missing = self._space.pop(number)
        filler = np.full(missing, self._padding, np.uint32), np.zeros(missing, np.uint8)
        pieces = [*examples, filler]
        ids = np.concatenate([ids for ids, _ in pieces])
        positions = np.concatenate([np.arange(len(ids), dtype=np.uint32) for ids, _ in pieces])
        mask = np.concatenate([mask for _, mask in pieces])
        mask[positions == 0] = 0  # the first token of an example has no predecessor
        self._writer.append(ids[None], positions[None], mask[None])

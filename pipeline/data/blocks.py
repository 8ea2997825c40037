"""Token blocks on disk: ``[blocks, sequence_length]`` arrays that training memory-maps, written in bounded memory.

Beside the ids stand position ids, which restart at 0 where a document or a block starts (so that attention can tell
documents apart), and a loss mask, 1 where a token is predicted from its predecessor in the same document and block.
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
State = dict[str, Any]  # JSON values that say how far something got

COLUMN_DTYPES: dict[str, type[np.unsignedinteger]] = {
    "input_ids": np.uint32,
    "position_ids": np.uint32,
    "loss_mask": np.uint8,
}
WRITTEN_BLOCKS = 256  # documents are packed once they fill so many
OPEN_BLOCKS = 64  # half-filled blocks kept while packing examples


class BlockWriter:
    """Appends blocks to ``<split>.<name>.npy``; the headers get the final shape when it is closed.

    Args:
        state: what ``save()`` gave: writing goes on there, and what was written since is cut off.
    """

    def __init__(self, directory: Path, split: str, sequence_length: int, state: State | None = None) -> None:
        self.blocks: int = state["blocks"] if state else 0
        self.supervised_tokens: int = state["supervised_tokens"] if state else 0
        self._length = sequence_length
        mode = "r+b" if state else "wb"
        self._streams = {name: open(directory / f"{split}.{name}.npy", mode) for name in COLUMN_DTYPES}
        self._write_headers()
        for name, stream in self._streams.items():
            stream.truncate(stream.tell() + self.blocks * sequence_length * np.dtype(COLUMN_DTYPES[name]).itemsize)
            stream.seek(0, os.SEEK_END)

    def append(self, input_ids: Ids, position_ids: Ids, loss_mask: Mask) -> None:
        """Writes blocks, each argument ``[blocks, sequence_length]``."""
        arrays: tuple[npt.NDArray[Any], ...] = (input_ids, position_ids, loss_mask)
        for stream, array in zip(self._streams.values(), arrays, strict=True):
            assert array.ndim == 2 and array.shape[1] == self._length, array.shape
            stream.write(np.ascontiguousarray(array).data)  # ndarray.tofile swallows a full disk's error
        self.blocks += len(input_ids)
        self.supervised_tokens += int(loss_mask.sum())

    def save(self) -> State:
        """Puts everything on the disk and says how much that is."""
        for stream in self._streams.values():
            stream.flush()
            os.fsync(stream.fileno())
        return {"blocks": self.blocks, "supervised_tokens": self.supervised_tokens}

    def _write_headers(self) -> None:
        """numpy pads a header so that its first dimension can grow in place."""
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
    """One endless stream of documents, cut into blocks; a long document goes on in the next block.

    Args:
        writer: where full blocks go.
        padding: the token that fills up the last block, never a target.
        state: what ``state()`` gave: packing goes on there.
    """

    def __init__(self, writer: BlockWriter, sequence_length: int, padding: int, state: State | None = None) -> None:
        self._writer, self._length, self._padding = writer, sequence_length, padding
        self._waiting: list[Ids] = []  # documents, of the first one maybe only its end
        self._tokens = 0  # in them
        self._cut = False  # whether the first one's beginning is in a block already
        if state:
            self._waiting = [np.array(document, np.uint32) for document in state["waiting"]]
            self._tokens, self._cut = sum(map(len, self._waiting)), state["cut"]

    def add(self, document: Sequence[int] | Ids) -> None:
        """Appends a document's token ids."""
        self._waiting.append(np.asarray(document, np.uint32))
        self._tokens += len(document)
        if self._tokens >= WRITTEN_BLOCKS * self._length:
            self._write_full_blocks()

    def state(self) -> State:
        """What is not in a block yet, as JSON values."""
        self._write_full_blocks()
        return {"waiting": [document.tolist() for document in self._waiting], "cut": self._cut}

    def finish(self) -> None:
        """Fills up the last block; the padding counts as a document of its own that holds no target."""
        self._write_full_blocks()
        if not self._tokens:
            return
        used = self._tokens
        self._waiting.append(np.full(self._length - used, self._padding, np.uint32))
        ids, starts = self._joined()
        positions, mask = _positions_and_mask(starts[None])
        mask[0, used:] = 0
        self._writer.append(ids[None], positions, mask)
        self._waiting, self._tokens = [], 0

    def _joined(self) -> tuple[Ids, npt.NDArray[np.bool_]]:
        """All that waits in one row, and where in it documents start."""
        ids = np.concatenate(self._waiting)
        starts = np.zeros(len(ids) + 1, np.bool_)  # one more: where a document starts that is empty and the last
        starts[np.cumsum([0, *map(len, self._waiting)])[:-1]] = True
        starts[0] &= not self._cut
        return ids, starts[:-1]

    def _write_full_blocks(self) -> None:
        whole = self._tokens // self._length * self._length
        if not whole:
            return
        ids, starts = self._joined()
        blocks = ids[:whole].reshape(-1, self._length)
        self._writer.append(blocks, *_positions_and_mask(starts[:whole].reshape(-1, self._length)))
        rest, begins = ids[whole:], np.flatnonzero(starts[whole:])
        self._cut = bool(len(rest)) and not starts[whole]
        self._waiting = [piece for piece in np.split(rest, begins) if len(piece)]
        self._tokens = len(rest)


def _positions_and_mask(starts: npt.NDArray[np.bool_]) -> tuple[Ids, Mask]:
    """From where documents start, ``[blocks, sequence_length]``; a block's first token always starts one."""
    starts = starts.copy()
    starts[:, 0] = True
    index = np.arange(starts.shape[1])
    latest_start = np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    return (index - latest_start).astype(np.uint32), (~starts).astype(np.uint8)


class ExamplePacker:
    """Whole examples side by side in blocks, none cut: each goes into the first open block that has room for it.

    Args:
        writer: where full blocks go.
        padding: the token that fills a block up, never a target.
        state: what ``state()`` gave: packing goes on there.
    """

    def __init__(self, writer: BlockWriter, sequence_length: int, padding: int, state: State | None = None) -> None:
        self._writer, self._length, self._padding = writer, sequence_length, padding
        self._open: list[list[tuple[Ids, Mask]]] = [
            [(np.array(ids, np.uint32), np.array(mask, np.uint8)) for ids, mask in block]
            for block in (state["open"] if state else [])
        ]
        self._room = [sequence_length - sum(len(ids) for ids, _ in block) for block in self._open]

    def add(self, input_ids: Sequence[int], loss_mask: Sequence[int]) -> None:
        """Places one example of at most ``sequence_length`` tokens."""
        assert len(input_ids) == len(loss_mask) <= self._length
        example = np.asarray(input_ids, np.uint32), np.asarray(loss_mask, np.uint8)
        for number, room in enumerate(self._room):
            if len(input_ids) <= room:
                self._open[number].append(example)
                self._room[number] -= len(input_ids)
                return
        if len(self._open) == OPEN_BLOCKS:
            self._write(self._room.index(min(self._room)))
        self._open.append([example])
        self._room.append(self._length - len(input_ids))

    def state(self) -> State:
        """The blocks that are still open, as JSON values."""
        return {"open": [[(ids.tolist(), mask.tolist()) for ids, mask in block] for block in self._open]}

    def finish(self) -> None:
        """Writes the blocks that are still open."""
        while self._open:
            self._write(0)

    def _write(self, number: int) -> None:
        examples = self._open.pop(number)
        missing = self._room.pop(number)
        filler = np.full(missing, self._padding, np.uint32), np.zeros(missing, np.uint8)
        pieces = [*examples, filler]
        ids = np.concatenate([ids for ids, _ in pieces])
        positions = np.concatenate([np.arange(len(ids), dtype=np.uint32) for ids, _ in pieces])
        mask = np.concatenate([mask for _, mask in pieces])
        mask[positions == 0] = 0
        self._writer.append(ids[None], positions[None], mask[None])

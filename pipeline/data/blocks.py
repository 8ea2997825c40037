"""Token blocks on disk: ``[blocks, sequence_length]`` arrays that training memory-maps, written in bounded memory.

Beside the ids stand position ids, which restart at 0 where a document or a block starts (so that attention can tell
documents apart), and a loss mask, 1 where a token is predicted from its predecessor in the same document and block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.uint32]
Mask = npt.NDArray[np.uint8]

DTYPES: dict[str, type[np.unsignedinteger]] = {"input_ids": np.uint32, "position_ids": np.uint32, "loss_mask": np.uint8}
OPEN_BLOCKS = 64  # half-filled blocks kept while packing examples


class BlockWriter:
    """Appends blocks to ``<split>.<name>.npy``; the headers get the final shape when it is closed."""

    def __init__(self, directory: Path, split: str, sequence_length: int) -> None:
        self.blocks = 0
        self.supervised_tokens = 0
        self._length = sequence_length
        self._streams = {name: open(directory / f"{split}.{name}.npy", "wb") for name in DTYPES}
        self._write_headers()

    def append(self, input_ids: Ids, position_ids: Ids, loss_mask: Mask) -> None:
        """Writes blocks, each argument ``[blocks, sequence_length]``."""
        arrays: tuple[npt.NDArray[Any], ...] = (input_ids, position_ids, loss_mask)
        for stream, array in zip(self._streams.values(), arrays, strict=True):
            assert array.ndim == 2 and array.shape[1] == self._length, array.shape
            array.tofile(stream)
        self.blocks += len(input_ids)
        self.supervised_tokens += int(loss_mask.sum())

    def _write_headers(self) -> None:
        """numpy pads a header so that its first dimension can grow in place."""
        for name, stream in self._streams.items():
            stream.seek(0)
            header = {
                "descr": np.lib.format.dtype_to_descr(np.dtype(DTYPES[name])),
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
    """

    def __init__(self, writer: BlockWriter, sequence_length: int, padding: int) -> None:
        self._writer, self._length, self._padding = writer, sequence_length, padding
        self._ids: Ids = np.empty(0, np.uint32)  # not yet a block
        self._starts: npt.NDArray[np.bool_] = np.empty(0, np.bool_)  # True at a document's first token

    def add(self, documents: Iterable[Sequence[int]]) -> None:
        """Appends documents, each a sequence of token ids."""
        for_ids, for_starts = [self._ids], [self._starts]
        for document in documents:
            start = np.zeros(len(document), np.bool_)
            start[:1] = True
            for_ids.append(np.asarray(document, np.uint32))
            for_starts.append(start)
        self._ids, self._starts = np.concatenate(for_ids), np.concatenate(for_starts)
        self._write_full_blocks()

    def finish(self) -> None:
        """Fills up the last block; the padding counts as a document of its own that holds no target."""
        used = len(self._ids)
        if used == 0:
            return
        missing = self._length - used
        ids = np.append(self._ids, np.full(missing, self._padding, np.uint32))
        positions, mask = _positions_and_mask(np.append(self._starts, np.arange(missing) == 0)[None])
        mask[0, used:] = 0
        self._writer.append(ids[None], positions, mask)
        self._ids, self._starts = self._ids[:0], self._starts[:0]

    def _write_full_blocks(self) -> None:
        whole = len(self._ids) // self._length * self._length
        if whole:
            blocks = self._ids[:whole].reshape(-1, self._length)
            self._writer.append(blocks, *_positions_and_mask(self._starts[:whole].reshape(-1, self._length)))
            self._ids, self._starts = self._ids[whole:], self._starts[whole:]


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
    """

    def __init__(self, writer: BlockWriter, sequence_length: int, padding: int) -> None:
        self._writer, self._length, self._padding = writer, sequence_length, padding
        self._open: list[list[tuple[Ids, Mask]]] = []
        self._room: list[int] = []

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

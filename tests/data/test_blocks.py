"""Token blocks, compared with a naive implementation that handles one token at a time."""

from __future__ import annotations

import random
import resource
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.data.blocks import COLUMN_DTYPES, BlockWriter, DocumentPacker, ExamplePacker, open_blocks
from pipeline.files import DISK_FULL_ERRNOS

PADDING = 99


def _naive_packing(documents: list[list[int]], length: int) -> list[list[tuple[int, int, int]]]:
    """Rows of (id, position, mask) for the concatenation of all documents."""
    rows: list[list[tuple[int, int, int]]] = [[]]
    for document in documents:
        position = 0
        for token in document:
            if len(rows[-1]) == length:
                rows.append([])
                position = 0
            rows[-1].append((token, position, int(position > 0)))
            position += 1
    rows[-1] += [(PADDING, at, 0) for at in range(length - len(rows[-1]))]
    return rows


@pytest.mark.parametrize("length", [1, 4, 16, 50])
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_document_packing_equals_the_naive_implementation(length: int, batch: int, tmp_path: Path) -> None:
    draw = random.Random(length)
    documents = [[draw.randrange(90) for _ in range(draw.choice([1, 2, 5, 40]))] for _ in range(30)]
    with BlockWriter(tmp_path, "train", length) as writer:
        packer = DocumentPacker(writer, length, PADDING)
        for start in range(0, len(documents), batch):
            for document in documents[start : start + batch]:
                packer.add(document)
            packer.state()  # writes full blocks and must leave the rest pending
        packer.finish()
    found = open_blocks(tmp_path, "train")
    expected = np.array(_naive_packing(documents, length))
    for column, name in enumerate(COLUMN_DTYPES):
        assert found[name].dtype == COLUMN_DTYPES[name]
        np.testing.assert_array_equal(found[name], expected[:, :, column])
    assert writer.blocks == len(expected) and writer.supervised_tokens == expected[:, :, 2].sum()


@pytest.mark.parametrize(
    "array",
    [np.ones((3, 8), np.uint32), np.ones((2, 8), np.uint8), np.ones(16, np.uint8)],
    ids=["other dtype", "other shape", "one dimension"],
)
def test_arrays_that_are_not_blocks_are_refused(array: npt.NDArray[Any], tmp_path: Path) -> None:
    """Training on them would read wrong tokens or raise an error without the file's name."""
    with BlockWriter(tmp_path, "train", 8) as writer:
        writer.append(*(np.ones((3, 8), dtype) for dtype in COLUMN_DTYPES.values()))
    assert len(open_blocks(tmp_path, "train")["input_ids"]) == 3
    np.save(tmp_path / "train.loss_mask.npy", array)
    with pytest.raises(ValueError, match="not token blocks"):
        open_blocks(tmp_path, "train")


@pytest.mark.parametrize("blocks", [1, 40, 4000])
def test_a_full_disk_always_raises(blocks: int, tmp_path: Path) -> None:
    """With the original errno, whether the disk fills up while writing or while flushing."""
    arrays = [np.ones((blocks, 16), COLUMN_DTYPES[name]) for name in COLUMN_DTYPES]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = BlockWriter(tmp_path, "train", 16)

    def write() -> None:
        writer.append(*arrays)
        writer.save()

    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150, before[1]))
        with pytest.raises(OSError, match="File too large") as error:
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.errno in DISK_FULL_ERRNOS


def test_without_input_the_arrays_are_empty(tmp_path: Path) -> None:
    with BlockWriter(tmp_path, "train", 8) as writer:
        DocumentPacker(writer, 8, PADDING).finish()
        ExamplePacker(writer, 8, PADDING).finish()
    assert open_blocks(tmp_path, "train")["input_ids"].shape == (0, 8)


def test_all_examples_are_packed_without_truncation(tmp_path: Path) -> None:
    """Examples are read back from the blocks: each starts at position 0, and so does the padding."""
    draw = random.Random(1)
    length = 32
    examples = []
    for number in range(400):
        size = draw.randrange(2, length + 1)
        examples.append(([number] * size, [draw.randrange(2) for _ in range(size)]))
    with BlockWriter(tmp_path, "train", length) as writer:
        packer = ExamplePacker(writer, length, padding=100_000)
        for ids, mask in examples:
            packer.add(ids, mask)
        packer.finish()
    found = open_blocks(tmp_path, "train")
    read = {}
    for row in range(writer.blocks):
        starts = [*np.flatnonzero(found["position_ids"][row] == 0), length]
        for begin, end in pairwise(starts):
            np.testing.assert_array_equal(found["position_ids"][row, begin:end], range(end - begin))
            ids = found["input_ids"][row, begin:end]
            read[int(ids[0])] = (ids.tolist(), found["loss_mask"][row, begin:end].tolist())
    padding = read.pop(100_000)
    assert not any(padding[1])
    assert [read[number] for number in range(400)] == [(ids, [0, *mask[1:]]) for ids, mask in examples]
    used = sum(len(ids) for ids, _ in examples)
    assert used / (writer.blocks * length) > 0.9  # at most a tenth is padding


def test_an_example_that_fills_a_block_exactly_is_put_into_it(tmp_path: Path) -> None:
    with BlockWriter(tmp_path, "train", 10) as writer:
        packer = ExamplePacker(writer, 10, PADDING)
        for size in (6, 4, 10):
            packer.add([1] * size, [1] * size)
        packer.finish()
    assert writer.blocks == 2
    assert PADDING not in open_blocks(tmp_path, "train")["input_ids"]


def test_the_number_of_open_blocks_is_bounded(tmp_path: Path) -> None:
    with BlockWriter(tmp_path, "train", 10) as writer:
        packer = ExamplePacker(writer, 10, PADDING)
        for _ in range(1000):
            packer.add([1] * 6, [1] * 6)  # two do not fit into one block
        assert writer.blocks >= 1000 - 64
        packer.finish()
    assert writer.blocks == 1000

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.training.batches import TokenBlocks, global_batch, held_out_indices, micro_batches
from tests.training.small import write_blocks

CPU = torch.device("cpu")


def test_the_order_depends_only_on_seed_and_step():
    forward = [global_batch(7, step, blocks=10, size=4) for step in range(1, 9)]
    backward = [global_batch(7, step, blocks=10, size=4) for step in range(8, 0, -1)]
    assert np.array_equal(forward, backward[::-1])
    assert not np.array_equal(forward, [global_batch(8, step, blocks=10, size=4) for step in range(1, 9)])


def test_every_epoch_visits_every_block_once_in_a_different_order():
    flat = np.concatenate([global_batch(0, step, blocks=10, size=4) for step in range(1, 11)])
    epochs = flat.reshape(4, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_batch_larger_than_the_data_repeats_blocks_evenly():
    batch = global_batch(0, 1, blocks=3, size=8)
    assert np.bincount(batch).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


@pytest.mark.parametrize("ranks, micro_batch", [(1, 1), (1, 12), (2, 3), (4, 1), (3, 2)])
def test_ranks_and_micro_batches_partition_the_global_batch(ranks: int, micro_batch: int):
    indices = np.arange(100, 112)
    shares = [list(micro_batches(indices, micro_batch, rank, ranks)) for rank in range(ranks)]
    assert {len(share) for share in shares} == {12 // (ranks * micro_batch)}
    assert sorted(np.concatenate([np.concatenate(share) for share in shares])) == list(indices)


def test_held_out_blocks_are_evenly_spaced_and_limited_to_the_existing_ones():
    assert held_out_indices(100, 4).tolist() == [0, 25, 50, 75]
    assert held_out_indices(3, 16).tolist() == [0, 1, 2]


def test_blocks_are_read_as_written(tmp_path: Path):
    directory = write_blocks(tmp_path, blocks=6, length=16, ragged=True)
    blocks = TokenBlocks(directory, "train")
    assert (len(blocks), blocks.sequence_length) == (6, 16)
    batch = blocks.batch(np.array([4, 1]), CPU)
    for name, tensor in (("input_ids", batch.input_ids), ("loss_mask", batch.loss_mask)):
        written = np.load(directory / f"train.{name}.npy")[[4, 1]]
        assert np.array_equal(tensor.numpy(), written)
    assert batch.input_ids.dtype == torch.int64 and batch.loss_mask.dtype == torch.bool
    assert blocks.supervised_tokens(np.array([4, 1])) == int(batch.loss_mask.sum())


def test_an_empty_split_can_be_opened(tmp_path: Path):
    assert len(TokenBlocks(write_blocks(tmp_path, held_out=0), "held_out")) == 0

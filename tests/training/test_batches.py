import threading
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch

from pipeline.training.batches import (
    MicroBatch,
    StepReader,
    TokenBlocks,
    TokenIndices,
    evenly_spaced,
    global_batch,
    micro_batches,
)
from pipeline.training.loop import Loop
from pipeline.training.sequence_parallel import SequenceGroup
from tests.training.small import train_settings, write_blocks

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
    assert evenly_spaced(100, 4).tolist() == [0, 25, 50, 75]
    assert evenly_spaced(3, 16).tolist() == [0, 1, 2]


def test_blocks_are_read_as_written(tmp_path: Path):
    directory = write_blocks(tmp_path, blocks=6, length=16, ragged=True)
    blocks = TokenBlocks(directory, "train")
    assert (len(blocks), blocks.sequence_length) == (6, 16)
    batch = blocks.batch(np.array([4, 1]))
    ids, positions, mask = (
        np.load(directory / f"train.{name}.npy")[[4, 1]] for name in ("input_ids", "position_ids", "loss_mask")
    )
    assert np.array_equal(batch.input_ids.numpy(), ids) and np.array_equal(batch.position_ids.numpy(), positions)
    assert batch.input_ids.dtype == batch.position_ids.dtype == torch.int64
    assert sum(blocks.supervised_tokens(np.array([4, 1]))) == batch.supervised == mask.sum()
    # Token i of a sequence is predicted from token i - 1.
    targets = [(row, token) for row in range(2) for token in range(1, 16) if mask[row, token]]
    assert batch.indices.predicting.tolist() == [row * 16 + token - 1 for row, token in targets]
    assert batch.indices.targets.tolist() == [ids[row, token] for row, token in targets]
    starts = [row * 16 + token for row in range(2) for token in range(16) if positions[row, token] == 0]
    assert batch.indices.bounds.tolist() == [*starts, 32]


def test_the_first_token_of_a_sequence_is_never_a_target():
    ids, positions = torch.arange(8).view(2, 4), torch.arange(4).expand(2, 4)
    indices = TokenIndices.of(ids, positions, torch.ones(2, 4, dtype=torch.bool))
    assert indices.predicting.tolist() == [0, 1, 2, 4, 5, 6] and indices.targets.tolist() == [1, 2, 3, 5, 6, 7]


def test_repeated_blocks_have_no_targets(tmp_path: Path):
    blocks = TokenBlocks(write_blocks(tmp_path, blocks=6, length=16), "train")
    batch = blocks.batch(np.array([2, 2]), repeated=np.array([False, True]))
    (counted,) = blocks.supervised_tokens(np.array([2]))
    assert batch.supervised == len(batch.indices.targets) == counted > 0
    assert batch.indices.predicting.max() < 16


def test_ranks_that_share_sequences_have_all_tokens_and_targets_once(tmp_path: Path):
    whole = TokenBlocks(write_blocks(tmp_path, blocks=6, length=16, ragged=True), "train").batch(np.array([4, 1]))
    parts = [whole.part(SequenceGroup(rank, 4)) for rank in range(4)]
    assert torch.equal(torch.cat([part.input_ids for part in parts], dim=1), whole.input_ids)
    assert torch.equal(torch.cat([part.real for part in parts], dim=1), whole.real)
    assert sum(part.supervised for part in parts) == whole.supervised
    found = set()
    for rank, part in enumerate(parts):
        assert torch.equal(part.position_ids, whole.position_ids)
        assert torch.equal(part.indices.bounds, whole.indices.bounds)
        for place, target in zip(part.indices.predicting.tolist(), part.indices.targets.tolist(), strict=True):
            row, own = divmod(place, 4)
            found.add((row * 16 + rank * 4 + own, target))
    pairs = zip(whole.indices.predicting.tolist(), whole.indices.targets.tolist(), strict=True)
    assert found == set(pairs) and len(found) == sum(len(part.indices.targets) for part in parts)
    assert whole.part(SequenceGroup()) is whole


def test_a_step_is_read_while_the_previous_one_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    blocks = TokenBlocks(write_blocks(tmp_path, blocks=6, length=16), "train")
    read: list[tuple[str, list[int]]] = []
    batch = TokenBlocks.batch

    def spy(self: TokenBlocks, indices: np.ndarray) -> MicroBatch:
        read.append((threading.current_thread().name.partition("_")[0], indices.tolist()))
        return batch(self, indices)

    monkeypatch.setattr(TokenBlocks, "batch", spy)
    with StepReader(blocks, lambda step: [np.array([step]), np.array([0])], last=3, device=CPU) as reader:
        for step in (2, 3):  # as after resuming
            found = reader.read(step)
            assert torch.equal(found[0].input_ids, batch(blocks, np.array([step])).input_ids) and len(found) == 2
    assert read == [("read-ahead", [2]), ("read-ahead", [0]), ("read-ahead", [3]), ("read-ahead", [0])]


def test_a_rank_reads_only_its_own_blocks(tmp_path: Path):
    blocks = TokenBlocks(write_blocks(tmp_path, blocks=10, length=16), "train")
    loop = Mock(seed=0, blocks=blocks, train=train_settings(global_batch=4, micro_batch=1), sequence=SequenceGroup())
    with patch.multiple("torch.distributed", get_rank=lambda: 1, get_world_size=lambda: 2):
        shares = Loop._shares(loop, 3)
    assert np.concatenate(shares).tolist() == global_batch(0, 3, 10, 4)[1::2].tolist()


def test_blocks_of_a_corpus_get_their_share_after_every_step_and_keep_the_order_of_the_others():
    mixed = np.concatenate([global_batch(7, step, 10, 4, corpus=6, fraction=0.3) for step in range(1, 11)])
    is_corpus = mixed >= 10
    assert np.cumsum(is_corpus).tolist() == [int(0.3 * taken) for taken in range(1, 41)]
    alone = np.concatenate([global_batch(7, step, 10, 4) for step in range(1, 11)])
    assert mixed[~is_corpus].tolist() == alone[: 40 - 12].tolist()
    assert sorted(mixed[is_corpus]) == sorted([*range(10, 16)] * 2)


def test_an_error_while_reading_ahead_reaches_the_step_that_needs_the_blocks(tmp_path: Path):
    blocks = TokenBlocks(write_blocks(tmp_path, blocks=6, length=16), "train")
    with StepReader(blocks, lambda step: [np.array([step * 5])], last=3, device=CPU) as reader:
        assert reader.read(1)
        with pytest.raises(IndexError):
            reader.read(2)


def test_an_empty_split_can_be_opened(tmp_path: Path):
    assert len(TokenBlocks(write_blocks(tmp_path, held_out=0), "held_out")) == 0

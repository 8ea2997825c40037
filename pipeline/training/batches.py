"""Batches from the token blocks on disk. Nothing is tokenized, shuffled or buffered during training.

The blocks of a tokenize artifact are memory-mapped. The blocks of optimizer step s are a pure function of (seed, s):
epoch e visits all blocks in the order of permutation (seed, e). Therefore any number of ranks sees the same global
batches, and resuming at any step is as cheap as starting.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.data.records import Split

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MicroBatch:
    """Sequences for one forward pass. All tensors are [batch, sequence].

    ``loss_mask`` is True where the token is a target, predicted from the token before it in the same document.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    loss_mask: torch.Tensor


class TokenBlocks:
    """One split of a tokenize artifact, memory-mapped."""

    def __init__(self, directory: Path, split: Split) -> None:
        self._input_ids = _open(directory, split, "input_ids", np.dtype(np.uint32))
        self._position_ids = _open(directory, split, "position_ids", np.dtype(np.uint32))
        self._loss_mask = _open(directory, split, "loss_mask", np.dtype(np.uint8))
        assert self._input_ids.shape == self._position_ids.shape == self._loss_mask.shape, directory
        self.sequence_length = int(self._input_ids.shape[1])

    def __len__(self) -> int:
        return int(self._input_ids.shape[0])

    def batch(self, indices: Indices, device: torch.device) -> MicroBatch:
        """Returns the blocks at ``indices`` as int64 and bool tensors on ``device``."""
        ids, positions = (
            torch.from_numpy(array[indices].astype(np.int64)).to(device)
            for array in (self._input_ids, self._position_ids)
        )
        return MicroBatch(ids, positions, torch.from_numpy(self._loss_mask[indices].astype(np.bool_)).to(device))

    def supervised_tokens(self, indices: Indices) -> int:
        """Returns how many tokens of these blocks are targets."""
        return int(np.count_nonzero(self._loss_mask[indices]))


def _open(directory: Path, split: str, name: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = np.load(directory / f"{split}.{name}.npy", mmap_mode="r", allow_pickle=False)
    assert array.dtype == dtype and array.ndim == 2, (directory, split, name, array.dtype, array.shape)
    return array


# ------------------------------------------------------------------------------------------- order


@lru_cache(maxsize=2)  # a global batch touches at most two epochs unless the dataset is tiny
def _permutation(seed: int, epoch: int, blocks: int) -> Indices:
    return np.random.default_rng([seed, epoch]).permutation(blocks)


def global_batch(seed: int, step: int, blocks: int, size: int) -> Indices:
    """Returns the block indices of optimizer step ``step`` (from 1), in order, over all ranks: [size]."""
    positions = np.arange((step - 1) * size, step * size)
    epochs, offsets = np.divmod(positions, blocks)
    return np.array([_permutation(seed, int(e), blocks)[o] for e, o in zip(epochs, offsets, strict=True)])


def micro_batches(indices: Indices, micro_batch: int, rank: int, ranks: int) -> Iterator[Indices]:
    """Yields this rank's share of a global batch, in pieces of [micro_batch].

    All ranks get equally many pieces: ``ranks * micro_batch`` divides the global batch, which is checked before the
    stage starts.
    """
    assert len(indices) % (ranks * micro_batch) == 0, (len(indices), ranks, micro_batch)
    yield from indices.reshape(-1, ranks, micro_batch)[:, rank]


def held_out_indices(blocks: int, at_most: int) -> Indices:
    """Returns at most ``at_most`` evenly spaced block indices, the same at every evaluation."""
    count = min(blocks, at_most)
    return np.arange(count) * blocks // max(1, count)

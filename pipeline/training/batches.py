"""Batches from the token blocks on disk. Nothing is tokenized, shuffled or buffered during training.

The blocks of a tokenize artifact are memory-mapped. The blocks of optimizer step s are a pure function of (seed, s):
epoch e visits all blocks in the order of permutation (seed, e). Therefore any number of ranks sees the same global
batches, and resuming at any step is as cheap as starting.

A background thread reads the next step's batches of this rank while the current step is computed. It also finds
documents and targets, whose numbers depend on the data: found on a GPU, the host would wait for it to read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from pipeline.config.data import SPLITS, Split
from pipeline.data.blocks import open_blocks
from pipeline.training.attention import document_bounds

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenIndices:
    """Where the targets and documents of a batch are, in its flattened tokens [batch * sequence].

    Attributes:
        predicting: [N] in int64: the tokens before the targets, in order.
        targets: [N] in int64: the targets' token ids.
        bounds: [documents + 1] in int32: where documents begin, and the batch ends.
    """

    predicting: torch.Tensor
    targets: torch.Tensor
    bounds: torch.Tensor

    @classmethod
    def of(cls, input_ids: torch.Tensor, position_ids: torch.Tensor, loss_mask: torch.Tensor) -> TokenIndices:
        """Finds them in tensors [batch, sequence]. Nothing precedes the first token of a sequence."""
        in_loss = loss_mask.clone()
        in_loss[:, 0] = False
        places = in_loss.flatten().nonzero().flatten()
        return cls(places - 1, input_ids.flatten()[places], document_bounds(position_ids))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> TokenIndices:
        """Returns a copy with a function applied to every tensor."""
        return TokenIndices(function(self.predicting), function(self.targets), function(self.bounds))


@dataclass(frozen=True)
class MicroBatch:
    """Sequences for one forward pass.

    Attributes:
        input_ids: [batch, sequence].
        position_ids: [batch, sequence].
        indices: of targets, each of which is predicted from the token before it in the same document.
        supervised: how many tokens are targets.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    indices: TokenIndices
    supervised: int

    def pinned(self) -> MicroBatch:
        """Returns a copy in page-locked memory, from which GPUs copy without the host waiting."""
        return self._map(lambda tensor: tensor.pin_memory())

    def on(self, device: torch.device) -> MicroBatch:
        """Returns a copy on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        ids, positions = function(self.input_ids), function(self.position_ids)
        return replace(self, input_ids=ids, position_ids=positions, indices=self.indices.map(function))


class TokenBlocks:
    """One split of a tokenize artifact, memory-mapped."""

    @classmethod
    def evaluated(cls, directory: Path) -> dict[Split, TokenBlocks]:
        """Opens all splits of an artifact that are not trained on. The held-out one comes first."""
        splits = (split for split in SPLITS if split != "train")
        return {split: cls(directory, split) for split in splits if (directory / f"{split}.loss_mask.npy").exists()}

    def __init__(self, directory: Path, split: Split) -> None:
        arrays = open_blocks(directory, split)
        self._input_ids, self._position_ids = arrays["input_ids"], arrays["position_ids"]
        self._loss_mask = arrays["loss_mask"]
        self.sequence_length = int(self._input_ids.shape[1])

    def __len__(self) -> int:
        return int(self._input_ids.shape[0])

    def batch(self, indices: Indices, repeated: npt.NDArray[np.bool_] | None = None) -> MicroBatch:
        """Returns the blocks at ``indices`` on the CPU.

        Args:
            indices: [batch].
            repeated: [batch], True for blocks that have been counted already and get no targets here.
        """
        ids, positions = (
            torch.from_numpy(array[indices].astype(np.int64)) for array in (self._input_ids, self._position_ids)
        )
        loss_mask = torch.from_numpy(self._loss_mask[indices].astype(np.bool_))
        if repeated is not None:
            loss_mask[torch.from_numpy(repeated)] = False
        return MicroBatch(ids, positions, TokenIndices.of(ids, positions, loss_mask), int(loss_mask.sum()))

    def supervised_tokens(self, indices: Indices) -> int:
        """Returns how many tokens of these blocks are targets."""
        return int(np.count_nonzero(self._loss_mask[indices]))


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


def evenly_spaced(blocks: int, at_most: int) -> Indices:
    """Returns at most ``at_most`` evenly spaced block indices, the same at every evaluation."""
    count = min(blocks, at_most)
    return np.arange(count) * blocks // max(1, count)


# ------------------------------------------------------------------------------------------- reading ahead


class StepReader:
    """Reads this rank's micro-batches of every step, one step ahead, in a background thread. A context manager.

    Args:
        blocks: what to read.
        shares: returns the indices of this rank's micro-batches for a step.
        last: the last step.
        device: where the micro-batches will be used.
    """

    def __init__(
        self, blocks: TokenBlocks, shares: Callable[[int], Sequence[Indices]], last: int, device: torch.device
    ) -> None:
        self._blocks, self._shares, self._last, self._device = blocks, shares, last, device
        self._thread = ThreadPoolExecutor(1, "read-ahead", initializer=self._use_device)
        self._ahead: tuple[int, Future[list[MicroBatch]]] | None = None

    def __enter__(self) -> StepReader:
        return self

    def __exit__(self, *details: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def read(self, step: int) -> list[MicroBatch]:
        """Returns the micro-batches of a step in the host's memory, and starts reading those of the next."""
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = step, self._thread.submit(self._read, step)
        batches = self._ahead[1].result()
        self._ahead = (step + 1, self._thread.submit(self._read, step + 1)) if step < self._last else None
        return batches

    def _read(self, step: int) -> list[MicroBatch]:
        batches = [self._blocks.batch(share) for share in self._shares(step)]
        return [batch.pinned() for batch in batches] if self._device.type == "cuda" else batches

    def _use_device(self) -> None:
        if self._device.type == "cuda":  # a thread begins on the first GPU, and would create a context there
            torch.cuda.set_device(self._device)

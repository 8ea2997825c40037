"""Batches from the token blocks on disk. Nothing is tokenized, shuffled or buffered during training.

The blocks of a tokenize artifact are memory-mapped. The blocks of optimizer step s are a pure function of (seed, s):
epoch e visits all blocks in the order of permutation (seed, e). Therefore any number of ranks sees the same global
batches, and resuming at any step is as cheap as starting. Blocks of a corpus can be mixed into those of conversations.

A background thread reads the next step's batches of this rank while the current step is computed. It also finds
documents and targets, whose numbers depend on the data: found on a GPU, the host would wait for it to read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.config.data import SPLITS, Split
from pipeline.data.blocks import open_blocks, positions_and_mask
from pipeline.training.attention import document_bounds
from pipeline.training.sequence_parallel import ALONE, SequenceGroup

Indices = npt.NDArray[np.int64]
Rows = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]  # token ids, position ids, loss mask


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

    def part(self, sequence: SequenceGroup, length: int) -> TokenIndices:
        """Returns those targets that this rank predicts, from its part of sequences of ``length`` tokens."""
        own = length // sequence.ranks
        rows, places = self.predicting // length, self.predicting % length - own * sequence.rank
        is_own = (places >= 0) & (places < own)
        return TokenIndices((rows * own + places)[is_own], self.targets[is_own], self.bounds)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> TokenIndices:
        """Returns a copy with a function applied to every tensor."""
        return TokenIndices(function(self.predicting), function(self.targets), function(self.bounds))


@dataclass(frozen=True)
class MicroBatch:
    """Sequences for one forward pass, or this rank's part of their tokens if ranks share sequences.

    Attributes:
        input_ids: [batch, tokens].
        position_ids: [batch, sequence], of all tokens of the sequences: they determine which of them attention sees.
        indices: of targets, each of which is predicted from the token before it in the same document.
        supervised: how many tokens are targets.
        real: [batch, tokens], False for padding; see ``real_tokens``.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    indices: TokenIndices
    supervised: int
    real: torch.Tensor

    def part(self, sequence: SequenceGroup) -> MicroBatch:
        """Returns the part of the tokens that this rank computes.

        The first rank of a group counts the targets of all, so that their number does not depend on the ranks.
        """
        if sequence == ALONE:
            return self
        return replace(
            self,
            input_ids=sequence.part(self.input_ids).contiguous(),
            indices=self.indices.part(sequence, self.input_ids.shape[1]),
            supervised=self.supervised if sequence.rank == 0 else 0,
            real=sequence.part(self.real).contiguous(),
        )

    def pinned(self) -> MicroBatch:
        """Returns a copy in page-locked memory, from which GPUs copy without the host waiting."""
        return self._map(lambda tensor: tensor.pin_memory())

    def on(self, device: torch.device) -> MicroBatch:
        """Returns a copy on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        ids, positions, real = (function(each) for each in (self.input_ids, self.position_ids, self.real))
        return replace(self, input_ids=ids, position_ids=positions, indices=self.indices.map(function), real=real)


def real_tokens(position_ids: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    """Returns which tokens are not padding, ``[batch, sequence]``: padding is a last document without a target."""
    index = torch.arange(position_ids.shape[1])
    last = torch.where(position_ids == 0, index, 0).amax(dim=1, keepdim=True)  # where the last document begins
    in_last = index >= last
    return ~in_last | (in_last & loss_mask).any(dim=1, keepdim=True)


class TokenBlocks:
    """One split of a tokenize artifact, memory-mapped."""

    @classmethod
    def trained(cls, directory: Path, corpus: Path | None, fraction: float) -> TokenBlocks:
        """Opens what a stage trains on.

        Args:
            directory: the stage's own data.
            corpus: documents to mix in, in blocks of any length; None for none.
            fraction: of the sequences that are blocks of the corpus.
        """
        blocks = cls(directory, "train")
        if corpus is None:
            return blocks
        return MixedBlocks(blocks, ResizedBlocks(corpus, "train", blocks.sequence_length), fraction)

    @classmethod
    def evaluated(cls, directory: Path) -> dict[Split, TokenBlocks]:
        """Opens all splits of an artifact that are not trained on. The held-out one comes first."""
        splits = (split for split in SPLITS if split != "train")
        return {split: cls(directory, split) for split in splits if (directory / f"{split}.loss_mask.npy").exists()}

    def __init__(self, directory: Path, split: Split) -> None:
        arrays = open_blocks(directory, split)
        self._input_ids, self._position_ids = arrays["input_ids"], arrays["position_ids"]
        self._loss_mask = arrays["loss_mask"]

    def __len__(self) -> int:
        return int(self._input_ids.shape[0])

    @property
    def sequence_length(self) -> int:
        """Tokens per block."""
        return int(self._input_ids.shape[1])

    def rows(self, indices: Indices) -> Rows:
        """Returns the token ids, position ids and loss mask of the blocks at ``indices``, each [batch, sequence]."""
        return self._input_ids[indices], self._position_ids[indices], self._loss_mask[indices]

    def of_step(self, seed: int, step: int, size: int) -> Indices:
        """Returns the indices of the blocks of an optimizer step, see ``global_batch``."""
        return global_batch(seed, step, len(self), size)

    def batch(self, indices: Indices, repeated: npt.NDArray[np.bool_] | None = None) -> MicroBatch:
        """Returns the blocks at ``indices`` on the CPU.

        Args:
            indices: [batch].
            repeated: [batch], True for blocks that have been counted already and get no targets here.
        """
        input_ids, position_ids, mask = self.rows(indices)
        ids, positions = (torch.from_numpy(array.astype(np.int64)) for array in (input_ids, position_ids))
        loss_mask = torch.from_numpy(mask.astype(np.bool_))
        if repeated is not None:
            loss_mask[torch.from_numpy(repeated)] = False
        real = real_tokens(positions, loss_mask)
        return MicroBatch(ids, positions, TokenIndices.of(ids, positions, loss_mask), int(loss_mask.sum()), real)

    def supervised_tokens(self, indices: Indices) -> list[int]:
        """Returns how many tokens of each of these blocks are targets."""
        _, _, loss_mask = self.rows(indices)
        counts: list[int] = np.count_nonzero(loss_mask, axis=1).tolist()
        return counts


class ResizedBlocks(TokenBlocks):
    """The tokens of blocks of documents, in blocks of another length. Those that do not fill the last one are left out.

    Args:
        directory: a tokenize artifact.
        split: one of its splits.
        length: tokens per block.
    """

    def __init__(self, directory: Path, split: Split, length: int) -> None:
        super().__init__(directory, split)
        tokens = len(self) * self.sequence_length // length * length
        # These reshape the mapping, and read nothing.
        self._input_ids, self._position_ids, self._loss_mask = (
            array.reshape(-1)[:tokens].reshape(-1, length)
            for array in (self._input_ids, self._position_ids, self._loss_mask)
        )

    def rows(self, indices: Indices) -> Rows:
        """Returns the arrays [batch, sequence] of some blocks. The rest of a cut document is one of its own."""
        ids, positions, loss_mask = super().rows(indices)
        positions, predictable = positions_and_mask(positions == 0)
        return ids, positions, loss_mask * predictable


class MixedBlocks(TokenBlocks):
    """Blocks of conversations, and of a corpus that is mixed into them. The indices of the latter follow the others.

    Args:
        conversations: the stage's own blocks.
        corpus: blocks of the same length.
        fraction: of the sequences of a step that are blocks of the corpus.
    """

    def __init__(self, conversations: TokenBlocks, corpus: TokenBlocks, fraction: float) -> None:
        assert conversations.sequence_length == corpus.sequence_length
        self._conversations, self._corpus, self._fraction = conversations, corpus, fraction

    def __len__(self) -> int:
        return len(self._conversations) + len(self._corpus)

    @property
    def sequence_length(self) -> int:
        """Tokens per block."""
        return self._conversations.sequence_length

    def of_step(self, seed: int, step: int, size: int) -> Indices:
        """Returns the indices of the blocks of an optimizer step, see ``global_batch``."""
        return global_batch(seed, step, len(self._conversations), size, len(self._corpus), self._fraction)

    def rows(self, indices: Indices) -> Rows:
        """Returns the arrays [batch, sequence] of some blocks, in the order of ``indices``."""
        first = len(self._conversations)
        is_corpus = indices >= first
        parts = self._conversations.rows(indices[~is_corpus]), self._corpus.rows(indices[is_corpus] - first)
        places = np.argsort(np.concatenate([np.flatnonzero(~is_corpus), np.flatnonzero(is_corpus)]))
        ids, positions, loss_mask = (np.concatenate(arrays)[places] for arrays in zip(*parts, strict=True))
        return ids, positions, loss_mask


# ------------------------------------------------------------------------------------------- order

CORPUS_ORDER = 1  # makes the order of the corpus in sft differ from that in pretrain


@lru_cache(maxsize=4)  # a global batch touches at most two epochs of each kind unless the dataset is tiny
def _permutation(seed: tuple[int, ...], epoch: int, blocks: int) -> Indices:
    return np.random.default_rng([*seed, epoch]).permutation(blocks)


def _in_order(seed: tuple[int, ...], positions: Indices, blocks: int) -> Indices:
    """Returns the blocks at some positions of an endless sequence of epochs."""
    epochs, offsets = np.divmod(positions, blocks)
    return np.array([_permutation(seed, int(e), blocks)[o] for e, o in zip(epochs, offsets, strict=True)], np.int64)


def global_batch(seed: int, step: int, blocks: int, size: int, corpus: int = 0, fraction: float = 0.0) -> Indices:
    """Returns the block indices of optimizer step ``step`` (from 1), in order, over all ranks: [size].

    Args:
        seed: of the order.
        step: the optimizer step.
        blocks: how many blocks there are.
        size: sequences per step.
        corpus: blocks of a corpus, whose indices follow those of the others; see ``MixedBlocks``.
        fraction: of the sequences that are blocks of the corpus, exact to within one sequence after every step.
    """
    assert corpus > 0 or fraction == 0.0
    positions = np.arange((step - 1) * size, step * size)
    before = np.floor(positions * fraction).astype(np.int64)  # sequences from the corpus before each position
    is_corpus = np.floor((positions + 1) * fraction).astype(np.int64) > before
    indices = np.empty(size, np.int64)
    indices[~is_corpus] = _in_order((seed,), (positions - before)[~is_corpus], blocks)
    if corpus:
        indices[is_corpus] = blocks + _in_order((seed, CORPUS_ORDER), before[is_corpus], corpus)
    return indices


def micro_batches(indices: Indices, micro_batch: int, rank: int, ranks: int) -> Iterator[Indices]:
    """Yields the share of a rank, or of a group of ranks that share sequences, of a global batch.

    The pieces are [micro_batch], and all ranks get equally many: ``ranks * micro_batch`` divides the global batch,
    which is checked before the stage starts.

    Args:
        indices: the blocks of the global batch.
        micro_batch: sequences per piece.
        rank: the number of the rank or group.
        ranks: how many ranks or groups there are.
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
        sequence: the ranks that share sequences with this one.
    """

    def __init__(
        self,
        blocks: TokenBlocks,
        shares: Callable[[int], Sequence[Indices]],
        last: int,
        device: torch.device,
        sequence: SequenceGroup = ALONE,
    ) -> None:
        self._blocks, self._shares, self._last, self._device = blocks, shares, last, device
        self._sequence = sequence
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
        batches = [self._blocks.batch(share).part(self._sequence) for share in self._shares(step)]
        return [batch.pinned() for batch in batches] if self._device.type == "cuda" else batches

    def _use_device(self) -> None:
        if self._device.type == "cuda":  # a thread begins on the first GPU, and would create a context there
            torch.cuda.set_device(self._device)

"""Sequence parallelism: ranks that share every sequence, each of which stores the activations of its part.

A rank computes some of the tokens. Only attention needs all of them: before it, the ranks of a group exchange parts of
the sequence for heads, so that each has some heads of all tokens, and afterwards they exchange back (DeepSpeed Ulysses,
arXiv 2309.14509). The loss of a rank is that of its own targets, and its gradients are summed over all ranks, as they
are between sequences. For DeepSpeed all ranks are therefore data-parallel, and ZeRO partitions over all of them, as in
ALST (arXiv 2506.13996).

DeepSpeed's ``UlyssesSPAttentionHF`` makes the same exchange, but it gathers the position ids in every layer, although
the bounds of documents are known before the first one, requires one micro-batch size, also in evaluation, and does not
divide attention sinks among the ranks. Its data loader adapter would make the order of sequences depend on the ranks.

Shape symbols: B batch, R ranks of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share sequences with this one.

    Attributes:
        rank: the place of this rank among them, and of its part in the sequence.
        ranks: how many they are.
        group: for collectives; None if there is only this rank.
    """

    rank: int = 0
    ranks: int = 1
    group: distributed.ProcessGroup | None = None

    @classmethod
    def of_this_rank(cls, ranks: int) -> SequenceGroup:
        """Divides all ranks into groups of neighbors, which are on one node if possible. Collective."""
        if ranks == 1:
            return ALONE
        group, _ = distributed.new_subgroups(group_size=ranks)
        return cls(distributed.get_rank() % ranks, ranks, group)

    def place(self) -> tuple[int, int]:
        """Returns the number of this group among all groups, and how many there are."""
        return distributed.get_rank() // self.ranks, distributed.get_world_size() // self.ranks

    def part(self, x: torch.Tensor) -> torch.Tensor:
        """Returns this rank's tokens of a tensor [B, sequence]."""
        return x.chunk(self.ranks, dim=1)[self.rank]

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the tokens of all ranks from a tensor [B, tokens of this rank]. Collective, without a gradient."""
        parts = [torch.empty_like(x) for _ in range(self.ranks)]
        distributed.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=1)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the sum over the group's ranks. Collective, without a gradient."""
        if self.ranks == 1:
            return x
        total = x.clone()
        distributed.all_reduce(total, group=self.group)
        return total

    def to_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Returns [B, heads of this rank, sequence, D] from [B, heads, tokens of this rank, D]. Collective.

        If there are fewer heads than ranks, as of grouped keys and values, they are repeated.
        """
        if x.shape[1] < self.ranks:
            x = x.repeat_interleave(self.ranks // x.shape[1], dim=1)
        return self._exchange(x)

    def to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Returns [B, tokens of this rank, heads, D] from [B, sequence, heads of this rank, D]. Collective."""
        return self._exchange(x)

    def _exchange(self, x: torch.Tensor) -> torch.Tensor:
        """Sends the r-th part of dimension 1 to rank r, and joins what all ranks send along dimension 2."""
        parts = x.unflatten(1, (self.ranks, -1)).movedim(1, 0).contiguous()  # [R, B, ...], one for every receiver
        received: torch.Tensor = _AllToAll.apply(parts, self.group)  # [R, B, ...], one from every sender
        return received.movedim(0, 2).flatten(2, 3)


ALONE = SequenceGroup()


class _AllToAll(torch.autograd.Function):
    """Sends the r-th slice of dimension 0 to rank r. It is its own transpose, and thus its own backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: distributed.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        received = torch.empty_like(x)
        distributed.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grad_outputs
        return _AllToAll.apply(grad.contiguous(), ctx.group), None

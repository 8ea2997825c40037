"""A layer's tensors as methods see them: what each does, and where on disk it lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["matrix", "bias", "norm", "router", "sink"]
Block = Literal["attention", "mlp"]
Side = Literal["input", "inner", "output"]


@dataclass(frozen=True)
class Role:
    """What a tensor does.

    Attributes:
        name: q, k, v, o, gate, up, down, input_norm, post_attention_norm, ...
        kind: a linear map's ``[out, in]`` matrix, its ``[out]`` bias, a norm's scale or shift, the matrix or bias
            that chooses or weighs experts, or the logits of attention sinks.
        block: which of the layer's two residual blocks it belongs to.
        side: ``input`` reads the block's input, ``output`` writes what is added to the residual stream,
            ``inner`` sees neither.
        silent: the value that, filled into all of the block's tensors that have one, makes the block add
            exactly zero; None for tensors that are left alone.
        offset: what a norm adds to the stored scale (1 in Gemma).
        after_attention: whether it reads a residual stream to which the layer's own attention has been added.
    """

    name: str
    kind: Kind
    block: Block
    side: Side
    silent: float | None = None
    offset: float = 0.0
    after_attention: bool = False


@dataclass(frozen=True)
class Place:
    """Where a tensor lies within a stored one, which is ``[experts, rows, columns]`` with or without the first or last.

    Attributes:
        stored: the stored tensor's name within the layer.
        expert: index in the first dimension, where experts are stacked.
        transposed: whether matrices are stored ``[in, out]``.
        groups: how many times the pattern of parts repeats along the rows: once where they lie one below the other,
            as many times as there are heads where each head has its own query, key and value.
        begin, end, shares: within a group of ``shares`` equal shares, those from begin to end are this tensor's.
    """

    stored: str
    expert: int | None = None
    transposed: bool = False
    groups: int = 1
    begin: int = 0
    end: int = 1
    shares: int = 1

    def read(self, stored: Any) -> Any:
        """The tensor ``[out, in]`` or ``[out]``, taken from the stored one."""
        return self._view(stored).flatten(0, 1)

    def write(self, stored: Any, value: Any) -> None:
        """Puts the tensor into its place in the stored one, rounded to its dtype; the inverse of ``read``."""
        view = self._view(stored)
        view.copy_(value.unflatten(0, view.shape[:2]))

    def _view(self, stored: Any) -> Any:
        """``[groups, rows of one group, in]``, in the stored tensor's memory."""
        tensor = stored if self.expert is None else stored[self.expert]
        grouped = (tensor.T if self.transposed else tensor).unflatten(0, (self.groups, -1))
        share = grouped.shape[1] // self.shares
        return grouped[:, self.begin * share : self.end * share]


@dataclass(frozen=True)
class LayerTensor:
    """One tensor of every layer: its name within a layer, such as ``self_attn.q_proj.weight``, and its role.

    A tensor that is part of a stored one has a ``place``, and the name it would have if it were stored on its own.
    """

    name: str
    role: Role
    place: Place | None = None

    @property
    def module(self) -> str:
        """The name without ``.weight`` or ``.bias``: a matrix and its bias share it."""
        return self.name.rpartition(".")[0]

    @property
    def stored(self) -> str:
        """The name within a layer of the stored tensor that holds it."""
        return self.name if self.place is None else self.place.stored

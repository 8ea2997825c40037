"""The tensors of a decoder layer as expansion methods see them: their roles, and where they are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["matrix", "bias", "norm", "router", "sink", "other"]
Block = Literal["attention", "mlp"]
Side = Literal["input", "inner", "output"]


@dataclass(frozen=True)
class Role:
    """What a tensor does in its layer.

    Attributes:
        name: q, k, v, o, gate, up, down, input_norm, post_attention_norm, ...
        kind: the ``[out, in]`` matrix of a linear map, its ``[out]`` bias, the scale or shift of a norm, the matrix
            or bias that chooses or weights experts, the logits of attention sinks, or ``other`` for what only some
            layers have, such as the kernels and decay rates of state-space layers.
        block: the residual block of the layer that the tensor belongs to.
        side: ``input`` for a tensor that reads the block's input, ``output`` for one that writes what the block adds
            to the residual stream, ``inner`` for one that does neither.
        silent: the value that makes the block add exactly zero when every tensor of the block with a silent value is
            filled with it. None for tensors that are left as they are. Filled in by ``Family``.
        offset: what the norm adds to its stored scale (1 in Gemma).
        after_attention: whether the tensor reads the residual stream after the layer's own attention was added to it.
            Filled in by ``Family``.
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
    """Where a tensor is within a stored tensor of shape ``[rows]``, ``[rows, columns]`` or ``[experts, ...]``.

    Attributes:
        stored: the name of the stored tensor within its layer.
        expert: index in the first dimension of stacked experts.
        transposed: whether matrices are stored ``[in, out]``.
        groups: number of times that the sequence of parts repeats along the rows: 1 if each part is contiguous, the
            number of heads if every head has its own query, key and value rows.
        begin, end, shares: each group consists of ``shares`` equal shares. This tensor has those from ``begin`` to
            ``end``.
    """

    stored: str
    expert: int | None = None
    transposed: bool = False
    groups: int = 1
    begin: int = 0
    end: int = 1
    shares: int = 1

    def read(self, stored: Any) -> Any:
        """Returns the tensor, ``[out, in]`` or ``[out]``, from the stored one."""
        return self._view(stored).flatten(0, 1)

    def write(self, stored: Any, value: Any) -> None:
        """Writes the tensor into the stored one, cast to its dtype. The inverse of ``read``."""
        view = self._view(stored)
        view.copy_(value.unflatten(0, view.shape[:2]))

    def _view(self, stored: Any) -> Any:
        """A view of the stored tensor, ``[groups, rows per group, in]``."""
        tensor = stored if self.expert is None else stored[self.expert]
        grouped = (tensor.T if self.transposed else tensor).unflatten(0, (self.groups, -1))
        share = grouped.shape[1] // self.shares
        return grouped[:, self.begin * share : self.end * share]


@dataclass(frozen=True)
class LayerTensor:
    """One tensor that every layer has.

    Attributes:
        name: within the layer, such as ``self_attn.q_proj.weight``. For a part of a stored tensor, the name it would
            have if it were stored by itself.
        role: what the tensor does.
        place: where it is, for a part of a stored tensor.
    """

    name: str
    role: Role
    place: Place | None = None

    @property
    def module(self) -> str:
        """The name without ``.weight`` or ``.bias``, which a matrix and its bias share."""
        return self.name.rpartition(".")[0]

    @property
    def stored(self) -> str:
        """The name within the layer of the stored tensor that holds this one."""
        return self.name if self.place is None else self.place.stored

"""What a method sees and gives: layers as tensors by role. No files, no Hugging Face.

A method is a function ``expand(base, plan, settings, seed, journal)`` that yields every tensor of every new layer
once, in any order. ``base[i][tensor]`` reads one tensor of base layer i when it is asked for, as it is stored, so
that a copy is one to the bit; arithmetic is done in float32 or better, and whoever writes rounds to the base's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pipeline.expansion.layer_plan import LayerPlan
from pipeline.expansion.svd import Scratch, in_memory
from pipeline.models.families import LayerTensor

Layer = Mapping[LayerTensor, Tensor]  # a base layer reads from disk on access


class NewTensor(NamedTuple):
    """One tensor of one new layer."""

    layer: int  # index in the new model
    tensor: LayerTensor
    value: Tensor


def _say_nothing(note: str, **numbers: float) -> None:
    pass


def _keep_nothing() -> None:
    pass


@dataclass(frozen=True)
class Journal:
    """Where a method tells how it goes, reads what an earlier attempt had made, and finds room to work.

    Attributes:
        note: shows a line of text and named numbers to whoever watches.
        made: layers' indices in the new model and tensors that an interrupted attempt has written already; a method
            may leave them out, as long as what it yields does not depend on that.
        keep: makes what was yielded so far outlast an interruption, with ``records``; for a method that knows what
            would be dear to make again. Whoever writes does it every few seconds anyway.
        scratch: gives float32 tensors to work in, on disk where they are large.
        records: facts for the manifest, by what they are about.
        warnings: what somebody who uses the result should know.
    """

    note: Callable[..., None] = _say_nothing
    made: Collection[tuple[int, LayerTensor]] = ()
    keep: Callable[[], None] = _keep_nothing
    scratch: Scratch = in_memory
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def record(self, name: str, **facts: Any) -> None:
        """Keeps JSON values under a name such as ``layer 16 self_attn.q_proj``."""
        self.records[name] = facts


class ExpandFunction(Protocol):
    """The one function of a method's file."""

    def __call__(
        self, base: Sequence[Layer], plan: LayerPlan, settings: Any, seed: int, journal: Journal
    ) -> Iterator[NewTensor]:
        """Yields every tensor of every new layer once."""
        ...


def silenced(tensor: LayerTensor, value: Tensor) -> Tensor:
    """The value, or what makes its block add exactly zero to the residual stream (see ``Role.silent``)."""
    return value if tensor.role.silent is None else torch.full_like(value, tensor.role.silent)


def copies(base: Sequence[Layer], plan: LayerPlan) -> Iterator[NewTensor]:
    """Every new layer as its lower base neighbour is, bit for bit."""
    for planned in plan.new_layers:
        for tensor, value in base[planned.base[0]].items():
            yield NewTensor(planned.layer, tensor, value)


def grow(
    base: Sequence[Layer], plan: LayerPlan, journal: Journal, make: Callable[[int, Layer, Layer], Layer]
) -> Iterator[NewTensor]:
    """Makes whole layers, each from the two it lies between, but for those that are made and no other needs.

    Args:
        make: (index in the new model, lower layer, upper layer) -> the layer between them.
    """
    made: dict[int, Layer] = {}

    def layer_at(index: int) -> Layer:
        return made[index] if index in made else base[plan.layers[index].base[0]]

    remaining = list(plan.new_layers)
    while remaining:
        planned = remaining.pop(0)
        lower, upper = planned.made_from
        needed = {index for later in remaining for index in later.made_from}
        if planned.layer not in needed and all((planned.layer, tensor) in journal.made for tensor in base[0]):
            continue
        made[planned.layer] = make(planned.layer, layer_at(lower), layer_at(upper))
        for tensor, value in made[planned.layer].items():
            yield NewTensor(planned.layer, tensor, value)
        made = {index: layer for index, layer in made.items() if index in needed}

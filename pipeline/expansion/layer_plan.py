"""Where new layers go and what they come from. Integers only.

Gap i lies between base layers i and i+1; a layer appended after the last one has gap L-1, where the missing upper
neighbour is layer L-1 itself. Several layers in one gap are made by halving: the middle one from the outer two,
then left and right of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import UserError


@dataclass(frozen=True)
class PlannedLayer:
    """One layer of the new model.

    Attributes:
        layer: its index in the new model.
        new: whether it was not in the base; for SOLAR, a base layer's second occurrence.
        base: base layers it comes from: itself, or the neighbours of its gap.
        made_from: indices in the new model of the two layers it is made between; empty for copies of ``base[0]``.
    """

    layer: int
    new: bool
    base: tuple[int, ...]
    made_from: tuple[int, ...] = ()


@dataclass(frozen=True)
class LayerPlan:
    """All layers of the new model in order, and the order in which the new ones can be made."""

    num_base_layers: int
    layers: tuple[PlannedLayer, ...]
    making_order: tuple[int, ...] = field(repr=False)  # indices in the new model; each follows what it is made from

    @property
    def new_layers(self) -> tuple[PlannedLayer, ...]:
        """The new layers, each after those it is made from."""
        return tuple(self.layers[index] for index in self.making_order)

    @property
    def config_sources(self) -> tuple[int, ...]:
        """For every layer the base layer whose per-layer config entries it takes: its lower source."""
        return tuple(layer.base[0] for layer in self.layers)

    def to_json(self) -> list[dict[str, Any]]:
        """The rows of ``expansion.json``; ``made_from`` only where a layer is made from another new one."""
        return [self._row(layer) for layer in self.layers]

    def _row(self, layer: PlannedLayer) -> dict[str, Any]:
        row: dict[str, Any] = {"layer": layer.layer, "new": layer.new, "from": list(layer.base)}
        if any(self.layers[index].new for index in layer.made_from):
            row["made_from"] = list(layer.made_from)
        return row


def gaps_of(position: str | Sequence[int], new_layers: int, num_base_layers: int) -> tuple[int, ...]:
    """The gap of every new layer, ascending; a gap named k times gets k layers.

    Raises:
        UserError: the list and ``new_layers`` disagree, a gap is not there, or a model of one layer has no inner gap.
    """
    if not isinstance(position, str):
        return _explicit(position, new_layers, num_base_layers)
    if position == "interleaved":  # LLaMA Pro: after every (L/k)-th layer, as even as integers allow
        return tuple(-(-(j + 1) * num_base_layers // new_layers) - 1 for j in range(new_layers))
    inner = num_base_layers - 1
    if inner == 0:
        raise UserError(
            setting="expand.position",
            value=position,
            rule="a model of one layer has no gap between layers",
            remedy="Say expand.position=interleaved to append layers.",
        )
    everywhere, rest = divmod(new_layers, inner)
    start = {"top": inner - rest, "bottom": 0, "middle": (inner - rest) // 2}[position]
    return tuple(sorted([*range(inner)] * everywhere + [*range(start, start + rest)]))


def _explicit(gaps: Sequence[int], new_layers: int, num_base_layers: int) -> tuple[int, ...]:
    if len(gaps) != new_layers:
        raise UserError(
            setting="expand.new_layers",
            value=new_layers,
            rule=f"expand.position lists {len(gaps)} gaps, one for each new layer",
            remedy=f"Say expand.new_layers={len(gaps)}, or list {new_layers} gaps.",
        )
    missing = [gap for gap in gaps if not 0 <= gap < num_base_layers]
    if missing:
        raise UserError(
            setting="expand.position",
            value=list(gaps),
            rule=f"gap {missing[0]} is not there: a base of this depth has gaps 0 to {num_base_layers - 1}",
            remedy="Gap i lies after base layer i; list only gaps that are there.",
        )
    return tuple(sorted(gaps))


def insertion_plan(gaps: Sequence[int], num_base_layers: int) -> LayerPlan:
    """The base's layers with new ones between them, one for each entry of the ascending ``gaps``."""
    count = Counter(gaps)
    layers: list[PlannedLayer] = []
    order: list[int] = []
    for base in range(num_base_layers):
        lower = len(layers)
        layers.append(PlannedLayer(lower, new=False, base=(base,)))
        neighbours = (base, base + 1) if base + 1 < num_base_layers else (base,)
        made = {middle: pair for middle, *pair in _halving(lower, lower + count[base] + 1)}
        order.extend(made)
        for index in sorted(made):
            # Past the last layer the upper neighbour is the last layer itself.
            pair = (lower if base + 1 == num_base_layers and end > lower + count[base] else end for end in made[index])
            layers.append(PlannedLayer(index, new=True, base=neighbours, made_from=tuple(pair)))
    return LayerPlan(num_base_layers, tuple(layers), tuple(order))


def _halving(lower: int, upper: int) -> Iterator[tuple[int, int, int]]:
    """(new, lower, upper) for every index strictly between two layers, in an order in which they can be made."""
    between = upper - lower - 1
    if between > 0:
        middle = lower + (between + 1) // 2
        yield middle, lower, upper
        yield from _halving(lower, middle)
        yield from _halving(middle, upper)

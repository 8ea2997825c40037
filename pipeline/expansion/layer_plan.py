"""Where new layers go and which layers they come from. Integers only.

Gap i is between base layers i and i+1. A layer appended after the last one has gap L-1, where the last layer is also
used as the upper neighbor. Several layers in one gap are made by bisection: first the middle one from the outer two,
then those on its left and right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import UserError


@dataclass(frozen=True)
class PlannedLayer:
    """One layer of the new model.

    Attributes:
        layer: its index in the new model.
        new: whether it is not in the base. Where base layers are repeated, the second occurrence is new.
        base: the base layers it comes from: itself, or the neighbors of its gap.
        made_from: indices in the new model of the two layers that it is made between. Empty for copies of ``base[0]``.
    """

    layer: int
    new: bool
    base: tuple[int, ...]
    made_from: tuple[int, ...] = ()


@dataclass(frozen=True)
class LayerPlan:
    """All layers of the new model.

    Attributes:
        num_base_layers: the depth of the base.
        layers: from input to output.
        making_order: indices of the new layers, each after those it is made from.
    """

    num_base_layers: int
    layers: tuple[PlannedLayer, ...]
    making_order: tuple[int, ...] = field(repr=False)

    @property
    def new_layers(self) -> tuple[PlannedLayer, ...]:
        """The new layers, each after those it is made from."""
        return tuple(self.layers[index] for index in self.making_order)

    def making_steps(self) -> Iterator[tuple[PlannedLayer, set[int]]]:
        """Yields each new layer, after those it is made from, and the indices of the layers that later ones need."""
        new_layers = self.new_layers
        for number, planned in enumerate(new_layers, 1):
            yield planned, {index for later in new_layers[number:] for index in later.made_from}

    @property
    def config_sources(self) -> tuple[int, ...]:
        """For every layer, the base layer whose per-layer config entries it takes: its lower source."""
        return tuple(layer.base[0] for layer in self.layers)

    def to_json(self) -> list[dict[str, Any]]:
        """Returns the rows of ``expansion.json``, with ``made_from`` where a layer is made from another new one."""
        rows: list[dict[str, Any]] = []
        for layer in self.layers:
            rows.append({"layer": layer.layer, "new": layer.new, "from": list(layer.base)})
            if any(self.layers[index].new for index in layer.made_from):
                rows[-1]["made_from"] = list(layer.made_from)
        return rows


def recorded_gaps(expansion: Mapping[str, Any]) -> list[int]:
    """Returns the gaps of the new layers in an ``expansion.json``, or the layers that train instead of new ones."""
    return [*expansion.get("matched", ()), *(row["from"][0] for row in expansion["layers"] if row["new"])]


def gaps_of(position: str | Sequence[int], new_layers: int, num_base_layers: int) -> tuple[int, ...]:
    """Returns the gap of every new layer, in ascending order. A gap listed k times gets k layers.

    Args:
        position: top, middle, bottom, interleaved, or a list of gaps.

    Raises:
        UserError: the list does not have ``new_layers`` gaps, or one of the gaps does not exist.
    """
    if not isinstance(position, str):
        return _listed_gaps(position, new_layers, num_base_layers)
    if position == "interleaved":  # after every (L/k)-th layer (arXiv 2401.02415), as evenly as integers allow
        return tuple(-(-(j + 1) * num_base_layers // new_layers) - 1 for j in range(new_layers))
    inner = num_base_layers - 1  # the number of gaps between two layers
    if inner == 0:
        raise UserError(
            setting="expand.position",
            value=position,
            rule="a model with one layer has no gap between layers",
            remedy="Set expand.position=interleaved to append layers.",
        )
    # Every gap gets the same number of layers, and the position decides where the remainder goes.
    per_gap, rest = divmod(new_layers, inner)
    start = {"top": inner - rest, "bottom": 0, "middle": (inner - rest) // 2}[position]
    return tuple(sorted([*range(inner)] * per_gap + [*range(start, start + rest)]))


def _listed_gaps(gaps: Sequence[int], new_layers: int, num_base_layers: int) -> tuple[int, ...]:
    if len(gaps) != new_layers:
        raise UserError(
            setting="expand.new_layers",
            value=new_layers,
            rule=f"expand.position lists {len(gaps)} gaps, and needs one for each new layer",
            remedy=f"Set expand.new_layers={len(gaps)}, or list {new_layers} gaps.",
        )
    missing = [gap for gap in gaps if not 0 <= gap < num_base_layers]
    if missing:
        raise UserError(
            setting="expand.position",
            value=list(gaps),
            rule=f"gap {missing[0]} does not exist: a base of this depth has gaps 0 to {num_base_layers - 1}",
            remedy="List only existing gaps. Gap i is after base layer i.",
        )
    return tuple(sorted(gaps))


def insertion_plan(gaps: Sequence[int], num_base_layers: int) -> LayerPlan:
    """Returns the plan that adds one new layer to the base for each entry of the ascending ``gaps``."""
    count = Counter(gaps)
    layers: list[PlannedLayer] = []
    order: list[int] = []
    for base in range(num_base_layers):
        lower = len(layers)  # the base layer's index in the new model, below the layers of its gap
        layers.append(PlannedLayer(lower, new=False, base=(base,)))
        is_last = base + 1 == num_base_layers
        neighbors = (base,) if is_last else (base, base + 1)
        # index of a new layer -> the two it is made between. The order of this dictionary is the making order.
        made = {middle: pair for middle, *pair in _halving(lower, lower + count[base] + 1)}
        order.extend(made)
        for index in sorted(made):
            # There is no layer above the last gap: the last base layer is both of its ends.
            pair = (lower if is_last and end > lower + count[base] else end for end in made[index])
            layers.append(PlannedLayer(index, new=True, base=neighbors, made_from=tuple(pair)))
    return LayerPlan(num_base_layers, tuple(layers), tuple(order))


def stacked_plan(sources: Sequence[int], num_base_layers: int) -> LayerPlan:
    """Returns the plan whose layers are those of the base in ``sources``. All occurrences but the first are new.

    The first occurrences must be all layers of the base, in order.
    """
    seen: set[int] = set()
    layers = []
    for index, base in enumerate(sources):
        layers.append(PlannedLayer(index, new=base in seen, base=(base,)))
        seen.add(base)
    return LayerPlan(num_base_layers, tuple(layers), tuple(layer.layer for layer in layers if layer.new))


def _halving(lower: int, upper: int) -> Iterator[tuple[int, int, int]]:
    """Yields (new, lower, upper) for every index between two layers, in an order in which they can be made."""
    between = upper - lower - 1
    if between > 0:
        middle = lower + (between + 1) // 2
        yield middle, lower, upper
        yield from _halving(lower, middle)
        yield from _halving(middle, upper)


def matched_layers(gaps: Sequence[int], num_base_layers: int) -> tuple[int, ...]:
    """Returns as many layers of the base as there are gaps, in ascending order, to train instead of new ones.

    Each is the layer below its gap, which a new layer would be a copy of. If a gap is listed several times, the nearest
    layers follow, lower ones first.

    Raises:
        UserError: the base has fewer layers.
    """
    if len(gaps) > num_base_layers:
        raise UserError(
            setting="expand.new_layers",
            value=len(gaps),
            rule=f"trainable=matched trains as many layers of the base, which has {num_base_layers}",
            remedy=f"Set expand.new_layers={num_base_layers} or less.",
        )
    chosen = set(gaps)
    for gap in (gap for gap, times in Counter(gaps).items() for _ in range(times - 1)):
        chosen.add(min(set(range(num_base_layers)) - chosen, key=lambda layer: (abs(layer - gap), layer)))
    return tuple(sorted(chosen))

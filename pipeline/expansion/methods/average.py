"""The mean of the two neighbours, nothing zeroed: a control."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.config import AverageExpand
from pipeline.expansion.layer_plan import LayerPlan
from pipeline.expansion.layers import Journal, Layer, NewTensor, grow


def expand(
    base: Sequence[Layer], plan: LayerPlan, settings: AverageExpand, seed: int, journal: Journal
) -> Iterator[NewTensor]:
    """Every new layer is halfway between the two it is made from."""
    yield from grow(base, plan, journal, lambda index, lower, upper: _mean(lower, upper))


def _mean(lower: Layer, upper: Layer) -> Layer:
    return {tensor: (lower[tensor].float() + upper[tensor].float()) / 2 for tensor in lower}

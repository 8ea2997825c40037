"""No expansion: the base as it is, the control that says what continued training alone gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.config import NoExpand
from pipeline.expansion.layer_plan import LayerPlan
from pipeline.expansion.layers import Journal, Layer, NewTensor


def expand(
    base: Sequence[Layer], plan: LayerPlan, settings: NoExpand, seed: int, journal: Journal
) -> Iterator[NewTensor]:
    """Nothing is made."""
    return iter(())

"""The lower neighbour once more, nothing zeroed: a control that says what zeroing and mixing are worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.config import CopyExpand
from pipeline.expansion.layer_plan import LayerPlan
from pipeline.expansion.layers import Journal, Layer, NewTensor, copies


def expand(
    base: Sequence[Layer], plan: LayerPlan, settings: CopyExpand, seed: int, journal: Journal
) -> Iterator[NewTensor]:
    """Every new layer is its lower base neighbour."""
    return copies(base, plan)

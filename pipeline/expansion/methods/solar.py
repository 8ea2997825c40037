"""SOLAR's depth up-scaling (arXiv 2312.15166): the base's lower part, then its upper part, overlapping.

Nothing is zeroed: the model is worse until it is trained, and all of it trains. A base layer's second occurrence
counts as new.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.config import SolarExpand
from pipeline.expansion.layer_plan import LayerPlan
from pipeline.expansion.layers import Journal, Layer, NewTensor, copies


def expand(
    base: Sequence[Layer], plan: LayerPlan, settings: SolarExpand, seed: int, journal: Journal
) -> Iterator[NewTensor]:
    """Every second occurrence is the base's layer, bit for bit."""
    journal.warnings.append("solar places layers by its own overlap; expand.position is recorded as that")
    return copies(base, plan)

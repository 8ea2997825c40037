"""Copies of the lower neighbor, with nothing zeroed: a control that shows what zeroing and mixing contribute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.expansion.layer_plan import LayerPlan
from pipeline.expansion.method import InsertionMethod, LayerWeights, NewTensor, Workspace, copies


class Copy(InsertionMethod):
    """Every new layer is a copy of its lower base neighbor."""

    title = "copying"
    source = "control: the lower neighbor once more"
    color = "#56b4e9"
    like_layers = "none"

    def new_tensors(self, base: Sequence[LayerWeights], plan: LayerPlan, work: Workspace) -> Iterator[NewTensor]:
        """Yields the copies, bit for bit."""
        return copies(base, plan)

"""The mean of the two neighbors: a control. Nothing is zeroed unless ``zero_init`` asks for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

from pipeline.config.section import NotInKeyIf
from pipeline.expansion.layer_plan import LayerPlan
from pipeline.expansion.method import (
    LayerWeights,
    NewTensor,
    Workspace,
    ZeroInitMethod,
    from_neighbors,
)


class Average(ZeroInitMethod):
    """Every new layer is halfway between the two it is made from."""

    title = "averaging"
    source = "control: mean of the two neighbors"
    color = "#c98a00"
    like_layers = "sources"

    zero_init: Annotated[bool, NotInKeyIf(False)]  # added after the first averages were made

    def new_tensors(self, base: Sequence[LayerWeights], plan: LayerPlan, work: Workspace) -> Iterator[NewTensor]:
        """Yields the means, computed in float32."""

        def mean(index: int, lower: LayerWeights, upper: LayerWeights) -> LayerWeights:
            return {tensor: (lower[tensor].float() + upper[tensor].float()) / 2 for tensor in lower}

        return self.zeroed(from_neighbors(base, plan, work, mean))

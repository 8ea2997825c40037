"""The mean of the two neighbors, with nothing zeroed: a control."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.expansion.layer_plan import LayerPlan
from pipeline.expansion.method import InsertionMethod, LayerWeights, NewTensor, Workspace, from_neighbors


class Average(InsertionMethod):
    """Every new layer is halfway between the two it is made from."""

    title = "averaging"
    source = "control: mean of the two neighbors"
    color = "#c98a00"
    like_layers = "sources"

    def new_tensors(self, base: Sequence[LayerWeights], plan: LayerPlan, work: Workspace) -> Iterator[NewTensor]:
        """Yields the means, computed in float32."""

        def mean(index: int, lower: LayerWeights, upper: LayerWeights) -> LayerWeights:
            return {tensor: (lower[tensor].float() + upper[tensor].float()) / 2 for tensor in lower}

        return from_neighbors(base, plan, work, mean)

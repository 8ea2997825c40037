"""The mean of the two neighbors: a control. Nothing is zeroed unless ``zero_init`` asks for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

from pipeline.config.section import NotInKeyIf
from pipeline.expansion.layer_plan import LayerPlan
from pipeline.expansion.method import (
    InsertionMethod,
    LayerWeights,
    NewTensor,
    Workspace,
    from_neighbors,
    silenced,
)


class Average(InsertionMethod):
    """Every new layer is halfway between the two it is made from."""

    title = "averaging"
    source = "control: mean of the two neighbors"
    color = "#c98a00"
    like_layers = "sources"

    zero_init: Annotated[bool, NotInKeyIf(False)]  # zero the outputs, which keeps the logits

    @property
    def keeps_logits(self) -> bool:
        """Only with zeroed outputs."""
        return self.zero_init

    def new_tensors(self, base: Sequence[LayerWeights], plan: LayerPlan, work: Workspace) -> Iterator[NewTensor]:
        """Yields the means, computed in float32."""

        def mean(index: int, lower: LayerWeights, upper: LayerWeights) -> LayerWeights:
            return {tensor: (lower[tensor].float() + upper[tensor].float()) / 2 for tensor in lower}

        # Outputs are silenced only here: further layers of the same gap are made from the means.
        for made in from_neighbors(base, plan, work, mean):
            yield made._replace(value=silenced(made.tensor, made.value)) if self.zero_init else made

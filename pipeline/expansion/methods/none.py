"""No expansion: a control that shows what continued training alone achieves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import model_validator

from pipeline.expansion.layer_plan import LayerPlan, insertion_plan
from pipeline.expansion.method import LayerWeights, Method, NewTensor, Workspace


class NoExpansion(Method):
    """The base as it is. All of it trains."""

    title = "no expansion"
    source = "control: the base as it is"
    color = "#7a7a7a"
    like_layers = "none"
    trains = "all"

    new_layers: Literal[0]
    position: None

    @model_validator(mode="before")
    @classmethod
    def _ignore_placement(cls, values: Any) -> Any:
        """Records an experiment's new_layers and position, which mean nothing here, as 0 and None."""
        return {**values, "new_layers": 0, "position": None} if isinstance(values, dict) else values

    @property
    def keeps_logits(self) -> bool:
        """Always: nothing changes."""
        return True

    def place(self, num_base_layers: int) -> LayerPlan:
        """Returns the base's layers."""
        return insertion_plan((), num_base_layers)

    def new_tensors(self, base: Sequence[LayerWeights], plan: LayerPlan, work: Workspace) -> Iterator[NewTensor]:
        """Yields nothing."""
        return iter(())

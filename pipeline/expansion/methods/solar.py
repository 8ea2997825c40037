"""SOLAR's depth up-scaling (arXiv 2312.15166, section 2.1): the lower L-m layers, then the upper L-m layers.

Nothing is zeroed: the model is worse than the base until it is trained, and all of it trains. The second occurrence of
a base layer counts as new.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import field_validator

from pipeline.config.section import Positive
from pipeline.errors import UserError
from pipeline.expansion.layer_plan import LayerPlan, stacked_plan
from pipeline.expansion.method import LayerWeights, Method, NewTensor, Workspace, copies, own_placement


class Solar(Method):
    """Two overlapping copies of the base's layers."""

    title = "SOLAR"
    source = "SOLAR 10.7B: Depth Up-Scaling, arXiv 2312.15166"
    color = "#cc79a7"
    like_layers = "none"
    trains = "all"

    new_layers: Positive
    position: Literal["overlap"]

    @field_validator("position", mode="before")
    @classmethod
    def _record_overlap(cls, position: Any) -> Any:
        refusal = "solar has its own placement; set any named position, which is recorded as overlap"
        return own_placement(position, "overlap", refusal)

    def place(self, num_base_layers: int) -> LayerPlan:
        """Returns layers 0 to L-m-1, then m to L-1, where 2m = L - new_layers.

        If L - new_layers is odd, m is rounded down for the lower copy and up for the upper one. 32 + 16 gives 24 + 24.

        Raises:
            UserError: two copies of the base have fewer layers than that.
        """
        dropped = num_base_layers - self.new_layers
        if dropped < 0:
            raise UserError(
                setting="expand.new_layers",
                value=self.new_layers,
                rule=f"two copies of a base of {num_base_layers} layers add at most {num_base_layers}",
                remedy=f"Set expand.new_layers={num_base_layers} or less.",
            )
        lower_copy = range(num_base_layers - dropped // 2)
        upper_copy = range(-(-dropped // 2), num_base_layers)
        return stacked_plan([*lower_copy, *upper_copy], num_base_layers)

    def new_tensors(self, base: Sequence[LayerWeights], plan: LayerPlan, work: Workspace) -> Iterator[NewTensor]:
        """Yields the second occurrences, bit for bit."""
        work.warnings.append("solar has its own overlapping placement, and expand.position is recorded as overlap")
        return copies(base, plan)

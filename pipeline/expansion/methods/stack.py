"""Slices of the base, one after the other: ``slices: [0-21, 14-29]`` gives layers 0 to 21, then layers 14 to 29.

Many published ways of growing are special cases, for a base of L layers: SOLAR (arXiv 2312.15166) with two overlapping
slices, passthrough merges of mergekit with several, G_stack (arXiv 2405.15319) with all L layers several times, and
MIDAS (arXiv 2409.19044) and RYS with a block in the middle twice. Without ``slices``, it is that block, of
``new_layers`` layers. The second and further occurrences of a base layer count as new, and ``output_scale`` multiplies
what these add to the residual stream.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import field_validator, model_validator

from pipeline.config.section import Positive
from pipeline.errors import UserError
from pipeline.expansion.layer_plan import LayerPlan, stacked_plan
from pipeline.expansion.method import CopyingMethod, own_placement


class Stack(CopyingMethod):
    """The base's layers in slices, which may overlap."""

    title = "stacked slices"
    source = "slices of the base: G_stack (arXiv 2405.15319), MIDAS (arXiv 2409.19044), passthrough merges"
    color = "#7b4fa3"
    trains = "all"

    new_layers: Positive  # recorded as what the slices repeat, if they are given
    position: Literal["slices"]
    slices: list[str] | None  # first and last layer, such as 14-29; None: the middle new_layers layers occur twice

    @model_validator(mode="before")
    @classmethod
    def _count_new_layers(cls, values: Any) -> Any:
        """Records how many layers the slices repeat as ``new_layers``, whatever an experiment sets."""
        if not isinstance(values, dict) or not isinstance(values.get("slices"), list):
            return values
        slices = [str(item) for item in values["slices"]]  # a single layer may be given as an integer
        try:
            layers = _layers_of(slices)
            repeated = len(layers) - len(set(layers))
        except ValueError:  # the field's own validator says why
            repeated = 0
        return {**values, "slices": slices, **({"new_layers": repeated} if repeated else {})}

    @field_validator("slices")
    @classmethod
    def _check_slices(cls, slices: list[str] | None) -> list[str] | None:
        if slices is not None and len(layers := _layers_of(slices)) == len(set(layers)):
            raise ValueError("no layer occurs twice, so no layer is added; write slices that overlap")
        return slices

    @field_validator("position", mode="before")
    @classmethod
    def _record_slices(cls, position: Any) -> Any:
        return own_placement(position, "slices", "stack has its own placement, expand.slices; set any named position")

    def place(self, num_base_layers: int) -> LayerPlan:
        """Returns the layers of all slices.

        Raises:
            UserError: the slices do not contain every base layer, in order where layers occur first.
        """
        if self.slices is None:
            return stacked_plan(self._middle_twice(num_base_layers), num_base_layers)
        layers = _layers_of(self.slices)
        if fault := _fault(list(dict.fromkeys(layers)), num_base_layers):
            raise UserError(
                setting="expand.slices",
                value=self.slices,
                rule=f"{fault}. The layers of the base, 0 to {num_base_layers - 1}, must all occur, and occur first in "
                "this order",
                remedy=f"Set expand.slices=[0-{num_base_layers // 2},{num_base_layers // 4}-{num_base_layers - 1}], "
                "for example.",
            )
        return stacked_plan(layers, num_base_layers)

    def _middle_twice(self, num_base_layers: int) -> list[int]:
        if self.new_layers > num_base_layers:
            raise UserError(
                setting="expand.new_layers",
                value=self.new_layers,
                rule=f"without expand.slices, a part of the base is repeated once, which has {num_base_layers} layers",
                remedy=f"Set expand.new_layers={num_base_layers} or less, or expand.slices.",
            )
        begin = (num_base_layers - self.new_layers) // 2
        return [*range(begin + self.new_layers), *range(begin, num_base_layers)]


def _layers_of(slices: Sequence[str]) -> list[int]:
    """Returns all layers of the slices, one after the other.

    Raises:
        ValueError: a slice is not written as its first and its last layer.
    """
    layers: list[int] = []
    for text in slices:
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", text)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ValueError(f"{text} is not a slice; write its first and its last layer, such as 14-29")
        layers += range(first, last + 1)
    return layers


def _fault(first_occurrences: Sequence[int], num_base_layers: int) -> str:
    if beyond := [layer for layer in first_occurrences if layer >= num_base_layers]:
        return f"there is no layer {beyond[0]}"
    if missing := sorted(set(range(num_base_layers)) - set(first_occurrences)):
        return f"layer {missing[0]} does not occur"
    disordered = [layer for index, layer in enumerate(first_occurrences) if layer != index]
    return f"layer {disordered[0]} occurs before layers below it" if disordered else ""

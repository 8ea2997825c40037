"""Layers as the model's own initializer draws them, with zeroed outputs: a control for what initial weights contribute.

Matrices, routers and attention sinks are drawn from a normal distribution with the standard deviation
``initializer_range`` of config.json. Biases and shifts of norms are 0, and norms multiply by 1. This is what
``_init_weights`` of transformers does for the families of the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pipeline.expansion.layer_plan import LayerPlan
from pipeline.expansion.method import InsertionMethod, LayerWeights, NewTensor, Workspace, silenced
from pipeline.models.families import LayerTensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DEFAULT_RANGE = 0.02  # of transformers, for configs without ``initializer_range``


class RandomInit(InsertionMethod):
    """Every new layer is random, with zeroed outputs."""

    title = "random layers"
    source = "control: the model's initializer, with zeroed outputs"
    color = "#8a6d3b"
    like_layers = "none"
    needs_attention_and_mlp = True  # other layers have parameters with initializers of their own
    draws_random_numbers = True

    @property
    def keeps_logits(self) -> bool:
        """Always: both blocks of a new layer add zero."""
        return True

    def new_tensors(self, base: Sequence[LayerWeights], plan: LayerPlan, work: Workspace) -> Iterator[NewTensor]:
        """Yields what was not written before. Every tensor has a generator of its own."""
        deviation = work.config.get("initializer_range") or DEFAULT_RANGE
        for planned in plan.new_layers:
            alike = base[planned.base[0]]
            for tensor in alike:
                if (planned.layer, tensor) not in work.made:
                    value = _initial(tensor, alike[tensor].shape, deviation, work.generator(planned.layer, tensor.name))
                    yield NewTensor(planned.layer, tensor, silenced(tensor, value))


def _initial(tensor: LayerTensor, shape: Sequence[int], deviation: float, generator: torch.Generator) -> Tensor:
    import torch

    if tensor.role.kind == "norm" and tensor.name.endswith("weight"):
        return torch.full(shape, 1 - tensor.role.offset)
    if tensor.role.kind in ("norm", "bias"):
        return torch.zeros(shape)
    return torch.randn(shape, generator=generator) * deviation

"""Gradient norms by part, read where DeepSpeed keeps its slices: between the last backward pass and the step.

The parts are the new layers' ``o_proj`` and ``down_proj`` (after function-preserving surgery they are zero, and alone
get a gradient at first) and the rest of what trains. Every rank adds the squares of its own slices; one small
reduction makes the norms, so that the whole norm costs what DeepSpeed's own does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import distributed, nn
from transformers import PreTrainedModel

from pipeline.files import read_json
from pipeline.models.families import Role
from pipeline.models.reading import EXPANSION_FILE
from pipeline.training.freeze import layer_of_parameter, new_layers, roles_of_parameters

WHOLE, REST = "", "rest"  # all that trains; what is in none of the named parts
PARTS: Mapping[tuple[str, str], str] = {("attention", "output"): "o_proj", ("mlp", "output"): "down_proj"}


def parts_of_parameters(model: PreTrainedModel, model_dir: Path) -> dict[nn.Parameter, str]:
    """The part that each trained parameter counts with; where no layer is new, all layers count as such."""
    expansion = model_dir / EXPANSION_FILE
    new = new_layers(read_json(expansion)) if expansion.is_file() else set()
    layers, roles = layer_of_parameter(model), roles_of_parameters(model)
    counted = {name: role for name, role in roles.items() if not new or layers[name] in new}
    return {p: _part(counted.get(name)) for name, p in model.named_parameters() if p.requires_grad}


def _part(role: Role | None) -> str:
    return REST if role is None else PARTS.get((role.block, role.side), REST)


class GradientNorms:
    """L2 norms of the accumulated gradients, before clipping.

    Args:
        parameters: the trained parameters, with the part that each belongs to.
    """

    def __init__(self, engine: DeepSpeedEngine, parameters: Mapping[nn.Parameter, str]) -> None:
        self._engine = engine
        self._parameters = dict(parameters)
        self._parts = sorted(set(parameters.values()))
        self._sliced = not isinstance(engine.optimizer, torch.optim.Optimizer)  # else ZeRO 0: every rank has all

    def read(self) -> dict[str, float]:
        """The norm of every part, and of all together under ``WHOLE``. Collective."""
        squares = torch.zeros(len(self._parts), dtype=torch.float64, device=self._engine.device)
        for parameter, part in self._parameters.items():
            gradient = self._slice(parameter)
            if gradient is not None:
                squares[self._parts.index(part)] += gradient.float().square().sum(dtype=torch.float64)
        if self._sliced:
            distributed.all_reduce(squares)
        values: list[float] = squares.tolist()
        return {
            WHOLE: math.sqrt(math.fsum(values)),
            **{p: math.sqrt(v) for p, v in zip(self._parts, values, strict=True)},
        }

    def _slice(self, parameter: Any) -> torch.Tensor | None:
        """What this rank holds of a parameter's gradient; None where that is nothing."""
        if not self._sliced:
            return parameter.grad
        if isinstance(self._engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
            return self._engine.optimizer.get_local_fp32_grad_for_param(parameter)
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        gradient: torch.Tensor = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
        own = mapping.lp_fragment_address
        whole = gradient.numel() == parameter.numel()  # the bfloat16 optimizer accumulates all on every rank
        return gradient.narrow(0, own.start, own.numel) if whole else gradient

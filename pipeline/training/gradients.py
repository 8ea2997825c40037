"""Gradient norms by parameter group, read from DeepSpeed's partitions between the last backward pass and the step.

The groups are the new layers' ``o_proj`` and ``down_proj`` and all other trained parameters. After function-preserving
surgery these two projections are zero, and only they receive gradients at first. Every rank sums the squares of its own
partitions, and one small all-reduce combines them, so the cost is that of DeepSpeed's own gradient norm.
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

from pipeline.training.freeze import layer_of_parameter, new_layers, roles_of_parameters

TOTAL, REST = "", "rest"  # all trained parameters; those outside the groups below
SUMMED = 2**16  # elements; longer sums in float32 lose digits on CPUs, where torch adds them up one after the other
NORM_GROUPS: Mapping[tuple[str, str], str] = {("attention", "output"): "o_proj", ("mlp", "output"): "down_proj"}


def group_parameters(model: PreTrainedModel, model_dir: Path) -> dict[nn.Parameter, str]:
    """Returns the group of every trained parameter. If no layer is new, all layers are treated as new."""
    new = new_layers(model_dir)
    layers, roles = layer_of_parameter(model), roles_of_parameters(model)
    grouped = {name: role for name, role in roles.items() if not new or layers[name] in new}
    groups = {name: NORM_GROUPS.get((role.block, role.side), REST) for name, role in grouped.items()}
    return {p: groups.get(name, REST) for name, p in model.named_parameters() if p.requires_grad}


class GradientNorms:
    """Computes L2 norms of the accumulated gradients, before clipping.

    Args:
        engine: DeepSpeed's engine.
        groups: the group of every trained parameter.
    """

    def __init__(self, engine: DeepSpeedEngine, groups: Mapping[nn.Parameter, str]) -> None:
        self._engine = engine
        self._groups = dict(groups)
        self._names = sorted(set(groups.values()))
        # At ZeRO 0 the optimizer is AdamW itself, and every rank holds the full gradients.
        self._partitioned = not isinstance(engine.optimizer, torch.optim.Optimizer)

    def read(self) -> dict[str, float]:
        """Returns the norm of every group, and of all together under ``TOTAL``. Collective."""
        squares = torch.zeros(len(self._names), dtype=torch.float64, device=self._engine.device)
        for parameter, group in self._groups.items():
            gradient = self._local_gradient(parameter)
            if gradient is not None:
                squares[self._names.index(group)] += _sum_of_squares(gradient)
        if self._partitioned:
            distributed.all_reduce(squares)
        values: list[float] = squares.tolist()
        norms = {name: math.sqrt(value) for name, value in zip(self._names, values, strict=True)}
        return {TOTAL: math.sqrt(math.fsum(values)), **norms}

    def _local_gradient(self, parameter: Any) -> torch.Tensor | None:
        """Returns this rank's part of a parameter's gradient, or None if it has none."""
        if not self._partitioned:
            return parameter.grad
        if isinstance(self._engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
            return self._engine.optimizer.get_local_fp32_grad_for_param(parameter)
        mapping = parameter._hp_mapping  # DeepSpeed's link from a parameter to its fragment on this rank
        if mapping is None:
            return None
        gradient: torch.Tensor = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
        own = mapping.lp_fragment_address
        # DeepSpeed's bfloat16 optimizer accumulates full gradients on every rank. Without this slicing they would be
        # summed once per rank.
        is_full = gradient.numel() == parameter.numel()
        return gradient.narrow(0, own.start, own.numel) if is_full else gradient


def _sum_of_squares(gradient: torch.Tensor) -> torch.Tensor:
    """Returns a scalar in float64, without a copy of the gradient."""
    parts = gradient.flatten().split(SUMMED) if gradient.device.type == "cpu" else [gradient]
    return torch.stack([torch.linalg.vector_norm(part, dtype=torch.float32) for part in parts]).double().square().sum()

"""The float32 state of trained parameters, by name, wherever DeepSpeed keeps it.

ZeRO flattens, pads and slices master weights and AdamW's moments. DeepSpeed's accessors put one parameter together
again; this room adds what they leave out: moments before a first step, ZeRO 0, slices with padding, and the compute
weights, which DeepSpeed derives from the masters only after a step. Reading is collective: every rank calls in the
same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn
from torch.nn.functional import pad

Part = Literal["weight", "exp_avg", "exp_avg_sq"]
MOMENTS: tuple[Part, ...] = ("exp_avg", "exp_avg_sq")
PARTS: tuple[Part, ...] = ("weight", *MOMENTS)


class Masters:
    """Read and write access to master weights and moments.

    Args:
        engine: DeepSpeed's engine around torch's AdamW, before its first step.
        parameters: the trained parameters by the names they have in the model directory.
    """

    def __init__(self, engine: DeepSpeedEngine, parameters: Mapping[str, nn.Parameter]) -> None:
        self._engine = engine
        self._parameters = dict(parameters)
        self._zero3 = isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3)
        self._plain = isinstance(engine.optimizer, torch.optim.Optimizer)  # ZeRO 0
        self._create_moments()

    def names(self) -> Iterator[str]:
        """The trained parameters, in the model's order."""
        return iter(self._parameters)

    def read(self, name: str, part: Part) -> torch.Tensor:
        """One whole float32 tensor, in the parameter's shape, on the CPU. Collective."""
        parameter = self._parameters[name]
        if self._plain:
            value = parameter.data if part == "weight" else self._engine.optimizer.state[parameter][part]
        elif part == "weight":
            value = safe_get_full_fp32_param(parameter)
        else:
            value = safe_get_full_optimizer_state(parameter, part)
        assert value is not None and value.dtype == torch.float32, (name, part)
        return value.detach().cpu()

    def write(self, name: str, part: Part, value: torch.Tensor) -> None:
        """Sets one whole tensor; a weight is also cast into the weights of compute. Every rank gives the same."""
        parameter = self._parameters[name]
        value = value.to(self._engine.device, torch.float32)
        if self._plain:
            target = parameter.data if part == "weight" else self._engine.optimizer.state[parameter][part]
            target.copy_(value)
        elif self._zero3:
            self._write_slice(parameter, part, value)
        elif part == "weight":
            safe_set_full_fp32_param(parameter, value)
            parameter.data.copy_(value)
        else:
            safe_set_full_optimizer_state(parameter, value, part)

    def _write_slice(self, parameter: Any, part: Part, value: torch.Tensor) -> None:
        """ZeRO 3: the whole-tensor setter fails where the ranks do not divide the parameter, so slices are cut here."""
        size = parameter.ds_tensor.ds_numel
        ranks, rank = self._engine.dp_world_size, torch.distributed.get_rank()
        mine = pad(value.flatten(), (0, size * ranks - value.numel()))[size * rank : size * (rank + 1)]
        if part != "weight":
            safe_set_local_optimizer_state(parameter, mine, part)
            return
        safe_set_local_fp32_param(parameter, mine)
        with GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)

    # --------------------------------------------------------------------------------------- optimizer

    @property
    def _adamw(self) -> torch.optim.Optimizer:
        optimizer = self._engine.optimizer if self._plain else self._engine.optimizer.optimizer
        assert isinstance(optimizer, torch.optim.AdamW)
        return optimizer

    def _tensors(self) -> list[torch.Tensor]:
        """The tensors that AdamW steps: flat float32 slices, or the parameters themselves at ZeRO 0."""
        optimizer = self._engine.optimizer
        if self._zero3:
            return list(optimizer.fp32_partitioned_groups_flat)
        if isinstance(optimizer, DeepSpeedZeroOptimizer):
            return list(optimizer.single_partition_of_fp32_groups)
        if isinstance(optimizer, BF16_Optimizer):
            return list(optimizer.fp32_groups_flat_partition)
        assert self._plain, type(optimizer)
        return list(self._parameters.values())

    def _create_moments(self) -> None:
        """AdamW makes its state in its first step; here it exists from the start, so that it can be restored."""
        for tensor in self._tensors():
            assert not self._adamw.state[tensor]
            self._adamw.state[tensor] = {
                "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
                **{moment: torch.zeros_like(tensor, requires_grad=False) for moment in MOMENTS},
            }
        if not self._plain and not self._zero3:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()  # links names to slices of the moments

    def set_step(self, step: int) -> None:
        """AdamW's own count of steps, which corrects its moments' bias."""
        for tensor in self._tensors():
            self._adamw.state[tensor]["step"].fill_(step)

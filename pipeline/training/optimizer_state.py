"""Named access to the float32 training state: master weights and the optimizer's moments, for every ZeRO stage.

ZeRO flattens, pads and partitions this state. DeepSpeed's accessors reassemble single parameters. ``OptimizerState``
adds what they leave out: moments before the first step, ZeRO 0, padded partitions at ZeRO 3, and the compute weights,
which DeepSpeed updates from the master weights only in a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn
from torch.nn.functional import pad

from pipeline.models.families import Place
from pipeline.training.freeze import full_shape
from pipeline.training.muon import locate
from pipeline.training.optimizer import AVERAGE, HAS_PARTS, MATRICES, MULTIPLE, ExtendedAdamW, multiples_of_elements
from pipeline.training.rates import Multiple

StateKey = Literal["weight", "exp_avg", "exp_avg_sq", "momentum_buffer", "ema", "multiple"]
ADAMW_STATE: tuple[StateKey, ...] = ("exp_avg", "exp_avg_sq")
MUON_STATE: tuple[StateKey, ...] = ("momentum_buffer",)


class OptimizerState:
    """Reads and writes the master weights, moments and averages of trained parameters by name.

    Args:
        engine: DeepSpeed's engine around torch's AdamW, before its first step.
        parameters: the trained parameters by their names in the model directory.
        multiples: of the learning rate, by parameter name.
        matrices: the places of the matrices that Muon updates, by parameter name.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        parameters: Mapping[str, nn.Parameter],
        multiples: Mapping[str, Multiple],
        matrices: Mapping[str, Sequence[Place]],
    ) -> None:
        self._engine, self._matrices = engine, matrices
        self._parameters = dict(parameters)
        self._zero0 = isinstance(engine.optimizer, torch.optim.Optimizer)  # AdamW itself, not wrapped by ZeRO
        self._zero3 = isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3)
        adamw = self._adamw
        has_averages = isinstance(adamw, ExtendedAdamW) and adamw.ema_decay is not None
        self._averages: tuple[StateKey, ...] = (AVERAGE,) if has_averages else ()
        self._create_state()
        self._locate_matrices()
        # The multiples are not saved in checkpoints, since they follow from the settings.
        for name, multiple in multiples.items():
            if isinstance(multiple, tuple):
                self.write(name, MULTIPLE, multiples_of_elements(multiple, full_shape(self._parameters[name])))

    def names(self) -> Iterator[str]:
        """Returns the names of the trained parameters, in the model's order."""
        return iter(self._parameters)

    def keys(self, name: str) -> tuple[StateKey, ...]:
        """Returns the keys of what a checkpoint saves of a parameter."""
        return ("weight", *(MUON_STATE if name in self._matrices else ADAMW_STATE), *self._averages)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a trained parameter."""
        return tuple(full_shape(self._parameters[name]))

    def write_initial(self, name: str, weight: torch.Tensor) -> None:
        """Sets a weight, and its average to the same value. Collective, like ``write``."""
        for key in ("weight", *self._averages):
            self.write(name, key, weight)

    def use_averages(self) -> None:
        """Replaces the weights by their averages. Collective."""
        for name in self.names():
            self.write(name, "weight", self.read(name, AVERAGE))

    def read(self, name: str, key: StateKey) -> torch.Tensor:
        """Returns a full float32 tensor on the CPU, in the parameter's shape.

        Collective: all ranks must read the same tensors in the same order.
        """
        parameter = self._parameters[name]
        if self._zero0:
            value = self._whole(parameter, key)
        elif key == "weight":
            value = safe_get_full_fp32_param(parameter)
        else:
            value = safe_get_full_optimizer_state(parameter, key)
        assert value is not None and value.dtype == torch.float32, (name, key)
        return value.detach().cpu()

    def owned(self, name: str, key: StateKey) -> tuple[int, torch.Tensor]:
        """Returns the elements of a tensor that this rank saves. The elements of all ranks together are the tensor.

        Not collective. The elements are not copied, so the next optimizer step changes them.

        Returns:
            The index of the first element in the flattened tensor, and the elements, [elements], possibly none.
        """
        parameter: Any = self._parameters[name]
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if self._zero0:  # every rank has all of them
            value = self._whole(parameter, key).flatten()
            start, end = value.numel() * rank // ranks, value.numel() * (rank + 1) // ranks
            return start, value[start:end]
        if self._zero3:
            weight = key == "weight"
            value = safe_get_local_fp32_param(parameter) if weight else safe_get_local_optimizer_state(parameter, key)
            elements = math.prod(full_shape(parameter))
            start = min(parameter.ds_tensor.ds_numel * rank, elements)
            return start, value.detach()[: elements - start]  # without the padding
        fragment = parameter._hp_mapping
        if fragment is None:  # the parameter is outside this rank's partition
            return 0, torch.empty(0, device=parameter.device)
        elements = fragment.get_hp_fragment(None if key == "weight" else key)
        return fragment.lp_fragment_address.start, elements.detach()

    def _whole(self, parameter: nn.Parameter, key: StateKey) -> torch.Tensor:
        """Returns a tensor at ZeRO 0. Parameters are float32 there (see deepspeed_config): they are the weights."""
        value = parameter if key == "weight" else self._engine.optimizer.state[parameter][key]
        return value.detach()

    def write(self, name: str, key: StateKey, value: torch.Tensor) -> None:
        """Sets a full tensor. A weight is also written to the compute weights, in their dtype.

        Collective: all ranks must pass the same value.
        """
        parameter = self._parameters[name]
        value = value.to(self._engine.device, torch.float32)
        if self._zero0:
            self._whole(parameter, key).copy_(value)
        elif self._zero3:
            self._write_partition(parameter, key, value)
        elif key == "weight":
            safe_set_full_fp32_param(parameter, value)
            parameter.data.copy_(value)  # DeepSpeed would do this only after the next step
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _write_partition(self, parameter: Any, key: StateKey, value: torch.Tensor) -> None:
        """Writes this rank's partition at ZeRO 3.

        DeepSpeed's setter of full tensors fails if the number of ranks does not divide the number of elements, so the
        value is padded and partitioned here.
        """
        size = parameter.ds_tensor.ds_numel
        ranks, rank = self._engine.dp_world_size, torch.distributed.get_rank()
        # All partitions have the same size, so the last one is padded with zeros.
        padded = pad(value.flatten(), (0, size * ranks - value.numel()))
        partition = padded[size * rank : size * (rank + 1)]
        if key != "weight":
            safe_set_local_optimizer_state(parameter, partition, key)
            return
        safe_set_local_fp32_param(parameter, partition)
        with GatheredParameters([parameter], modifier_rank=0):  # on exit, rank 0's values go to all partitions
            parameter.data.copy_(value)

    def set_step(self, step: int) -> None:
        """Sets AdamW's step count, from which it computes the bias corrections."""
        for _, tensor in self._optimized_tensors():
            self._adamw.state[tensor]["step"].fill_(step)

    # ------------------------------------------------------------------------------------- AdamW's state

    @property
    def _adamw(self) -> torch.optim.Optimizer:
        optimizer = self._engine.optimizer if self._zero0 else self._engine.optimizer.optimizer
        assert isinstance(optimizer, torch.optim.AdamW)
        return optimizer

    def _optimized_tensors(self) -> list[tuple[dict[str, Any], torch.Tensor]]:
        """Returns the tensors that AdamW updates, each with its parameter group.

        They are flat float32 partitions, or the parameters themselves at ZeRO 0.
        """
        optimizer, groups = self._engine.optimizer, self._adamw.param_groups
        if self._zero3:
            partitions = enumerate(optimizer.fp32_partitioned_groups_flat)
            return [(groups[optimizer.sub_group_to_group_id[index]], tensor) for index, tensor in partitions]
        if isinstance(optimizer, DeepSpeedZeroOptimizer):
            return list(zip(groups, optimizer.single_partition_of_fp32_groups, strict=True))
        if isinstance(optimizer, BF16_Optimizer):  # DeepSpeed's choice at ZeRO 1 in bfloat16
            return list(zip(groups, optimizer.fp32_groups_flat_partition, strict=True))
        assert self._zero0, type(optimizer)
        return [(group, parameter) for group in groups for parameter in group["params"]]

    def _create_state(self) -> None:
        """Creates AdamW's state, which it would create in its first step, so that a checkpoint can be restored."""
        for group, tensor in self._optimized_tensors():
            assert not self._adamw.state[tensor]
            moments, multiple = MUON_STATE if group[MATRICES] else ADAMW_STATE, (MULTIPLE,) if group[HAS_PARTS] else ()
            keys = (*moments, *multiple, *self._averages)
            self._adamw.state[tensor] = {
                # A float32 tensor on the parameter's device, as torch's fused AdamW requires.
                "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
                **{key: torch.zeros_like(tensor, requires_grad=False) for key in keys},
            }
        if not self._zero0 and not self._zero3:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()  # maps parameters to slices of the moments

    def _locate_matrices(self) -> None:
        """Tells Muon where the matrices are in the tensors that it updates."""
        if not self._matrices:
            return
        assert isinstance(self._adamw, ExtendedAdamW) and not self._zero3
        fragments = locate({self._parameters[name]: places for name, places in self._matrices.items()}, not self._zero0)
        if self._zero0:
            self._adamw.fragments = {parameter: [fragment] for parameter, fragment in fragments.items()}
            return
        optimizer = self._engine.optimizer
        members = optimizer.bf16_groups if isinstance(optimizer, BF16_Optimizer) else optimizer.bit16_groups
        for (group, partition), parameters in zip(self._optimized_tensors(), members, strict=True):
            if group[MATRICES]:
                self._adamw.fragments[partition] = [fragments[parameter] for parameter in parameters]

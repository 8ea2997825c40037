"""AdamW or Muon over the trained parameters, with parameter groups for weight decay and learning rates.

Norms and biases are not decayed. Tensors of the base may have their own learning rate, and so may a role, as a multiple
of the schedule's: after function-preserving surgery, the zero-initialized outputs (``o``, ``down``) are the only
tensors that change in the first step. Where norms silence the blocks of a new layer, they and the projections before
them have their own rates by default; see ``_silent_blocks``.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from pipeline.config import Train
from pipeline.models.families import Role, family_for
from pipeline.models.reading import ModelDirectory
from pipeline.models.stored_parameters import StoredParameters
from pipeline.training import rates
from pipeline.training.freeze import (
    full_shape,
    layer_of_parameter,
    layers_with_learning_rate,
    new_layers,
    roles_of_parameters,
)
from pipeline.training.muon import Fragment, NewtonSchulz, muon_step
from pipeline.training.rates import Multiple

LR_MULTIPLE = "learning_rate_multiple"  # key of a parameter group; the loop multiplies the schedule's rate by it
HAS_PARTS = "has_parts"  # key of a parameter group: whether its tensors have one multiple per element
MATRICES = "matrices"  # key of a parameter group: whether Muon updates it
AVERAGE: Literal["ema"] = "ema"  # key of the state of all tensors if averages are kept
SCALE_MULTIPLE = 3.0  # of the learning rate and sqrt(n), of norm scales that silence a block; see _silent_blocks
OUTPUT_MULTIPLE = 10.0  # of the learning rate, of the projections before these norms
MULTIPLE: Literal["multiple"] = "multiple"  # key of the state of such tensors: the multiples, in their shape


def learning_rate_multiples(section: str, model: PreTrainedModel, train: Train, model_dir: Path) -> dict[str, Multiple]:
    """Returns the multiples of the learning rate of the trained parameters that have one, by name.

    Args:
        section: the section of the settings, for messages.
        model: the model, after ``freeze_others``.
        train: the settings.
        model_dir: the directory that the model was loaded from.

    Raises:
        UserError: ``base_learning_rate`` or ``role_learning_rates`` applies to no trained parameter.
    """
    roles, config = roles_of_parameters(model), model.config.to_dict()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    new = layers_with_learning_rate(train.trainable, model_dir)
    set_by_user = rates.requested_multiples(
        section, train, family_for(config), config, layer_of_parameter(model), trained, new
    )
    known = {name: roles[name] for name in trained if name in roles}
    return {**_silent_blocks(model, known, model_dir, train.optimizer), **set_by_user}


def _silent_blocks(
    model: PreTrainedModel, trained: Mapping[str, Role], model_dir: Path, optimizer: str
) -> dict[str, float]:
    """Returns the multiples of the learning rate in blocks of new layers that are silenced by the scale of a norm.

    Where a norm follows the projection of a block (Gemma 2 and 3, OLMo 2), a method that keeps the logits silences that
    norm's scale. In the first step only the scale has a gradient, and AdamW moves it, and so the block's normalized
    output, by the learning rate. A zeroed projection ``[out, n]`` moves each output by the learning rate times a sum
    over n inputs: of the size of sqrt(n) if these are unrelated, and of n if they agree. ``SCALE_MULTIPLE`` times
    sqrt(n) lies between them.

    A zeroed projection consists of what it has learned after the first step. That before the norm is a copy, whose
    direction changes by the learning rate relative to the size of its elements. It learns at ``OUTPUT_MULTIPLE`` times
    the rate; Muon, with which this has not been measured, updates it at the plain rate. Both multiples are measured by
    ``scripts/benchmarks/output_norms.py``. Once the scale is no longer silent, as in the next training stage, a block
    learns like all others.
    """
    layers, new = layer_of_parameter(model), new_layers(model_dir)
    scales = {
        name: role.silent
        for name, role in trained.items()
        if role.kind == "norm" and role.silent is not None and layers[name] in new
    }
    if not scales:
        return {}
    stored, roles = StoredParameters(ModelDirectory(model_dir)), roles_of_parameters(model)
    outputs = defaultdict(list)  # the projections of every block
    inputs = {}  # of the projection
    for name, parameter in model.named_parameters():
        if (role := roles.get(name)) is not None and (role.kind, role.side) == ("matrix", "output"):
            outputs[layers[name], role.block].append(name)
            inputs[layers[name], role.block] = full_shape(parameter)[-1]
    multiples = {}
    for name, silent in scales.items():
        if (stored.read(name) == silent).all():
            block = layers[name], trained[name].block
            multiples[name] = SCALE_MULTIPLE * math.sqrt(inputs[block])
            if optimizer == "adamw":
                multiples |= {output: OUTPUT_MULTIPLE for output in outputs[block] if output in trained}
    return multiples


def parameter_groups(
    model: PreTrainedModel, train: Train, multiples: Mapping[str, Multiple], matrices: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Groups the trained parameters by optimizer, weight decay and learning rate.

    Args:
        model: the model, after ``freeze_others``.
        train: the settings.
        multiples: of the learning rate, by parameter name.
        matrices: the names of the parameters that Muon updates.
    """
    groups: dict[tuple[float, float | None, bool], list[torch.nn.Parameter]] = defaultdict(list)
    roles = roles_of_parameters(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # The dimension alone identifies neither biases nor norms: gpt_oss stacks the biases of its experts in a matrix,
        # and Cohere the scales of all heads.
        is_bias, is_norm = name.endswith("bias"), name in roles and roles[name].kind == "norm"
        decay = 0.0 if is_bias or is_norm or len(full_shape(parameter)) < 2 else train.weight_decay
        multiple = multiples.get(name, 1.0)
        groups[decay, None if isinstance(multiple, tuple) else multiple, name in matrices].append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": decay,
            LR_MULTIPLE: 1.0 if multiple is None else multiple,
            HAS_PARTS: multiple is None,
            MATRICES: uses_muon,
        }
        for (decay, multiple, uses_muon), parameters in groups.items()
    ]


def multiples_of_elements(multiple: Multiple, shape: torch.Size) -> torch.Tensor:
    """Returns the multiple of the learning rate of every element of a fused tensor, in its shape."""
    assert isinstance(multiple, tuple)
    full = torch.ones(shape)
    for part in multiple:
        part.place.write(full, torch.full_like(part.place.read(full), part.multiple))
    return full


def make_optimizer(
    groups: list[dict[str, Any]], train: Train, muon_dtype: torch.dtype = torch.float32
) -> torch.optim.AdamW:
    """Returns torch's fused AdamW, on CPUs and GPUs alike, or an ``ExtendedAdamW`` if the settings require it.

    Args:
        groups: as from ``parameter_groups``.
        train: the settings.
        muon_dtype: in which Muon orthogonalizes matrices.
    """
    options: dict[str, Any] = {
        "lr": train.learning_rate, "betas": (train.beta1, train.beta2), "eps": train.epsilon, "fused": True,
    }  # fmt: skip
    if train.ema_decay is None and not any(group.get(key) for group in groups for key in (HAS_PARTS, MATRICES)):
        return torch.optim.AdamW(groups, **options)
    return ExtendedAdamW(groups, train.ema_decay, NewtonSchulz(train.newton_schulz_steps, muon_dtype), **options)


class ExtendedAdamW(torch.optim.AdamW):
    """AdamW with Muon for some groups, a learning rate for every element of some tensors, and averages of all tensors.

    The tensors may be partitions that ZeRO has flattened. A step, weight decay included, is proportional to the
    learning rate, so each element of the step is multiplied by the element of ``state[tensor]["multiple"]``. Averages
    are exponential: ``state[tensor]["ema"]`` moves towards the tensor by 1 - ema_decay of the difference per step.

    Attributes:
        ema_decay: of the averages; None for none.
        iteration: with which Muon orthogonalizes a matrix.
        fragments: by tensor that Muon updates, where the matrices are.
    """

    def __init__(
        self, groups: list[dict[str, Any]], ema_decay: float | None, iteration: NewtonSchulz, **options: Any
    ) -> None:
        super().__init__(groups, **options)
        self.ema_decay = ema_decay
        self.iteration = iteration
        self.fragments: dict[torch.Tensor, list[Fragment]] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates all tensors."""
        assert closure is None
        rated = [t for group in self.param_groups if group[HAS_PARTS] for t in group["params"] if self.state[t]]
        before = [tensor.detach().clone() for tensor in rated]
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group[MATRICES]]
        super().step()
        self.param_groups = groups
        for group in groups:
            for tensor in group["params"] if group[MATRICES] else ():
                momentum, fragments = self.state[tensor]["momentum_buffer"], self.fragments[tensor]
                muon_step(tensor, momentum, fragments, group["lr"], group["weight_decay"], self.iteration)
        for tensor, old in zip(rated, before, strict=True):
            tensor.copy_(old.lerp_(tensor, self.state[tensor][MULTIPLE]))
        if self.ema_decay is not None:
            for tensor in (tensor for group in groups for tensor in group["params"] if self.state[tensor]):
                self.state[tensor][AVERAGE].lerp_(tensor, 1.0 - self.ema_decay)

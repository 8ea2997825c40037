"""AdamW over the trained parameters, with parameter groups for weight decay and learning rates.

Norms and biases are not decayed. A role may have its own learning rate, given as a multiple of the schedule's:
after function-preserving surgery, the zero-initialized outputs (``o``, ``down``) are the only tensors that change in
the first step. The scales of output norms that silence a new layer have their own rate by default; see
``_silent_scales``.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.config import Train
from pipeline.errors import UserError
from pipeline.models.families import Role
from pipeline.models.reading import ModelDirectory
from pipeline.training.freeze import full_shape, layer_of_parameter, new_layers, roles_of_parameters

LR_MULTIPLE = "learning_rate_multiple"  # key of a parameter group; the loop multiplies the schedule's rate by it


def learning_rate_multiples(section: str, model: PreTrainedModel, train: Train, model_dir: Path) -> dict[str, float]:
    """Returns the multiples of the learning rate of the trained parameters that have one, by name.

    Args:
        section: the section of the settings, for messages.
        model: the model, after ``freeze_others``.
        train: the settings.
        model_dir: the directory that the model was loaded from.

    Raises:
        UserError: ``role_learning_rates`` names a role that no trained parameter has.
    """
    roles = roles_of_parameters(model)
    trained = {name: roles[name] for name, p in model.named_parameters() if p.requires_grad and name in roles}
    by_role = train.role_learning_rates
    unused = set(by_role) - {role.name for role in trained.values()}
    if unused:
        known = sorted({role.name for role in roles.values()})
        raise UserError(
            setting=f"{section}.role_learning_rates",
            value=", ".join(sorted(unused)),
            rule=f"no trained parameter has this role; the model's roles are {', '.join(known)}",
            remedy="Name the role of a trained parameter, or remove the setting.",
        )
    named = {name: by_role[role.name] for name, role in trained.items() if role.name in by_role}
    return {**_silent_scales(model, trained, model_dir), **named}


def _silent_scales(model: PreTrainedModel, trained: Mapping[str, Role], model_dir: Path) -> dict[str, float]:
    """Returns the norm scales that silence a block of a new layer, with their multiples of the learning rate.

    Where a norm follows the projection of a block (Gemma 2 and 3, OLMo 2), a method that keeps the logits silences that
    norm's scale. In the first step only the scale has a gradient, and AdamW moves it, and so the block's normalized
    output, by the learning rate. A zeroed projection ``[out, n]`` moves each output by the learning rate times a sum
    over n inputs, which is of the size of sqrt(n). With sqrt(n) times the learning rate, the scale moves the output as
    fast. Once it is no longer silent, as in the next training stage, it learns like all other parameters.
    """
    layers, new = layer_of_parameter(model), new_layers(model_dir)
    scales = {
        name: role.silent
        for name, role in trained.items()
        if role.kind == "norm" and role.silent is not None and layers[name] in new
    }
    if not scales:
        return {}
    stored, roles = ModelDirectory(model_dir).tensors(), roles_of_parameters(model)
    inputs = {
        (layers[name], role.block): full_shape(parameter)[-1]
        for name, parameter in model.named_parameters()
        if (role := roles.get(name)) is not None and (role.kind, role.side) == ("matrix", "output")
    }
    return {
        name: math.sqrt(inputs[layers[name], trained[name].block])
        for name, silent in scales.items()
        if (stored[name] == silent).all()
    }


def parameter_groups(model: PreTrainedModel, train: Train, multiples: Mapping[str, float]) -> list[dict[str, Any]]:
    """Groups the trained parameters for AdamW by weight decay and learning rate.

    Args:
        model: the model, after ``freeze_others``.
        train: the settings.
        multiples: of the learning rate, by parameter name.
    """
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # The dimension alone does not identify biases: gpt_oss stacks those of its experts in a matrix.
        is_bias = name.endswith("bias")
        decay = 0.0 if is_bias or len(full_shape(parameter)) < 2 else train.weight_decay
        groups[decay, multiples.get(name, 1.0)].append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, LR_MULTIPLE: multiple}
        for (decay, multiple), parameters in groups.items()
    ]


def make_adamw(groups: list[dict[str, Any]], train: Train) -> torch.optim.AdamW:
    """Returns torch's fused AdamW, on CPUs and GPUs alike."""
    betas = (train.beta1, train.beta2)
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=betas, eps=train.epsilon, fused=True)

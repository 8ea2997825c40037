"""AdamW over the trained parameters, with parameter groups for weight decay and learning rates.

Norms and biases are not decayed. A role may have its own learning rate, given as a multiple of the schedule's:
after function-preserving surgery, the zero-initialized outputs (``o``, ``down``) are the only tensors that change in
the first step. The scales of output norms that silence a new layer have their own rate by default; see
``silent_scales``.
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
from pipeline.files import read_json
from pipeline.models.reading import EXPANSION_FILE, ModelDirectory
from pipeline.training.freeze import full_shape, layer_of_parameter, new_layer_indices, roles_of_parameters

LR_MULTIPLE = "learning_rate_multiple"  # key of a parameter group; the loop multiplies the schedule's rate by it


def silent_scales(model: PreTrainedModel, model_dir: Path) -> dict[str, float]:
    """Returns the norm scales that silence a block of a new layer, with their multiples of the learning rate.

    Where a norm follows the projection of a block (Gemma 2 and 3, OLMo 2), a method that keeps the logits silences that
    norm's scale. In the first step only the scale has a gradient, and AdamW moves it, and so the block's normalized
    output, by the learning rate. A zeroed projection ``[out, n]`` moves each output by the learning rate times a sum
    over n inputs, which is of the size of sqrt(n). With sqrt(n) times the learning rate, the scale moves the output as
    fast. Once it is no longer silent, as in the next training stage, it learns like all other parameters.

    Args:
        model: the model, after ``freeze_others``.
        model_dir: the directory that it was loaded from.
    """
    expansion = model_dir / EXPANSION_FILE
    new = new_layer_indices(read_json(expansion)) if expansion.is_file() else set()
    if not new:
        return {}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers, roles = layer_of_parameter(model), roles_of_parameters(model)
    stored = ModelDirectory(model_dir).tensors()
    inputs = {
        (layers[name], role.block): full_shape(parameter)[-1]
        for name, parameter in model.named_parameters()
        if (role := roles.get(name)) is not None and (role.kind, role.side) == ("matrix", "output")
    }
    return {
        name: math.sqrt(inputs[layers[name], role.block])
        for name, role in roles.items()
        if name in trained and role.kind == "norm" and role.silent is not None and layers[name] in new
        if (stored[name] == role.silent).all()
    }


def parameter_groups(
    section: str, model: PreTrainedModel, train: Train, silent: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Groups the trained parameters for AdamW by weight decay and learning rate.

    Args:
        section: the section of the settings, for messages.
        model: the model.
        train: the settings.
        silent: the multiples of ``silent_scales``, for roles that ``role_learning_rates`` does not name.

    Raises:
        UserError: ``role_learning_rates`` names a role that no trained parameter has.
    """
    multiples = learning_rate_multiples(model, train, silent)
    _check_roles(section, model, train)
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


def learning_rate_multiples(model: PreTrainedModel, train: Train, silent: Mapping[str, float]) -> dict[str, float]:
    """Returns the multiples of the learning rate of trained parameters that have one, by name."""
    by_role = train.role_learning_rates
    roles = roles_of_parameters(model) if by_role else {}
    named = {name: by_role[role.name] for name, role in roles.items() if role.name in by_role}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: multiple for name, multiple in ({**silent, **named}).items() if name in trained}


def _check_roles(section: str, model: PreTrainedModel, train: Train) -> None:
    if not train.role_learning_rates:
        return
    roles = roles_of_parameters(model)
    trained = {roles[name].name for name, p in model.named_parameters() if p.requires_grad and name in roles}
    unused = set(train.role_learning_rates) - trained
    if unused:
        known = sorted({role.name for role in roles.values()})
        raise UserError(
            setting=f"{section}.role_learning_rates",
            value=", ".join(sorted(unused)),
            rule=f"no trained parameter has this role; the model's roles are {', '.join(known)}",
            remedy="Name the role of a trained parameter, or remove the setting.",
        )


def make_adamw(groups: list[dict[str, Any]], train: Train) -> torch.optim.AdamW:
    """Returns torch's fused AdamW, on CPUs and GPUs alike."""
    betas = (train.beta1, train.beta2)
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=betas, eps=train.epsilon, fused=True)

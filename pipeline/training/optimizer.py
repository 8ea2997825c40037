"""AdamW over the trained parameters, with parameter groups for weight decay and learning rates.

Norms and biases are not decayed. A role may have its own learning rate, given as a multiple of the schedule's:
after function-preserving surgery, the zero-initialized outputs (``o``, ``down``) are the only tensors that change in
the first step.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.config import Train
from pipeline.errors import UserError
from pipeline.training.freeze import full_shape, roles_of_parameters

LR_MULTIPLE = "learning_rate_multiple"  # key of a parameter group; the loop multiplies the schedule's rate by it


def parameter_groups(section: str, model: PreTrainedModel, train: Train) -> list[dict[str, Any]]:
    """Groups the trained parameters for AdamW by weight decay and learning rate.

    Raises:
        UserError: ``role_learning_rates`` names a role that no trained parameter has.
    """
    multiples = train.role_learning_rates
    role_of = roles_of_parameters(model) if multiples else {}
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = defaultdict(list)
    unused = set(multiples)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        role = role_of[name].name if name in role_of else None
        unused.discard(role or "")
        # The dimension alone does not identify biases: gpt_oss stacks those of its experts in a matrix.
        is_bias = name.endswith("bias")
        decay = 0.0 if is_bias or len(full_shape(parameter)) < 2 else train.weight_decay
        groups[decay, multiples.get(role or "", 1.0)].append(parameter)
    if unused:
        known = sorted({role.name for role in role_of.values()})
        raise UserError(
            setting=f"{section}.role_learning_rates",
            value=", ".join(sorted(unused)),
            rule=f"no trained parameter has this role; the model's roles are {', '.join(known)}",
            remedy="Name the role of a trained parameter, or remove the setting.",
        )
    return [
        {"params": parameters, "weight_decay": decay, LR_MULTIPLE: multiple}
        for (decay, multiple), parameters in groups.items()
    ]


def make_adamw(groups: list[dict[str, Any]], train: Train) -> torch.optim.AdamW:
    """Returns torch's fused AdamW, on CPUs and GPUs alike."""
    betas = (train.beta1, train.beta2)
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=betas, eps=train.epsilon, fused=True)

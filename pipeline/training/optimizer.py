"""AdamW over the trained parameters: who decays, and who learns faster.

Norms and biases do not decay. Outputs that surgery set to zero (``o``, ``down``) are the only tensors that move in the
first step, so a role may have a learning rate of its own, as a multiple of the schedule's.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.config import Train
from pipeline.errors import UserError
from pipeline.training.freeze import full_shape, roles_of_parameters

MULTIPLE = "learning_rate_multiple"  # of a parameter group; the loop multiplies the schedule's rate by it


def parameter_groups(section: str, model: PreTrainedModel, train: Train) -> list[dict[str, Any]]:
    """Trained parameters for AdamW, by weight decay and learning rate.

    Raises:
        UserError: a learning rate is set for a role that nothing trained has.
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
        is_bias = name.endswith("bias")  # gpt_oss's experts have theirs in one matrix
        decay = 0.0 if is_bias or len(full_shape(parameter)) < 2 else train.weight_decay
        groups[decay, multiples.get(role or "", 1.0)].append(parameter)
    if unused:
        raise _no_such_role(section, sorted(unused), sorted({role.name for role in role_of.values()}))
    return [
        {"params": parameters, "weight_decay": decay, MULTIPLE: multiple}
        for (decay, multiple), parameters in groups.items()
    ]


def _no_such_role(section: str, unused: list[str], known: list[str]) -> UserError:
    return UserError(
        setting=f"{section}.role_learning_rates",
        value=", ".join(unused),
        rule=f"nothing that trains has this role; the model's roles are {', '.join(known)}",
        remedy="Name one that trains, or leave the setting empty.",
    )


def make_adamw(groups: list[dict[str, Any]], train: Train) -> torch.optim.AdamW:
    """torch's fused AdamW: one kernel a step, on CPU and GPU alike."""
    betas = (train.beta1, train.beta2)
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=betas, eps=train.epsilon, fused=True)

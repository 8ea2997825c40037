"""Estimates the share of a GPU's peak that training reaches (model FLOPs utilization, MFU), from its settings.

    MFU = c · m · F / (F + R)

F are the operations that training requires and R those of the layers' forward passes that activation checkpointing
repeats, both per token (``pipeline.models.flops``). The other factors lie between what was calculated and what others
have published for dense models in bfloat16 on H100. They are not measurements of this program:

    c    0.50 with compiled layers, 0.45 without, 0.42 at ZeRO 3, which also gathers parameters
    m    0.85 where attention uses a mask over all pairs of tokens
"""

from __future__ import annotations

from pipeline.estimates.memory import Setup
from pipeline.estimates.sizes import Trained

COMPILED, UNCOMPILED, ZERO_3, MASKED = 0.50, 0.45, 0.42, 0.85


def utilization_of(trained: Trained, setup: Setup) -> float:
    """Estimates the MFU of training on GPUs by the formula of this module."""
    train, shape = setup.train, trained.shape
    share = ZERO_3 if setup.zero["stage"] == 3 else COMPILED if train.compiles("cuda") else UNCOMPILED
    if train.attention in ("sdpa", "eager"):
        share *= MASKED
    if not train.activation_checkpointing:
        return share
    required = trained.flops(train.sequence_length).of_tokens(1, 1)
    attention = 4 * train.sequence_length * shape.heads * shape.head_size
    repeated = sum(2 * layer.matrix_entries() + attention for layer in shape.layers[trained.lowest :])
    return share * required / (required + repeated)

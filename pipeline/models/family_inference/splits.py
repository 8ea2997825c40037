"""Which rows of a fused projection are queries, keys and values, or gate and up, by the outputs that they change.

The output of attention at the first position depends on its value alone, because there is only one key. A change of the
fused projection's output at that position therefore shows what a row is: a value changes the output there, a key only
later outputs, and a query none. In an MLP, the layer's output is linear in the up projection, and not in the gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from pipeline.models.family_inference.decoder import LayerCall, Step

LINEAR = 1e-3  # relative to the effect of a change, the second difference of a linear function in float32
MOST_ROWS = 4096  # of a projection that is examined row by row


@dataclass(frozen=True)
class Division:
    """How the rows of a tensor are divided.

    Attributes:
        groups: the number of times that the sequence of parts repeats.
        parts: role and number of rows of every part of one group.
    """

    groups: int
    parts: tuple[tuple[str, int], ...]


def split_attention(step: Step, attention: Step) -> Division | None:
    """Finds queries, keys and values in a fused projection.

    Args:
        step: the call of the projection.
        attention: the call of the module around it.

    Returns:
        The division; None if the rows are not divided into these three.
    """
    if step.output is None or step.output.dim() != 3 or step.output.shape[-1] > MOST_ROWS:
        return None
    before = attention.repeat()
    if before is None or before.dim() != 3:
        return None
    labels = []
    for row in range(step.output.shape[-1]):
        changed = _with_changed_row(step, attention, row)
        if changed is None:
            return None
        moved = (changed != before).flatten(2).any(dim=2).any(dim=0)
        labels.append("v" if moved[0] else "k" if moved.any() else "q")
    return _division(labels, ("q", "k", "v"))


@torch.no_grad()
def _with_changed_row(step: Step, attention: Step, row: int) -> Tensor | None:
    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, 0, row] += 1.0
        return output

    handle = step.module.register_forward_hook(hook)
    try:
        return attention.repeat()
    finally:
        handle.remove()


def split_mlp(call: LayerCall, weight: Tensor, rows: int) -> Division | None:
    """Finds gate and up in a fused projection or in the stacked projections of experts.

    Args:
        call: of the layer.
        weight: the parameter.
        rows: its dimension whose entries are the outputs.
    """
    count = weight.shape[rows]
    if count > MOST_ROWS:
        return None
    generator = torch.Generator().manual_seed(0)
    step = 0.05 * torch.randn(weight.select(rows, 0).shape, generator=generator)
    labels = [_label(call, weight.select(rows, row), step) for row in range(count)]
    if None in labels:
        return None
    return _division([str(label) for label in labels], ("gate", "up"))


@torch.no_grad()
def _label(call: LayerCall, row: Tensor, step: Tensor) -> str | None:
    stored, base = row.clone(), call.output().double()
    row.copy_(stored + step)
    above = call.output().double()
    row.copy_(stored - step)
    below = call.output().double()
    row.copy_(stored)
    effect = (above - below).abs().max()
    if effect == 0:
        return None
    return "up" if (above + below - 2 * base).abs().max() < LINEAR * effect else "gate"


def _division(labels: Sequence[str], roles: tuple[str, ...]) -> Division | None:
    """Returns the division if it is a sequence of contiguous parts, each role once, that repeats."""
    runs = [(label, len(list(group))) for label, group in groupby(labels)]
    parts = tuple(runs[: len(roles)])
    groups, rest = divmod(len(runs), len(roles))
    if rest or sorted(role for role, _ in parts) != sorted(roles) or tuple(runs) != parts * groups:
        return None
    return Division(groups, parts)

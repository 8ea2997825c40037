"""Held-out loss during a training stage, as curves that plots and tables share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pipeline.report.runs import RunArtifacts, labels
from pipeline.training.block_losses import BlockLosses


@dataclass(frozen=True)
class Curve:
    """One run's held-out losses in one training stage.

    Attributes:
        label: the run's name in plots and tables.
        points: as in training.json, sorted by fraction of the steps.
    """

    run: str
    method: str
    label: str
    points: list[dict[str, Any]]

    @property
    def first(self) -> dict[str, Any]:
        """The first measurement: the model before training, if ``evaluate_at`` contains 0."""
        return self.points[0]

    @property
    def last(self) -> dict[str, Any]:
        """The last measurement."""
        return self.points[-1]

    @property
    def change(self) -> LossChange | None:
        """The last loss minus the first; None if its standard error is not known."""
        before, after = block_losses(self.first), block_losses(self.last)
        if before is None or after is None:
            return None
        stderr = after.change_stderr(before)
        return None if stderr is None else LossChange(after.mean - before.mean, stderr, len(after.losses))


@dataclass(frozen=True)
class LossChange:
    """The difference of two losses of one run with its standard error over pairs of the same ``blocks``."""

    value: float
    stderr: float
    blocks: int


def curves(runs: Sequence[RunArtifacts], stage: str) -> list[Curve]:
    """Returns the curve of every run that has at least two measurements in the stage."""
    names = labels(runs)
    found = []
    for run in runs:
        points = sorted((run.training(stage) or {"held_out": []})["held_out"], key=lambda point: point["fraction"])
        if len(points) > 1:
            found.append(Curve(run.name, run.method, names[run.name], points))
    return found


def base_loss(runs: Sequence[RunArtifacts]) -> float | None:
    """Returns the base model's loss on the same blocks, or None if no run shows it.

    The base itself is not measured. Its loss is the first one of a run whose expanded model was verified to compute the
    same logits as the base.
    """
    for run in runs:
        points = (run.training("pretrain") or {"held_out": []})["held_out"]
        if run.keeps_logits() and points and points[0]["fraction"] == 0:
            return float(points[0]["loss"])
    return None


def block_losses(point: Mapping[str, Any]) -> BlockLosses | None:
    """Returns the loss of a measurement by block; None for a training by an earlier version, which recorded none."""
    return BlockLosses(**point["blocks"]["loss"]) if "blocks" in point else None


def common_budget(found: Sequence[Curve], axis: str) -> float:
    """Returns the largest value of ``axis`` (tokens, flops or seconds) that every curve reaches."""
    return min(curve.last[axis] for curve in found)


def loss_at(curve: Curve, axis: str, budget: float) -> float:
    """Returns the held-out loss at ``budget`` of ``axis``, interpolated linearly between the neighboring measurements.

    Raises:
        ValueError: the curve does not reach the budget.
    """
    for before, after in pairwise(curve.points):
        if before[axis] <= budget <= after[axis]:
            # Two measurements at the same budget (no tokens between them) would otherwise divide by zero.
            share = (budget - before[axis]) / ((after[axis] - before[axis]) or 1)
            return float(before["loss"] + share * (after["loss"] - before["loss"]))
    raise ValueError(f"{curve.label} has no measurements around {budget} {axis}")

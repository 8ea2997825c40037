"""Held-out loss during a training stage, as curves that plots and tables share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pipeline.config.data import PURPOSE_OF
from pipeline.report.runs import RunArtifacts, labels
from pipeline.training.block_losses import BlockLosses


@dataclass(frozen=True)
class Curve:
    """One run's held-out losses in one training stage.

    Attributes:
        label: the run's name in plots and tables.
        points: as in training.json, sorted by fraction of the steps. All losses are those of the weights themselves.
        averages: a point with the loss of the averages of the weights, if ``ema_decay`` makes them the stage's result.
    """

    run: str
    method: str
    label: str
    points: list[dict[str, Any]]
    averages: dict[str, Any] | None = None

    @property
    def first(self) -> dict[str, Any]:
        """The first measurement: the model before training, if ``evaluate_at`` contains 0."""
        return self.points[0]

    @property
    def last(self) -> dict[str, Any]:
        """The last measurement."""
        return self.points[-1]

    @property
    def result(self) -> dict[str, Any]:
        """The point with the loss of the model that the stage exports."""
        return self.averages or self.last

    @property
    def change(self) -> LossChange | None:
        """The last loss of the weights minus the first; None if its standard error is not known."""
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
        training = run.training(stage) or {"held_out": []}
        points = sorted(training["held_out"], key=lambda point: point["fraction"])
        if len(points) > 1:
            found.append(Curve(run.name, run.method, names[run.name], points, averages(training)))
    return found


@dataclass(frozen=True)
class SameBlocks:
    """Curves whose losses were measured on the same held-out blocks, and can be compared.

    Attributes:
        base: the base model's loss on these blocks, or None if no run shows it.
        data: the settings that distinguish the blocks from those of the report's other curves; empty if there are none.
    """

    curves: list[Curve]
    base: float | None
    data: str

    @property
    def title(self) -> str:
        """The runs, and what distinguishes their blocks."""
        names = ", ".join(curve.label for curve in self.curves)
        return f"{names} ({self.data})" if self.data else names


def comparable_curves(runs: Sequence[RunArtifacts], stage: str) -> list[SameBlocks]:
    """Returns the curves of a stage, grouped by the held-out blocks on which their losses were measured."""
    by_run = {curve.run: curve for curve in curves(runs, stage)}
    groups: dict[tuple[str | None, int | None], list[RunArtifacts]] = {}
    for run in runs:
        groups.setdefault(_blocks_of(run, stage), []).append(run)
    measured = [members for members in groups.values() if any(run.name in by_run for run in members)]
    settings = [_block_settings(members[0], stage) for members in measured]
    names = dict.fromkeys(name for each in settings for name in each)
    differing = [name for name in names if any(each.get(name) != settings[0].get(name) for each in settings)]
    found = []
    for members, values in zip(measured, settings, strict=True):
        # Lists of sources are too long for a title. They are among the settings at the end of the report.
        shown = [f"{name}={values[name]}" for name in differing if isinstance(values.get(name), (str, int, float))]
        several = [by_run[run.name] for run in members if run.name in by_run]
        found.append(SameBlocks(several, base_loss(members) if stage == "pretrain" else None, ", ".join(shown)))
    return found


def _blocks_of(run: RunArtifacts, stage: str) -> tuple[str | None, int | None]:
    """Identifies the blocks on which a run's held-out losses are measured: their data, and how many are taken."""
    data = run.manifest(_data_role(stage)) or {}
    return data.get("key"), _block_settings(run, stage).get("held_out_blocks")


def _data_role(stage: str) -> str:
    return f"tokenize/{PURPOSE_OF[stage]}"


def _block_settings(run: RunArtifacts, stage: str) -> dict[str, Any]:
    data, training = (run.manifest(role) or {"settings": {}} for role in (_data_role(stage), stage))
    return {**data["settings"], "held_out_blocks": training["settings"].get("held_out_blocks")}


def averages(training: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns a point with the held-out loss of the averages of the weights; None if there are none, or no loss."""
    loss = training.get("ema", {}).get("held_out_loss")
    if loss is None:
        return None
    return {"fraction": 1.0, **{name: training[name] for name in ("tokens", "flops", "seconds")}, "loss": loss}


def base_loss(runs: Sequence[RunArtifacts]) -> float | None:
    """Returns the base model's loss on the same blocks, or None if no run shows it.

    The base itself is not measured. Its loss is the first one of a run whose expanded model was verified to compute the
    same logits as the base.
    """
    for run in runs:
        points = (run.training("pretrain") or {"held_out": []})["held_out"]
        if run.keeps_logits() and points and points[0]["step"] == 0:
            return float(points[0]["loss"])
    return None


def block_losses(point: Mapping[str, Any]) -> BlockLosses | None:
    """Returns the loss of a measurement by block; None for a run by an earlier version, which recorded none."""
    return BlockLosses(**point["blocks"]["loss"]) if "blocks" in point else None


def common_budget(found: Sequence[Curve], axis: str) -> float:
    """Returns the largest value of ``axis`` (tokens, flops or seconds) that every curve reaches."""
    return min(curve.last[axis] for curve in found)


def loss_at(curve: Curve, axis: str, budget: float) -> float:
    """Returns the held-out loss at ``budget`` of ``axis``, interpolated linearly between the neighboring measurements.

    At the end it is that of the stage's result, and before that of the weights, whose averages are not measured then.

    Raises:
        ValueError: the curve does not reach the budget.
    """
    if budget == curve.last[axis] and curve.last["fraction"] == curve.result["fraction"]:
        return float(curve.result["loss"])
    for before, after in pairwise(curve.points):
        if before[axis] <= budget <= after[axis]:
            # Two measurements at the same budget (no tokens between them) would otherwise divide by zero.
            share = (budget - before[axis]) / ((after[axis] - before[axis]) or 1)
            return float(before["loss"] + share * (after["loss"] - before["loss"]))
    raise ValueError(f"{curve.label} has no measurements around {budget} {axis}")

"""Held-out loss on the way through a training stage, as lines that plots and tables share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pipeline.report.runs import ROLES, RunArtifacts, labels, roles


@dataclass(frozen=True)
class Curve:
    """One run's held-out losses in one stage; ``points`` as in training.json, by fraction of the steps."""

    run: str
    method: str
    label: str
    points: list[dict[str, Any]]

    @property
    def first(self) -> dict[str, Any]:
        """Where training started: the expanded model, if ``evaluate_at`` has 0."""
        return self.points[0]

    @property
    def last(self) -> dict[str, Any]:
        """The last point measured."""
        return self.points[-1]


def curves(runs: Sequence[RunArtifacts], stage: str) -> list[Curve]:
    """The curve of every run that has one with at least two points."""
    names = labels(runs)
    found = []
    for run in runs:
        points = sorted((run.training(stage) or {"held_out": []})["held_out"], key=lambda point: point["fraction"])
        if len(points) > 1:
            found.append(Curve(run.name, run.method, names[run.name], points))
    return found


def base_loss(runs: Sequence[RunArtifacts]) -> float | None:
    """The untouched base's loss on the same blocks, or None where no run shows it.

    It is where training starts from in a run whose expanded model was checked to compute what the base does.
    """
    for run in runs:
        points = (run.training("pretrain") or {"held_out": []})["held_out"]
        if run.keeps_logits() and points and points[0]["fraction"] == 0:
            return float(points[0]["loss"])
    return None


def perplexity(point: dict[str, Any]) -> float:
    """exp of the mean loss a token, in the model's own tokens; capped where a float would overflow."""
    return math.exp(min(point["loss"], 700.0))


def common_budget(found: Sequence[Curve], axis: str) -> float:
    """The most of ``axis`` (tokens, flops or seconds) that every curve reaches."""
    return min(curve.last[axis] for curve in found)


def loss_at(curve: Curve, axis: str, budget: float) -> float:
    """The held-out loss after ``budget`` of ``axis``, linear between the points around it."""
    points = curve.points
    for before, after in pairwise(points):
        if before[axis] <= budget <= after[axis]:
            share = (budget - before[axis]) / ((after[axis] - before[axis]) or 1)
            return float(before["loss"] + share * (after["loss"] - before["loss"]))
    raise ValueError(f"{curve.label} has no point around {budget} {axis}")


# --------------------------------------------------------------------------------------------------
# Seconds by stage, as the artifacts' manifests recorded them when they were built.

STAGES = tuple(dict.fromkeys(role.partition("/")[0] for role in ROLES))


def seconds_by_stage(run: RunArtifacts) -> dict[str, float]:
    """Stage -> seconds; a stage of several artifacts (tokenize, evaluate) is their sum. Absent stages are left out."""
    seconds: dict[str, float] = {}
    for role in roles([run]):
        manifest = run.manifest(role)
        if manifest is not None:
            stage = role.partition("/")[0]
            seconds[stage] = seconds.get(stage, 0.0) + manifest["seconds"]
    return seconds


def is_shared(runs: Sequence[RunArtifacts], stage: str) -> bool:
    """Whether all runs use the very same artifacts of that stage, so that its time was spent once."""
    keys = [
        [
            manifest["key"]
            for role in roles(runs)
            if role.partition("/")[0] == stage and (manifest := run.manifest(role))
        ]
        for run in runs
    ]
    return len(runs) > 1 and all(of_run == keys[0] for of_run in keys)

"""Tasks for running a single stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.artifacts.task import StageTask, TrackingTarget
from pipeline.config import Launch, Section, Tracking


def make_task(
    name: str, settings: Section, out: Path, parents: Mapping[str, Path] | None = None, seed: int = 0
) -> StageTask:
    """Returns a task of the given stage that writes to ``out``, which is created."""
    out.mkdir(parents=True, exist_ok=True)
    tracking = Tracking(wandb="disabled", project="tests", entity=None)
    target = TrackingTarget(tracking, group="test", job_type=name, run_id="test", wandb_dir=out)
    launch = Launch.model_construct(device="cpu", processes=1, threads=1)
    return StageTask(name, settings, parents or {}, out, seed, launch, target)

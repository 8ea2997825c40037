"""Tasks for running a single stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.artifacts.task import StageTask, TrackingTarget
from pipeline.config import Launch, Section
from tests.plain_settings import NO_TRACKING


def make_task(
    name: str, settings: Section, out: Path, parents: Mapping[str, Path] | None = None, seed: int = 0
) -> StageTask:
    """Returns a task of the given stage that writes to ``out``, which is created."""
    out.mkdir(parents=True, exist_ok=True)
    tracking = NO_TRACKING
    target = TrackingTarget(tracking, group="test", job_type=name, run_id="test", directory=out)
    launch = Launch.model_construct(device="cpu", processes=1, threads=1)
    return StageTask(name, settings, parents or {}, out, seed, launch, target)

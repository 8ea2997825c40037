"""Settings as a run composes them from conf/, and tasks of single stages outside of any run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.__main__ import compose_jobs
from pipeline.config import AnyExpand, Launch, Settings, Train
from pipeline.stage import StageTask, TrackingTarget


def quickstart(*overrides: str) -> Settings:
    """The quickstart's settings with some values changed, untracked."""
    (job,) = compose_jobs(["experiment=quickstart", "tracking=disabled", *overrides], multirun=False, config_dir=None)
    return job.settings


def expand_settings(method: str, **changes: Any) -> AnyExpand:
    """A method's settings with some values changed."""
    return quickstart(f"expand={method}", *_overrides("expand", changes)).expand


def pretrain_settings(**changes: Any) -> Train:
    """Pre-training's settings with some values changed; ``__`` stands for a dot."""
    return quickstart(*_overrides("pretrain", changes)).pretrain


def _overrides(group: str, changes: dict[str, Any]) -> list[str]:
    return [f"{group}.{name.replace('__', '.')}={json.dumps(value)}" for name, value in changes.items()]


def one_process(device: str) -> Launch:
    """How a contender is started."""
    return quickstart(f"launch.device={device}", "launch.processes=1").launch


def stage_task(name: str, settings: Any, parents: dict[str, Path], out: Path, seed: int = 0) -> StageTask:
    """A task on this machine as it is."""
    run = quickstart()
    return StageTask(
        name=name,
        settings=settings,
        parents=parents,
        out=out,
        seed=seed,
        launch=run.launch,
        tracking=TrackingTarget(run.tracking, "benchmark", name, "benchmark", out / "wandb"),
    )


def training_task(settings: Train, parents: dict[str, Path], out: Path, device: str) -> StageTask:
    """The pretrain stage in one process, as the other contender has."""
    task = stage_task("pretrain", settings, parents, out)
    return replace(task, launch=one_process(device))


def expand_task(settings: AnyExpand, base: Path, out: Path, seed: int = 0) -> StageTask:
    """The expand stage from directory to directory."""
    return stage_task("expand", settings, {"load": base}, out, seed)


def load_smollm2(directory: Path) -> Path:
    """The real small model as the load stage writes it, unless it is there."""
    from pipeline.stages import load

    if not (directory / "config.json").is_file():
        directory.mkdir(parents=True, exist_ok=True)
        load.run(stage_task("load", quickstart().model, {}, directory))
    return directory

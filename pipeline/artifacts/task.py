"""What a stage is handed, and what it gives back. Every file in ``stages/`` has one ``run(task)``.

A stage reads its parents' directories, writes into ``task.out`` and returns its metrics; the caller
(``run.py``) owns keys, manifests, locks and the commit. ``task.out`` may hold what an earlier, killed
attempt at the same key left there: use it or overwrite it, but never trust a half-written file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import STAGE_SETTINGS, Launch, Section, Tracking

Metrics = dict[str, Any]  # JSON values; they end in manifest.json under "metrics"


@dataclass(frozen=True)
class TrackingTarget:
    """Where a stage's numbers go: plain data, so that it can be handed to a worker as JSON."""

    settings: Tracking
    group: str  # the pipeline run, e.g. "quickstart"
    job_type: str  # the stage, e.g. "pretrain" or "evaluate/sft"
    run_id: str  # stable over restarts of the same artifact
    wandb_dir: Path  # W&B's own files


@dataclass(frozen=True)
class StageTask:
    """One node of the graph, ready to be run."""

    name: str  # "load", "tokenize/corpus", "evaluate/pretrain", ...
    settings: Section  # the stage's own settings, all it may depend on
    parents: Mapping[str, Path]  # role -> finished artifact directory
    out: Path  # the partial directory to fill
    seed: int  # 0 where the stage draws nothing
    launch: Launch  # how to start workers; never changes numbers
    tracking: TrackingTarget


StageFunction = Callable[[StageTask], Metrics]


def task_to_json(task: StageTask) -> dict[str, Any]:
    """The task as plain JSON values, for a process of its own."""
    return {
        "name": task.name,
        "settings": task.settings.model_dump(mode="json"),
        "parents": {role: str(path) for role, path in task.parents.items()},
        "out": str(task.out),
        "seed": task.seed,
        "launch": task.launch.model_dump(mode="json"),
        "tracking": {
            "settings": task.tracking.settings.model_dump(mode="json"),
            "group": task.tracking.group,
            "job_type": task.tracking.job_type,
            "run_id": task.tracking.run_id,
            "wandb_dir": str(task.tracking.wandb_dir),
        },
    }


def task_from_json(value: Mapping[str, Any]) -> StageTask:
    """The inverse of ``task_to_json``; settings are validated again."""
    tracking = value["tracking"]
    return StageTask(
        name=value["name"],
        settings=STAGE_SETTINGS[value["name"].partition("/")[0]].validate_json(json.dumps(value["settings"])),
        parents={role: Path(path) for role, path in value["parents"].items()},
        out=Path(value["out"]),
        seed=value["seed"],
        launch=Launch.model_validate_json(json.dumps(value["launch"])),
        tracking=TrackingTarget(
            settings=Tracking.model_validate_json(json.dumps(tracking["settings"])),
            group=tracking["group"],
            job_type=tracking["job_type"],
            run_id=tracking["run_id"],
            wandb_dir=Path(tracking["wandb_dir"]),
        ),
    )

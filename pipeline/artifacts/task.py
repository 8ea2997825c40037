"""The task that the driver passes to a stage, and its JSON format.

Every module in ``stages/`` has one function ``run(task)``. It reads the directories of its parents, writes into
``task.out`` and returns its metrics. The driver (``driver/run.py``) is responsible for keys, manifests, locks and the
commit. ``task.out`` may contain files of an earlier attempt with the same key that was killed: a stage may use or
overwrite them, but must not rely on a file being complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import STAGE_SETTINGS, Launch, Section, Tracking

SAME_LOGITS = "same_logits"  # role of the scores of a model that has the same logits; see ``stages/evaluate.py``
ANSWERS, ANSWERS_FOLDER = "evaluate/answers", "answers"  # a node of evaluate, and where it writes a file per model
Metrics = dict[str, Any]  # JSON values, recorded in manifest.json under "metrics"


@dataclass(frozen=True)
class TrackingTarget:
    """Where a stage's metrics are logged. Contains plain values only, so that a worker can receive it as JSON."""

    settings: Tracking
    group: str  # the pipeline run, for example "quickstart"
    job_type: str  # the stage, for example "pretrain" or "evaluate/sft"
    run_id: str  # the same for all attempts at one artifact
    directory: Path  # of the run, for the files of the tracker


@dataclass(frozen=True)
class StageTask:
    """One node of the graph, ready to run."""

    name: str  # "load", "tokenize/corpus", "evaluate/pretrain", ...
    settings: Section  # the stage's own settings; its output may depend on no others
    parents: Mapping[str, Path]  # directories of the parent artifacts, by role
    out: Path  # the partial directory to write to
    seed: int  # 0 if the stage draws no random numbers
    launch: Launch  # how to start workers; never affects the output
    tracking: TrackingTarget


def task_to_json(task: StageTask) -> dict[str, Any]:
    """Returns the task as JSON values, for another process."""
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
            "directory": str(task.tracking.directory),
        },
    }


def task_from_json(value: Mapping[str, Any]) -> StageTask:
    """Inverse of ``task_to_json``. Validates the settings again."""
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
            directory=Path(tracking["directory"]),
        ),
    )

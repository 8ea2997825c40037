"""evaluate: scores one model with lm-eval; every target of a table in the same way."""

from __future__ import annotations

import shutil

from pipeline.artifacts.task import Metrics, StageTask
from pipeline.config import Evaluate, EvaluateSnapshot
from pipeline.evaluation.harness import Target, score
from pipeline.files import write_json
from pipeline.launch.machine import detect_machine, place
from pipeline.training.snapshots import materialize_snapshot

EVALUATION_FILE = "evaluation.json"


def run(task: StageTask) -> Metrics:
    """Writes ``tasks/<task>.json``, one a task, and ``evaluation.json``; goes on where a killed attempt stood.

    Raises:
        UserError: a task's data cannot be had, or a chat format is asked for that the model has not.
    """
    settings = task.settings
    assert isinstance(settings, Evaluate)
    model = task.parents["model"]
    if isinstance(settings, EvaluateSnapshot):
        model = task.out / "model"  # the full model exists only while it is evaluated
        materialize_snapshot(task.parents["model"], settings.fraction, model)
    placement = place(task.launch.model_copy(update={"processes": 1}), detect_machine())
    target = Target(task.name, model, task.parents["corpus"], task.out, placement)
    evaluation = score(target, settings)
    if model != task.parents["model"]:
        shutil.rmtree(model)
    write_json(task.out / EVALUATION_FILE, evaluation)
    columns = ["task", "metric", "value", "stderr", "n"]
    return {
        "scores": {f"{row['task']}/{row['metric']}": row["value"] for row in evaluation["rows"]},
        "table": {"columns": columns, "rows": [[row[name] for name in columns] for row in evaluation["rows"]]},
    }

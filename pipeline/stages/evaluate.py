"""The evaluate stage: scores one model with lm-eval. All targets are scored in the same way."""

from __future__ import annotations

import shutil

from pipeline.artifacts.task import Metrics, StageTask
from pipeline.config import Evaluate, EvaluateSnapshot
from pipeline.evaluation.harness import ScoringJob, score
from pipeline.files import write_json
from pipeline.launch.machine import detect_machine, place
from pipeline.training.snapshots import materialize_snapshot

EVALUATION_FILE = "evaluation.json"


def run(task: StageTask) -> Metrics:
    """Writes ``tasks/<task>.json`` for every task, and ``evaluation.json``.

    Tasks that an interrupted attempt completed are not scored again.

    Raises:
        UserError: a task's data cannot be read, or ``prompt_format=chat`` for a model without a chat template.
    """
    settings = task.settings
    assert isinstance(settings, Evaluate)
    model = task.parents["model"]
    if isinstance(settings, EvaluateSnapshot):
        # A snapshot holds only the trained weights. The complete model is removed after it has been scored.
        model = task.out / "model"
        materialize_snapshot(task.parents["model"], settings.fraction, model)
    placement = place(task.launch.model_copy(update={"processes": 1}), detect_machine())
    evaluation = score(ScoringJob(task.name, model, task.parents["corpus"], task.out, placement), settings)
    if model != task.parents["model"]:
        shutil.rmtree(model)
    write_json(task.out / EVALUATION_FILE, evaluation)
    columns = ["task", "metric", "value", "stderr", "n"]
    return {
        "scores": {f"{row['task']}/{row['metric']}": row["value"] for row in evaluation["rows"]},
        "table": {"columns": columns, "rows": [[row[name] for name in columns] for row in evaluation["rows"]]},
    }

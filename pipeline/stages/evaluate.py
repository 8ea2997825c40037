"""The evaluate stage: scores one model with lm-eval. All targets are scored in the same way."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.artifacts.task import ANSWERS_FOLDER, SAME_LOGITS, Metrics, StageTask
from pipeline.config import MODEL_TARGETS, Answers, Evaluate, EvaluateSnapshot
from pipeline.evaluation.job import score_on_all_ranks
from pipeline.files import is_intact, read_json, seal, write_json
from pipeline.launch.machine import detect_machine, place, place_one_process
from pipeline.training.snapshots import materialize_snapshot

EVALUATION_FILE = "evaluation.json"


def run(task: StageTask) -> Metrics:
    """Writes ``tasks/<task>.json`` for every task, and ``evaluation.json``. For ``Answers``, see ``_answer``.

    Tasks that an interrupted attempt completed are not scored again. If the expand stage found the model's logits to be
    exactly the base's, and the base has been scored, nothing is scored at all.

    Raises:
        UserError: a task's data cannot be read, or ``prompt_format=chat`` for a model without a chat template.
        WorkersFailed: one of several processes has failed.
    """
    settings = task.settings
    if isinstance(settings, Answers):
        return _answer(task, settings)
    assert isinstance(settings, Evaluate)
    model = task.parents["model"]
    if SAME_LOGITS in task.parents and _keeps_logits(model):
        return _metrics(_copy_scores(task.parents[SAME_LOGITS], task.out))
    # lm-eval takes seconds to import, which copied scores do not need.
    from pipeline.evaluation.harness import ScoringJob, missing_tasks, read_evaluation, score

    if isinstance(settings, EvaluateSnapshot):
        # A snapshot holds only the trained weights. The complete model is removed after it has been scored.
        model = task.out / "model"
        materialize_snapshot(task.parents["model"], settings.fraction, model)
    placement = place(task.launch, detect_machine())
    job = ScoringJob(task.name, model, task.parents["corpus"], task.out, placement)
    if placement.processes > 1 and missing_tasks(job, settings):
        score_on_all_ranks(replace(task, parents={**task.parents, "model": model}), placement)
    else:
        score(job, settings)
    evaluation = read_evaluation(job, settings)
    if model != task.parents["model"]:
        shutil.rmtree(model)
    write_json(task.out / EVALUATION_FILE, evaluation)
    return _metrics(evaluation)


def _answer(task: StageTask, settings: Answers) -> Metrics:
    """Writes ``answers/<stage>.json`` for every model that an interrupted attempt has not completed.

    An expanded model with exactly the base's logits gives the base's answers, which are not generated again.
    """
    from pipeline.evaluation.answers import answer_questions

    placement = place_one_process(task.launch)
    folder = task.out / ANSWERS_FOLDER
    folder.mkdir(exist_ok=True)
    for stage in MODEL_TARGETS:
        file, record = folder / f"{stage}.json", folder / f".{stage}.sha256"
        if stage not in task.parents or is_intact(record):
            continue
        model = task.parents[stage]
        if stage == "expand" and "load" in task.parents and _keeps_logits(model):
            answers = read_json(folder / "load.json")
        else:
            answers = answer_questions(model, task.parents["conversations"], settings.questions, placement)
        write_json(file, answers)
        seal(record, [file])
    return {"questions": settings.questions}


def _keeps_logits(model: Path) -> bool:
    difference = read_json(model / "manifest.json")["metrics"]["check"]["logit_difference"]
    return difference is not None and float(difference) == 0.0


def _copy_scores(scored: Path, out: Path) -> dict[str, Any]:
    """Copies the evaluation of the model with the same logits, and records which model that is."""
    shutil.copytree(scored / "tasks", out / "tasks", dirs_exist_ok=True)
    target = read_json(scored / "manifest.json")["stage"].partition("/")[2]
    evaluation = {**read_json(scored / EVALUATION_FILE), "scores_of": target}
    write_json(out / EVALUATION_FILE, evaluation)
    return evaluation


def _metrics(evaluation: dict[str, Any]) -> Metrics:
    columns = ["task", "metric", "value", "stderr", "n"]
    return {
        "scores": {f"{row['task']}/{row['metric']}": row["value"] for row in evaluation["rows"]},
        "table": {"columns": columns, "rows": [[row[name] for name in columns] for row in evaluation["rows"]]},
        "read": [f"scores of {evaluation['scores_of']}, which has the same logits"]
        if "scores_of" in evaluation
        else [],
    }

"""``results.json``: every number of a report as one row.

``target`` is the stage whose model was scored: ``load`` (the untouched base), ``expand``, ``pretrain``, ``sft``, or a
point on the way such as ``pretrain@20%``. Three kinds of task: lm-eval's own names; ``held_out_loss`` (the training
loop's, on blocks of the corpus) and ``held_out_instruction_loss`` (on conversations, so not comparable with the
former), each with the tokens, FLOPs and seconds spent until then; and ``cost`` (what the stage itself took).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypedDict

from pipeline.config import MODEL_TARGETS, TRAINING_STAGES, Target
from pipeline.report.curves import perplexity
from pipeline.report.runs import RunArtifacts

RESULTS_FILE = "results.json"
CURVE_TASKS = {"pretrain": "held_out_loss", "sft": "held_out_instruction_loss"}
COST_TASK = "cost"


class Row(TypedDict):
    """One number. ``stderr`` is one standard error over the task's documents, ``n`` their number; null if unknown."""

    run: str
    method: str
    target: str
    task: str
    metric: str
    value: float
    stderr: float | None
    n: int | None


def collect(runs: Iterable[RunArtifacts]) -> list[Row]:
    """All rows of all runs: scores first, then held-out curves, then costs."""
    return [row for run in runs for part in (_scores, _curves, _costs) for row in part(run)]


def _scores(run: RunArtifacts) -> Iterator[Row]:
    for target in run.scored_targets():
        for row in (run.evaluation(target) or {"rows": []})["rows"]:
            yield _row(run, target, row["task"], row["metric"], row["value"], row["stderr"], row["n"])


def _curves(run: RunArtifacts) -> Iterator[Row]:
    for stage in TRAINING_STAGES:
        training = run.training(stage) or {"held_out": []}
        for point in training["held_out"]:
            target = str(Target(stage, point["fraction"]))
            values = {"loss": point["loss"], "perplexity": perplexity(point)}
            values |= {metric: point[metric] for metric in ("tokens", "flops", "seconds")}
            for metric, value in values.items():
                yield _row(run, target, CURVE_TASKS[stage], metric, value)


def _costs(run: RunArtifacts) -> Iterator[Row]:
    for target in MODEL_TARGETS:
        manifest, training = run.manifest(target), run.training(target) if target in TRAINING_STAGES else None
        values: dict[str, Any] = {}
        if manifest is not None:
            values |= {metric: manifest[metric] for metric in ("seconds", "peak_memory_bytes")}
        if training is not None:
            values |= {metric: training[metric] for metric in ("tokens", "flops")}
        for metric, value in values.items():
            if value is not None:
                yield _row(run, target, COST_TASK, metric, value)


def _row(
    run: RunArtifacts, target: str, task: str, metric: str, value: float,
    stderr: float | None = None, n: int | None = None,
) -> Row:  # fmt: skip
    return Row(
        run=run.name, method=run.method, target=target, task=task, metric=metric, value=value, stderr=stderr, n=n
    )

"""``results.json``: every number of a report as one entry.

``target`` is the stage whose model was scored: ``load`` (the base model), ``expand``, ``pretrain``, ``sft``, or a point
during a training stage, such as ``pretrain@20%``. There are three kinds of task. lm-eval's tasks have their own names.
``held_out_loss`` and ``held_out_instruction_loss`` are the training loop's losses on blocks of the corpus and on
conversations, which are not comparable with each other, and come with the tokens, FLOPs and seconds spent until then.
``cost`` is what a stage itself took.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypedDict

from pipeline.config import MODEL_TARGETS, TRAINING_STAGES, Target
from pipeline.report.runs import RunArtifacts
from pipeline.training.block_losses import perplexity

RESULTS_FILE = "results.json"
CURVE_TASKS = {"pretrain": "held_out_loss", "sft": "held_out_instruction_loss"}
COST_TASK = "cost"


class Result(TypedDict):
    """One number. ``stderr`` is one standard error over the task's ``n`` documents; both are null where unknown.

    For held-out losses and their perplexities, n is the number of blocks.
    """

    run: str
    method: str
    target: str
    task: str
    metric: str
    value: float
    stderr: float | None
    n: int | None
    higher_is_better: bool | None  # as the task declares; null if it does not
    scores_of: str | None  # the target that was scored instead, because its logits are the same; null for its own
    backend: str | None  # what computed a score, such as "hf 5.23.0" or "vllm 0.33.0"; null if that was not recorded


def collect_results(runs: Iterable[RunArtifacts]) -> list[Result]:
    """Returns all results of all runs: per run the scores first, then held-out losses, then costs."""
    return [result for run in runs for part in (_scores, _held_out_losses, _costs) for result in part(run)]


def _scores(run: RunArtifacts) -> Iterator[Result]:
    for target in run.scored_targets():
        evaluation = run.evaluation(target) or {"rows": []}
        for row in evaluation["rows"]:
            yield _result(
                run, target, row["task"], row["metric"], row["value"], row["stderr"], row["n"],
                row.get("higher_is_better"),  # which evaluations by earlier versions do not record
                evaluation.get("scores_of"), row.get("backend"),
            )  # fmt: skip


def _held_out_losses(run: RunArtifacts) -> Iterator[Result]:
    for stage in TRAINING_STAGES:
        training = run.training(stage) or {"held_out": []}
        for point in training["held_out"]:
            target = str(Target(stage, point["fraction"]))
            values = {"loss": point["loss"], "perplexity": perplexity(point["loss"])}
            values |= {metric: point[metric] for metric in ("tokens", "flops", "seconds")}
            errors, blocks = _loss_errors(point)
            for metric, value in values.items():
                n = blocks if metric in errors else None
                yield _result(run, target, CURVE_TASKS[stage], metric, value, errors.get(metric), n)


def _loss_errors(point: Mapping[str, Any]) -> tuple[dict[str, float], int]:
    """Returns the standard errors of a held-out loss and its perplexity, if known, and the number of blocks."""
    stderr = point.get("loss_stderr")
    if stderr is None:
        return {}, 0
    return {"loss": stderr, "perplexity": perplexity(point["loss"]) * stderr}, len(point["blocks"]["loss"]["losses"])


def _costs(run: RunArtifacts) -> Iterator[Result]:
    for target in MODEL_TARGETS:
        manifest, training = run.manifest(target), run.training(target) if target in TRAINING_STAGES else None
        values: dict[str, Any] = {}
        if manifest is not None:
            values |= {metric: manifest[metric] for metric in ("seconds", "peak_memory_bytes")}
        if training is not None:
            values |= {metric: training[metric] for metric in ("tokens", "flops")}
        for metric, value in values.items():
            if value is not None:
                yield _result(run, target, COST_TASK, metric, value)


def _result(
    run: RunArtifacts, target: str, task: str, metric: str, value: float,
    stderr: float | None = None, n: int | None = None, higher_is_better: bool | None = None,
    scores_of: str | None = None, backend: str | None = None,
) -> Result:  # fmt: skip
    return Result(
        run=run.name, method=run.method, target=target, task=task, metric=metric, value=value, stderr=stderr, n=n,
        higher_is_better=higher_is_better, scores_of=scores_of, backend=backend,
    )  # fmt: skip

"""The report's tables.

A score is shown with one standard error and a mark that compares it with the base: ▲ better, ▼ worse, ≈ within noise,
= the same value. The score that beats all others of its row beyond noise is bold. Often there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.config import TRAINING_STAGES
from pipeline.report.curves import Curve, common_budget, loss_at
from pipeline.report.differences import Verdict, leader
from pipeline.report.markup import Table, bold, code_span, emphasis, escape
from pipeline.report.metrics import (
    count,
    duration,
    memory,
    number,
    scientific,
    significant,
    target_name,
    with_error,
)
from pipeline.report.results import Result
from pipeline.report.runs import RunArtifacts, labels, roles
from pipeline.report.scores import Scores
from pipeline.training.block_losses import perplexity

STEPS = {  # (before, after) -> column
    ("load", "expand"): "expansion",
    ("expand", "pretrain"): "pre-training",
    ("pretrain", "sft"): "tuning",
    ("load", "pretrain"): "base to pre-trained",
    ("load", "sft"): "base to tuned",
}
MISSING = "–"


# -------------------------------------------------------------------------------------------- scores


def score_table(scores: Scores, run: str) -> Table:
    """Tabulates tasks by targets of one run, snapshots included."""
    targets = scores.all_targets(run)
    rows = []
    for task_metric in scores.task_metrics():
        line = [scores.get(run, target, task_metric) for target in targets]
        bases = [scores.get(run, "load", task_metric)] * len(line)
        rows.append([*_metric_cells(task_metric, line), *_score_cells(scores, line, bases)])
    return Table(["task", "metric", "n", *(target_name(target) for target in targets)], rows, text_columns=2)


def method_table(scores: Scores, runs: Sequence[RunArtifacts], target: str) -> Table:
    """Tabulates tasks by methods for one target, preceded by the base if all runs share it."""
    names = labels(runs)
    with_base = scores.shared_base([run.name for run in runs])
    rows = []
    for task_metric in scores.task_metrics():
        line = [scores.get(run.name, target, task_metric) for run in runs]
        bases = [scores.get(run.name, "load", task_metric) for run in runs]
        if with_base:
            line, bases = [bases[0], *line], [bases[0], *bases]
        rows.append([*_metric_cells(task_metric, line), *_score_cells(scores, line, bases)])
    heads = [*(["base"] if with_base else []), *(escape(names[run.name]) for run in runs)]
    return Table(["task", "metric", "n", *heads], rows, text_columns=2)


def _metric_cells(task_metric: tuple[str, str], line: Sequence[Result | None]) -> list[str]:
    # More than one number of documents means that the models were not all scored on the same ones.
    numbers = {result["n"] for result in line if result is not None and result["n"] is not None}
    return [escape(task_metric[0]), escape(task_metric[1]), " / ".join(f"{n:,}" for n in sorted(numbers)) or MISSING]


def _score_cells(scores: Scores, line: Sequence[Result | None], bases: Sequence[Result | None]) -> list[str]:
    best = scores.best(line)
    return [
        MISSING if result is None else _score_cell(result, scores.mark(base, result), result is best)
        for result, base in zip(line, bases, strict=True)
    ]


def _score_cell(result: Result, mark: str, is_best: bool) -> str:
    text = with_error(result["metric"], result["value"], result["stderr"])
    return f"{bold(text) if is_best else text} {mark}".strip()


# --------------------------------------------------------------------------------------- differences


def difference_table(scores: Scores, run: str) -> Table:
    """Tabulates what each stage of one run changed, and what all stages changed together."""
    targets = scores.targets(run)
    steps = [step for step in STEPS if set(step) <= set(targets)]
    rows = [
        [escape(task_metric[0]), escape(task_metric[1])]
        + [
            _difference_cell(scores, scores.get(run, before, task_metric), scores.get(run, after, task_metric))
            for before, after in steps
        ]
        for task_metric in scores.task_metrics()
    ]
    return Table(["task", "metric", *(STEPS[step] for step in steps)], rows, text_columns=2)


def lead_table(scores: Scores, runs: Sequence[RunArtifacts], target: str) -> Table:
    """Tabulates the difference of every method from the best one. "Within noise" means that it may be due to chance.

    The best one is chosen after looking at all, which ``significance.critical_value`` corrects for. If it beats all
    others without this correction (see ``Scores.best``), the conclusion includes each of these differences.
    """
    names = labels(runs)
    rows = []
    for task_metric in scores.task_metrics():
        line = [scores.get(run.name, target, task_metric) for run in runs]
        first = leader(line)
        if first is not None:
            contenders = 2 if scores.best(line) is first else sum(result is not None for result in line)
            cells = [_lead_cell(scores, first, result, contenders) for result in line]
            rows.append([escape(task_metric[0]), escape(task_metric[1]), *cells])
    return Table(["task", "metric", *(escape(names[run.name]) for run in runs)], rows, text_columns=2)


def _lead_cell(scores: Scores, first: Result, result: Result | None, contenders: int) -> str:
    if result is first:
        return f"{number(result['metric'], result['value'])} leads"
    return _difference_cell(scores, first, result, contenders)


def _difference_cell(scores: Scores, before: Result | None, after: Result | None, contenders: int = 2) -> str:
    if before is None or after is None:
        return MISSING
    difference = scores.difference(before, after, contenders)
    if difference.verdict is Verdict.SAME:
        return emphasis(Verdict.SAME.value)
    text = f"{difference.text()}, {difference.verdict}"
    return text if difference.verdict in (Verdict.BETTER, Verdict.WORSE, Verdict.CHANGED) else emphasis(text)


# -------------------------------------------------------------------------------------------- curves


def curve_table(found: Sequence[Curve]) -> Table:
    """Tabulates held-out loss and perplexity at every measured fraction of the training steps.

    Runs that had seen different numbers of tokens have them in their cells. Averages of the weights, which are the
    result if there are any, have a row of their own.
    """
    fractions = sorted({point["fraction"] for curve in found for point in curve.points})
    lines = {
        f"{100 * fraction:g} %": [next((p for p in curve.points if p["fraction"] == fraction), None) for curve in found]
        for fraction in fractions
    }
    if any(curve.averages for curve in found):
        lines["averages"] = [curve.averages for curve in found]
    rows = []
    for name, points in lines.items():
        tokens = {point["tokens"] for point in points if point is not None}
        cells = [MISSING if point is None else _loss_cell(point, with_tokens=len(tokens) > 1) for point in points]
        rows.append([name, count(tokens.pop()) if len(tokens) == 1 else MISSING, *cells])
    return Table(["trained", "tokens", *(escape(curve.label) for curve in found)], rows, text_columns=1)


def _loss_cell(point: dict[str, Any], with_tokens: bool) -> str:
    stderr = point.get("loss_stderr")
    error = "" if stderr is None else f" ± {stderr:.3f}"
    tokens = f" at {count(point['tokens'])} tokens" if with_tokens else ""
    return f"{point['loss']:.3f}{error} ({significant(perplexity(point['loss']))}){tokens}"


def budget_table(found: Sequence[Curve]) -> Table:
    """Tabulates held-out loss at the largest budgets of tokens, FLOPs and seconds that all runs reach."""
    axes = {"tokens": count, "flops": scientific, "seconds": duration}
    budgets = {axis: common_budget(found, axis) for axis in axes}
    heads = [f"at {form(budgets[axis])}{_UNITS[axis]}" for axis, form in axes.items()]
    rows = [
        [escape(curve.label), *(f"{loss_at(curve, axis, budgets[axis]):.3f}" for axis in axes)] for curve in found
    ]  # fmt: skip
    return Table(["method", *heads], rows)


_UNITS = {"tokens": " tokens", "flops": " FLOPs", "seconds": ""}


# --------------------------------------------------------------------------------- training and cost


def training_table(runs: Sequence[RunArtifacts]) -> Table:
    """Tabulates trained parameters, amount of data, compute and speed of every training stage."""
    names, rows = labels(runs), []
    for run in runs:
        for stage in TRAINING_STAGES:
            training = run.training(stage)
            if training is not None:
                rows.append([escape(names[run.name]), stage, *_training_cells(training)])
    heads = [
        "method",
        "stage",
        "trained",
        "of",
        "steps",
        "tokens",
        "FLOPs",
        "time",
        "tokens/s",
        "ranks",
        "ZeRO",
        "precision",
    ]
    return Table(heads, rows, text_columns=2)


def _training_cells(training: dict[str, Any]) -> list[str]:
    tokens, seconds = training["tokens"], training["seconds"]
    return [
        count(training["trainable_parameters"]),
        count(training["total_parameters"]),
        f"{training['steps']:,}",
        count(tokens),
        scientific(training["flops"]),
        duration(seconds),
        count(tokens / seconds) if seconds else MISSING,
        *(escape(training[name]) for name in ("world_size", "zero_stage", "precision")),
    ]


def artifact_table(runs: Sequence[RunArtifacts]) -> Table:
    """Tabulates every artifact once: its build time, peak memory and key, and in a sweep the runs that use it."""
    names = labels(runs)
    users: dict[tuple[str, str], list[str]] = {}
    manifests = {}
    for role in roles(runs):
        for run in runs:
            manifest = run.manifest(role)
            if manifest is not None:
                users.setdefault((role, manifest["key"]), []).append(names[run.name])
                manifests[role, manifest["key"]] = manifest
    rows = [
        [role, *_used_by(used_by, len(runs)), *_cost_cells(manifests[role, key])]
        for (role, key), used_by in users.items()
    ]  # fmt: skip
    heads = ["stage", *(["used by"] if len(runs) > 1 else []), "time", "peak memory", "key"]
    return Table(heads, rows, text_columns=len(heads) - 3)


def _used_by(run_labels: Sequence[str], num_runs: int) -> list[str]:
    if num_runs == 1:
        return []
    return ["all" if len(run_labels) == num_runs else escape(", ".join(run_labels))]


def _cost_cells(manifest: dict[str, Any]) -> list[str]:
    peak = manifest["peak_memory_bytes"]
    return [duration(manifest["seconds"]), memory(peak) if peak else MISSING, code_span(manifest["key"][:12])]

"""Figures of scores as points with error bars, and of the time that each stage took."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pipeline.config import MODEL_TARGETS, Target
from pipeline.report.findings import primary_metrics
from pipeline.report.metrics import TARGET_NAMES, duration, interval, is_share, number
from pipeline.report.plot_style import GRAY, TEXT_COLOR, colors, figure
from pipeline.report.results import Result
from pipeline.report.runs import TIMED_STAGES, RunArtifacts, is_shared, labels, seconds_by_stage
from pipeline.report.scores import Scores

MAX_PANELS, COLUMNS = 12, 3
DODGE = 0.5  # the width, in distances between two targets, over which the methods of one target are spread


# ------------------------------------------------------------------------------------------- scores


def scores_by_target(runs: Sequence[RunArtifacts], scores: Scores, path: Path) -> bool:
    """Plots the main metric of the first ``MAX_PANELS`` tasks by target, with two standard errors to each side.

    Points on a truncated axis rather than bars, because bars from zero would hide differences of a few points.

    Returns:
        Whether there was anything to draw.
    """
    task_metrics = primary_metrics(scores)[:MAX_PANELS]
    if not task_metrics:
        return False
    lines = -(-len(task_metrics) // COLUMNS)  # rounded up
    with figure(path, 3.0 * lines + 0.3) as drawing:
        grid = list(drawing.subplots(lines, COLUMNS, squeeze=False).flat)
        for axes, task_metric in zip(grid, task_metrics, strict=False):
            _score_panel(axes, runs, scores, task_metric)
        for axes in grid[len(task_metrics) :]:
            axes.axis("off")
        if len(runs) > 1:
            _legend(drawing, runs)
    return True


def _score_panel(axes: Axes, runs: Sequence[RunArtifacts], scores: Scores, task_metric: tuple[str, str]) -> None:
    palette, targets = colors(runs), _drawn_targets(runs, scores)
    shared = scores.shared_base([run.name for run in runs])
    base = scores.get(runs[0].name, "load", task_metric)
    if shared and base is not None:
        axes.axhline(base["value"], color=TEXT_COLOR, linestyle=(0, (5, 4)), linewidth=1.0, zorder=1)
        _points(axes, [(0, base)], TEXT_COLOR, with_values=len(runs) == 1)
    for rank, run in enumerate(runs):
        offset = DODGE * (rank - (len(runs) - 1) / 2) / max(len(runs) - 1, 1)
        found = [(x, scores.get(run.name, target, task_metric)) for x, target in enumerate(targets)]
        present = [(x + offset, result) for x, result in found if result is not None and not (shared and x == 0)]
        _points(axes, present, palette[run.name], with_values=len(runs) == 1)
    _label_panel(axes, task_metric, targets)


def _drawn_targets(runs: Sequence[RunArtifacts], scores: Scores) -> list[str]:
    """Returns the four stages' models and the snapshots of all runs, in order."""
    scored = {target for run in runs for target in scores.all_targets(run.name)}
    return sorted(scored | set(MODEL_TARGETS), key=lambda target: Target.parse(target).order)


def _points(axes: Axes, points: Sequence[tuple[float, Result]], color: str, with_values: bool) -> None:
    for x, result in points:
        below, above = interval(result["metric"], result["value"], result["stderr"], factor=2)
        axes.errorbar(x, result["value"], yerr=[[below], [above]], fmt="o", color=color, linewidth=1.5, zorder=3)
        if with_values:
            place, text = (x, result["value"] + above), number(result["metric"], result["value"])
            axes.annotate(text, place, xytext=(0, 5), textcoords="offset points", ha="center", fontsize=8.5)


def _label_panel(axes: Axes, task_metric: tuple[str, str], targets: Sequence[str]) -> None:
    task, metric = task_metric
    axes.set_title(task, pad=20)
    axes.text(0, 1.04, metric.replace("_", " "), transform=axes.transAxes, color=GRAY, fontsize=8.5)
    # A snapshot is labeled with its percentage alone, since it is between the names of its stages.
    names = [TARGET_NAMES.get(target, target.partition("@")[2].replace("%", " %")) for target in targets]
    axes.set_xticks(range(len(targets)), names)
    axes.set_xlim(-0.5, len(targets) - 0.4)
    axes.tick_params(axis="x", length=0, labelsize=8)
    axes.margins(y=0.12)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if is_share(metric):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.grid(axis="y")


def _legend(drawing: Figure, runs: Sequence[RunArtifacts]) -> None:
    """Writes the methods' names in their colors in one line above the panels."""
    names, palette = labels(runs), colors(runs)
    handles = [
        Line2D([], [], color=palette[run.name], marker="o", linestyle="none", label=names[run.name]) for run in runs
    ]
    drawing.legend(
        handles=handles, loc="outside upper left", ncols=len(runs), frameon=False, labelcolor="linecolor",
        handletextpad=0.2, columnspacing=1.4,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- times


class StageBar(NamedTuple):
    """One bar: ``seconds`` of a stage at height ``y``."""

    y: float
    stage: str
    seconds: float
    label: str
    color: str


def seconds_by_stage_plot(runs: Sequence[RunArtifacts], path: Path) -> bool:
    """Draws one bar per stage and run, with its time. A stage that all runs share is one gray bar."""
    bars = _bars(runs)
    if not bars:
        return False
    with figure(path, 0.5 + 0.24 * len(bars)) as drawing:
        axes = drawing.subplots()
        for bar in bars:
            axes.barh(bar.y, bar.seconds, height=0.78, color=bar.color)
            text, end = f"{duration(bar.seconds)}  {bar.label}".rstrip(), (bar.seconds, bar.y)
            axes.annotate(text, end, xytext=(5, 0), textcoords="offset points", va="center", fontsize=8.5)
        _stage_ticks(axes, bars)
    return True


def _bars(runs: Sequence[RunArtifacts]) -> list[StageBar]:
    names, palette = labels(runs), colors(runs)
    bars: list[StageBar] = []
    y = 0.0
    for stage in TIMED_STAGES:
        shared = is_shared(runs, stage)
        for run in runs[:1] if shared else runs:
            seconds = seconds_by_stage(run).get(stage)
            if seconds is not None:
                label = "" if len(runs) == 1 else "shared by all" if shared else names[run.name]
                bars.append(StageBar(y, stage, seconds, label, GRAY if shared else palette[run.name]))
                y += 1
        y += 0.5 if len(runs) > 1 else 0
    return bars


def _stage_ticks(axes: Axes, bars: Sequence[StageBar]) -> None:
    places: dict[str, list[float]] = {}
    for bar in bars:
        places.setdefault(bar.stage, []).append(bar.y)
    axes.set_yticks([sum(ys) / len(ys) for ys in places.values()], list(places))
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.margins(x=0.22, y=0.02)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xlim(left=0)
    axes.set_xticks([])

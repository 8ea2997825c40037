"""Scores as points with error bars, and the seconds that each stage took."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pipeline.config import MODEL_TARGETS, Target
from pipeline.report.curves import STAGES, is_shared, seconds_by_stage
from pipeline.report.findings import primary_measures
from pipeline.report.metrics import SHARES, TARGET_NAMES, duration, number
from pipeline.report.plot_style import INK, QUIET, colours, figure
from pipeline.report.results import Row
from pipeline.report.runs import RunArtifacts, labels
from pipeline.report.scores import Scores

MAX_PANELS, COLUMNS = 12, 3
DODGE = 0.5  # of the distance between two targets, over which methods stand side by side


# ------------------------------------------------------------------------------------------- scores


def scores_by_target(runs: Sequence[RunArtifacts], scores: Scores, path: Path) -> bool:
    """Every task's main metric by target, with two standard errors to each side (the first ``MAX_PANELS`` tasks).

    Points on a cut axis, not bars: the differences at stake are a few points, which a bar from zero would hide.

    Returns:
        Whether there was anything to draw.
    """
    measures = primary_measures(scores)[:MAX_PANELS]
    if not measures:
        return False
    lines = -(-len(measures) // COLUMNS)
    with figure(path, 3.0 * lines + 0.3) as drawing:
        grid = list(drawing.subplots(lines, COLUMNS, squeeze=False).flat)
        for axes, measure in zip(grid, measures, strict=False):
            _score_panel(axes, runs, scores, measure)
        for axes in grid[len(measures) :]:
            axes.axis("off")
        if len(runs) > 1:
            _key(drawing, runs)
    return True


def _score_panel(axes: Axes, runs: Sequence[RunArtifacts], scores: Scores, measure: tuple[str, str]) -> None:
    palette, targets = colours(runs), _drawn_targets(runs, scores)
    shared = scores.shared_base([run.name for run in runs])
    base = scores.get(runs[0].name, "load", measure)
    if shared and base is not None:
        axes.axhline(base["value"], color=INK, linestyle=(0, (5, 4)), linewidth=1.0, zorder=1)
        _points(axes, [(0, base)], INK, with_values=len(runs) == 1)
    for rank, run in enumerate(runs):
        offset = DODGE * (rank - (len(runs) - 1) / 2) / max(len(runs) - 1, 1)
        rows = [(x, scores.get(run.name, target, measure)) for x, target in enumerate(targets)]
        present = [(x + offset, row) for x, row in rows if row is not None and not (shared and x == 0)]
        _points(axes, present, palette[run.name], with_values=len(runs) == 1)
    _dress(axes, measure, targets)


def _drawn_targets(runs: Sequence[RunArtifacts], scores: Scores) -> list[str]:
    """The four stages' models, and between them the snapshots of any run."""
    scored = {target for run in runs for target in scores.all_targets(run.name)}
    return sorted(scored | set(MODEL_TARGETS), key=lambda target: Target.parse(target).order)


def _points(axes: Axes, points: Sequence[tuple[float, Row]], colour: str, with_values: bool) -> None:
    for x, row in points:
        error = 2 * (row["stderr"] or 0)
        axes.errorbar(x, row["value"], yerr=error, fmt="o", color=colour, linewidth=1.5, zorder=3)
        if with_values:
            place, text = (x, row["value"] + error), number(row["metric"], row["value"])
            axes.annotate(text, place, xytext=(0, 5), textcoords="offset points", ha="center", fontsize=8.5)


def _dress(axes: Axes, measure: tuple[str, str], targets: Sequence[str]) -> None:
    task, metric = measure
    axes.set_title(task, pad=20)
    axes.text(0, 1.04, metric.replace("_", " "), transform=axes.transAxes, color=QUIET, fontsize=8.5)
    # On the way the share alone stands, between the names of its stages.
    names = [TARGET_NAMES.get(target, target.partition("@")[2].replace("%", " %")) for target in targets]
    axes.set_xticks(range(len(targets)), names)
    axes.set_xlim(-0.5, len(targets) - 0.4)
    axes.tick_params(axis="x", length=0, labelsize=8)
    axes.margins(y=0.12)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if metric in SHARES:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.grid(axis="y")


def _key(drawing: Figure, runs: Sequence[RunArtifacts]) -> None:
    """The methods' names in their colours, in one line above the panels."""
    names, palette = labels(runs), colours(runs)
    handles = [
        Line2D([], [], color=palette[run.name], marker="o", linestyle="none", label=names[run.name]) for run in runs
    ]
    drawing.legend(
        handles=handles, loc="outside upper left", ncols=len(runs), frameon=False, labelcolor="linecolor",
        handletextpad=0.2, columnspacing=1.4,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ seconds


def seconds_by_stage_plot(runs: Sequence[RunArtifacts], path: Path) -> bool:
    """One bar a stage and run, with its time; a stage that all runs share is one grey bar."""
    bars = _bars(runs)
    if not bars:
        return False
    with figure(path, 0.5 + 0.24 * len(bars)) as drawing:
        axes = drawing.subplots()
        for y, (_, seconds, label, colour) in bars:
            axes.barh(y, seconds, height=0.78, color=colour)
            text = f"{duration(seconds)}  {label}".rstrip()
            axes.annotate(text, (seconds, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8.5)
        _stage_ticks(axes, bars)
    return True


Bar = tuple[float, tuple[str, float, str, str]]  # y, (stage, seconds, label, colour)


def _bars(runs: Sequence[RunArtifacts]) -> list[Bar]:
    names, palette = labels(runs), colours(runs)
    bars: list[Bar] = []
    y = 0.0
    for stage in STAGES:
        shared = is_shared(runs, stage)
        for run in runs[:1] if shared else runs:
            seconds = seconds_by_stage(run).get(stage)
            if seconds is not None:
                label = "" if len(runs) == 1 else "shared by all" if shared else names[run.name]
                bars.append((y, (stage, seconds, label, QUIET if shared else palette[run.name])))
                y += 1
        y += 0.5 if len(runs) > 1 else 0
    return bars


def _stage_ticks(axes: Axes, bars: Sequence[Bar]) -> None:
    places: dict[str, list[float]] = {}
    for y, (stage, *_) in bars:
        places.setdefault(stage, []).append(y)
    axes.set_yticks([sum(ys) / len(ys) for ys in places.values()], list(places))
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.margins(x=0.22, y=0.02)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xlim(left=0)
    axes.set_xticks([])

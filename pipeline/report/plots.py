"""The figures of a report as PNG files: losses and the layer map here, scores and times in ``score_plots``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipeline.config import TRAINING_STAGES
from pipeline.report.curves import Curve, SameBlocks, comparable_curves
from pipeline.report.metrics import count, scientific
from pipeline.report.plot_style import GRAY, LIGHT_GRAY, TEXT_COLOR, colors, figure, label_ends
from pipeline.report.runs import RunArtifacts, labels, layouts
from pipeline.report.score_plots import scores_by_target, seconds_by_stage_plot
from pipeline.report.scores import Scores

LAYERS, RANKING, SCORES, HELD_OUT, TRAINING, SECONDS = (
    f"{name}.png" for name in ("layers", "ranking", "scores", "held_out_loss", "training_loss", "seconds")
)
AXES = {"tokens": "tokens", "flops": "training FLOPs", "seconds": "training time"}
# The layer map draws the base model's layers as a row of cells at BASE_Y and the expanded model's at EXPANDED_Y.
BASE_Y, EXPANDED_Y, CELL = 0.0, 1.9, 0.84
FEWEST_CELLS = 24  # the width of a row in cells at least, so that the cells of a small model are not stretched
BASE_LAYER_COLOR = "#e7eaee"
SEVERAL_METHODS_COLOR = "#44546a"  # for new layers that several methods place alike


def draw_all(runs: Sequence[RunArtifacts], scores: Scores, out: Path) -> set[str]:
    """Draws every figure that the runs have numbers for into ``out`` and returns the names of the files."""
    drawn = {
        LAYERS: layer_map(runs, out / LAYERS),
        RANKING: layer_ranking(runs, out / RANKING),
        SCORES: scores_by_target(runs, scores, out / SCORES),
        HELD_OUT: held_out_loss(runs, out / HELD_OUT),
        TRAINING: training_loss(runs, out / TRAINING),
        SECONDS: seconds_by_stage_plot(runs, out / SECONDS),
    }
    return {name for name, was_drawn in drawn.items() if was_drawn}


# ------------------------------------------------------------------------------------------- losses


def held_out_loss(runs: Sequence[RunArtifacts], path: Path) -> bool:
    """Plots the held-out loss of pre-training against tokens, FLOPs and seconds, with the base as a dashed line.

    Runs that were measured on different held-out blocks are in different rows.

    Returns:
        Whether there was anything to draw.
    """
    groups = comparable_curves(runs, "pretrain")
    if not groups:
        return False
    palette = colors(runs)
    with figure(path, 3.6 * len(groups)) as drawing:
        rows = drawing.subplots(len(groups), len(AXES), sharey="row", squeeze=False)
        for panels, group in zip(rows, groups, strict=True):
            _loss_row(panels, group, palette)
        drawing.draw_without_rendering()
        for panels, group in zip(rows, groups, strict=True):
            ends = [(curve.last["loss"], _end_label(curve), palette[curve.run]) for curve in group.curves]
            base = [] if group.base is None else [(group.base, f"base {group.base:.3f}", TEXT_COLOR)]
            label_ends(panels[-1], [*ends, *base])
    return True


def _loss_row(panels: Sequence[Axes], group: SameBlocks, palette: dict[str, str]) -> None:
    for axes, axis in zip(panels, AXES, strict=True):
        _loss_panel(axes, group.curves, axis, palette)
        if group.base is not None:
            axes.axhline(group.base, color=TEXT_COLOR, linestyle=(0, (5, 4)), linewidth=1.2)
    _loss_limits(panels[0], group.curves, group.base, palette)
    data = f"\n{group.data}" if group.data else ""
    panels[0].set_ylabel(f"held-out loss (nats per token){data}")


def _end_label(curve: Curve) -> str:
    label = f"{curve.label} {curve.last['loss']:.3f}"
    return label if curve.averages is None else f"{label} (averages {curve.averages['loss']:.3f})"


def _loss_panel(axes: Axes, found: Sequence[Curve], axis: str, palette: dict[str, str]) -> None:
    scale, name = _unit(axis, max(curve.last[axis] for curve in found))
    for curve in found:
        xs, ys = [point[axis] / scale for point in curve.points], [point["loss"] for point in curve.points]
        axes.plot(xs, ys, marker="o", color=palette[curve.run])
    axes.set_title(f"by {name}")
    axes.set_xlim(left=-0.02 * axes.get_xlim()[1])
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(3 if axis == "flops" else 4))
    form = {"tokens": count, "flops": scientific, "seconds": "{:g}".format}[axis]
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value) if value else "0"))


def _unit(axis: str, longest: float) -> tuple[float, str]:
    """Returns the unit of an axis: a divisor for its values, and the title."""
    if axis != "seconds":
        return 1.0, AXES[axis]
    scale, unit = (1.0, "seconds") if longest < 180 else (60.0, "minutes") if longest < 3 * 3600 else (3600.0, "hours")
    return scale, f"{AXES[axis]} ({unit})"


def _loss_limits(axes: Axes, found: Sequence[Curve], base: float | None, palette: dict[str, str]) -> None:
    """Fits the limits to the losses during training. A far higher first loss is cut off and written as text instead."""
    trained = [point["loss"] for curve in found for point in curve.points[1:]] + ([base] if base is not None else [])
    low, high = min(trained), max(trained)
    span = max(high - low, 0.02)
    above = 0.5 if len(found) > 1 else 3.0  # a single curve competes with no other for space
    top = min(max(curve.first["loss"] for curve in found), high + above * span)
    axes.set_ylim(low - 0.08 * span, max(top, high) + 0.06 * span)
    for rank, curve in enumerate(curve for curve in found if curve.first["loss"] > top):
        text = f"{curve.label} starts at {curve.first['loss']:.2f}"
        axes.annotate(text, (1, 1), xycoords="axes fraction", xytext=(0, -12 * (rank + 1)), textcoords="offset points",
                      ha="right", color=palette[curve.run], fontsize=8.5)  # fmt: skip


def training_loss(runs: Sequence[RunArtifacts], path: Path) -> bool:
    """Plots the loss of every optimizer step, one panel per stage. Returns whether there was anything to draw."""
    stages = [stage for stage in TRAINING_STAGES if any(run.training_steps(stage) for run in runs)]
    if not stages:
        return False
    with figure(path, 2.8) as drawing:
        panels = drawing.subplots(1, len(stages), squeeze=False)[0]
        ends = [_training_panel(axes, runs, stage) for axes, stage in zip(panels, stages, strict=True)]
        drawing.draw_without_rendering()
        for axes, of_panel in zip(panels, ends, strict=True):
            label_ends(axes, of_panel)
    return True


def _training_panel(axes: Axes, runs: Sequence[RunArtifacts], stage: str) -> list[tuple[float, str, str]]:
    palette, names = colors(runs), labels(runs)
    ends = []
    for run in runs:
        lines = run.training_steps(stage)
        if lines:
            axes.plot([x["step"] for x in lines], [x["loss"] for x in lines], color=palette[run.name], linewidth=1.3)
            ends.append((lines[-1]["loss"], names[run.name], palette[run.name]))
    axes.set_title(f"{stage}: training loss by step")
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return ends


# ---------------------------------------------------------------------------------------- layer map


def layer_map(runs: Sequence[RunArtifacts], path: Path) -> bool:
    """Draws which base layer every layer comes from, one strip per group of runs with the same layout.

    Returns:
        Whether there was anything to draw.
    """
    groups = layouts(runs)
    if not groups:
        return False
    names, palette = labels(runs), colors(runs)
    widest = max(FEWEST_CELLS, *(expansion["num_layers"] for _, expansion in groups))
    with figure(path, 1.45 * len(groups)) as drawing:
        all_axes = drawing.subplots(len(groups), 1, squeeze=False)[:, 0]
        for axes, (alike, expansion) in zip(all_axes, groups, strict=True):
            _strip(axes, expansion, palette[alike[0].name] if len(alike) == 1 else SEVERAL_METHODS_COLOR, widest)
            axes.set_title(_title([names[run.name] for run in alike], expansion))
    return True


def layer_ranking(runs: Sequence[RunArtifacts], path: Path) -> bool:
    """Draws what was measured of every layer of the base, with the chosen layers in color, one panel per ranking.

    Returns:
        Whether there was anything to draw.
    """
    ranked: dict[str, tuple[list[RunArtifacts], dict[str, Any]]] = {}
    for run in runs:
        if (ranking := run.ranking()) is not None:
            ranked.setdefault(str((ranking, sorted(run.chosen_layers()))), ([], ranking))[0].append(run)
    if not ranked:
        return False
    names, palette = labels(runs), colors(runs)
    with figure(path, 2.2 * len(ranked)) as drawing:
        all_axes = drawing.subplots(len(ranked), 1, squeeze=False)[:, 0]
        for axes, (alike, ranking) in zip(all_axes, ranked.values(), strict=True):
            color = palette[alike[0].name] if len(alike) == 1 else SEVERAL_METHODS_COLOR
            chosen, values = alike[0].chosen_layers(), ranking["values"]
            shades = [color if layer in chosen else LIGHT_GRAY for layer in range(len(values))]
            axes.bar(range(len(values)), values, yerr=ranking["errors"], color=shades, ecolor=GRAY)
            axes.set_title(f"{', '.join(names[run.name] for run in alike)}: {ranking['measure']}")
            axes.set_xlabel("layer of the base")
            if min(values) > 0 and max(values) > 20 * sorted(values)[len(values) // 2]:
                axes.set_yscale("log")  # bypassing the first or last layer costs far more than any other
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))  # the default is mathtext
            axes.xaxis.set_major_locator(MaxNLocator(15, integer=True))
    return True


def _title(names: Sequence[str], expansion: Mapping[str, Any]) -> str:
    new = sum(layer["new"] for layer in expansion["layers"])
    return f"{', '.join(names)}: {expansion['num_base_layers']} layers + {new} new = {expansion['num_layers']}"


def _strip(axes: Axes, expansion: Mapping[str, Any], color: str, widest: int) -> None:
    """Draws one layout. Every base layer is directly below the layer it became, so that gaps show the insertions."""
    layers = expansion["layers"]
    base_x = {layer["from"][0]: layer["layer"] for layer in layers if not layer["new"]}
    for layer in layers:
        for source in layer["from"]:
            _connector(axes, base_x[source], layer["layer"], color if layer["new"] else LIGHT_GRAY, layer["new"])
        _cell(axes, layer["layer"], EXPANDED_Y, color if layer["new"] else BASE_LAYER_COLOR)
    for x in base_x.values():
        _cell(axes, x, BASE_Y, BASE_LAYER_COLOR)
    text_colors = {layer["layer"]: "white" if layer["new"] else TEXT_COLOR for layer in layers}
    _numbers(axes, {index: index for index in text_colors}, EXPANDED_Y, text_colors, widest)
    _numbers(axes, base_x, BASE_Y, dict.fromkeys(base_x, TEXT_COLOR), widest)
    for y, text in ((BASE_Y, "base"), (EXPANDED_Y, "expanded")):
        axes.text(-0.5 - 0.01 * widest, y, text, ha="right", va="center", color=GRAY)
    axes.set_xlim(-0.5 - 0.08 * widest, widest - 0.4)
    axes.set_ylim(-0.75, EXPANDED_Y + 0.75)
    axes.axis("off")


def _numbers(axes: Axes, places: Mapping[int, int], y: float, text_colors: Mapping[int, str], widest: int) -> None:
    """Writes each layer's index into its cell, or every tenth index beside the row if two digits would not fit."""
    fitting = 330 / widest  # font size in points that fits two digits into a cell
    if fitting >= 5:
        for index, x in places.items():
            axes.text(
                x, y - 0.02, str(index), ha="center", va="center", color=text_colors[index], fontsize=min(8.0, fitting)
            )
        return
    outside = y + 0.62 if y == EXPANDED_Y else y - 0.62
    for index, x in places.items():
        if index % 10 == 0:
            axes.text(x, outside, str(index), ha="center", va="center", color=GRAY, fontsize=7)


def _connector(axes: Axes, base_x: float, new_x: float, color: str, new: bool) -> None:
    ys = [BASE_Y + CELL / 2 + 0.05, EXPANDED_Y - CELL / 2 - 0.05]
    axes.plot([base_x, new_x], ys, color=color, linewidth=1.3 if new else 1.0, zorder=2 if new else 1)


def _cell(axes: Axes, x: float, y: float, face: str) -> None:
    corner = (x - CELL / 2, y - CELL / 2)
    shape = "round,pad=0,rounding_size=0.14"
    axes.add_patch(FancyBboxPatch(corner, CELL, CELL, boxstyle=shape, facecolor=face, edgecolor="none"))

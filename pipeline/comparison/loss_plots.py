"""Losses as lines: held-out loss against three kinds of cost, and the training loss by step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipeline.comparison.curves import Curve, curves
from pipeline.comparison.measures import count, scientific
from pipeline.comparison.plot_style import INK, colours, figure, label_ends
from pipeline.comparison.run_artifacts import RunArtifacts, labels
from pipeline.config import TRAINING_STAGES

AXES = {"tokens": "tokens", "flops": "training FLOPs", "seconds": "training time"}


def held_out_loss(runs: Sequence[RunArtifacts], base: float | None, path: Path) -> bool:
    """Held-out loss of pre-training against tokens, FLOPs and seconds, the base as a dashed line.

    Args:
        base: the untouched base's loss on the same blocks, or None where no run measured it.

    Returns:
        Whether there was anything to draw.
    """
    found = curves(runs, "pretrain")
    if not found:
        return False
    palette = colours(runs)
    with figure(path, 3.6) as drawing:
        panels = drawing.subplots(1, len(AXES), sharey=True)
        for axes, axis in zip(panels, AXES, strict=True):
            _loss_panel(axes, found, axis, palette)
            if base is not None:
                axes.axhline(base, color=INK, linestyle=(0, (5, 4)), linewidth=1.2)
        _loss_limits(panels[0], found, base, palette)
        panels[0].set_ylabel("held-out loss (nats a token)")
        drawing.draw_without_rendering()
        ends = [(curve.last["loss"], f"{curve.label} {curve.last['loss']:.3f}", palette[curve.run]) for curve in found]
        label_ends(panels[-1], [*ends, *([(base, f"base {base:.3f}", INK)] if base is not None else [])])
    return True


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
    """What to divide by, and what to call the axis."""
    if axis != "seconds":
        return 1.0, AXES[axis]
    scale, unit = (1.0, "seconds") if longest < 180 else (60.0, "minutes") if longest < 3 * 3600 else (3600.0, "hours")
    return scale, f"{AXES[axis]} ({unit})"


def _loss_limits(axes: Axes, found: Sequence[Curve], base: float | None, palette: dict[str, str]) -> None:
    """Room for what training does: a far higher loss right after surgery runs out of the frame, and is named there."""
    trained = [point["loss"] for curve in found for point in curve.points[1:]] + ([base] if base is not None else [])
    low, high = min(trained), max(trained)
    room = max(high - low, 0.02)
    above = 0.5 if len(found) > 1 else 3.0  # a lone curve may as well be seen whole
    top = min(max(curve.first["loss"] for curve in found), high + above * room)
    axes.set_ylim(low - 0.08 * room, max(top, high) + 0.06 * room)
    for rank, curve in enumerate(curve for curve in found if curve.first["loss"] > top):
        text = f"{curve.label} starts at {curve.first['loss']:.2f}"
        axes.annotate(text, (1, 1), xycoords="axes fraction", xytext=(0, -12 * (rank + 1)), textcoords="offset points",
                      ha="right", color=palette[curve.run], fontsize=8.5)  # fmt: skip


def training_loss(runs: Sequence[RunArtifacts], path: Path) -> bool:
    """The loss of every optimizer step, a panel a stage. Returns whether there was anything to draw."""
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
    palette, names = colours(runs), labels(runs)
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

"""The figures of a study's report: Pareto fronts, and the validation loss by learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from pipeline.report.metrics import scientific
from pipeline.report.plot_style import GRAY, SPARE_COLORS, figure, label_ends


@dataclass(frozen=True)
class Mark:
    """A contender in a plot of two quantities, of both of which less is better. Errors are one standard error."""

    number: int  # in the table of the report
    x: float
    y: float
    x_error: float
    y_error: float


@dataclass(frozen=True)
class Panel:
    """A plot of all contenders by two quantities."""

    title: str
    x_name: str
    marks: Sequence[Mark]
    counts_flops: bool = False


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Returns the indices of the points that no other point is at least as good as in both coordinates, by the first.

    Less is better. Of equal points, all are on the front.
    """
    front = [
        index
        for index, (x, y) in enumerate(points)
        if not any(ox <= x and oy <= y and (ox, oy) != (x, y) for ox, oy in points)
    ]
    return sorted(front, key=lambda index: points[index])


def draw_pareto(panels: Sequence[Panel], path: Path) -> None:
    """Plots the held-out loss against other quantities, with a line along each Pareto front."""
    with figure(path, 4.2) as drawing:
        for axes, panel in zip(drawing.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _draw_panel(axes, panel)


def _color(number: int) -> str:
    return SPARE_COLORS[(number - 1) % len(SPARE_COLORS)]


def _draw_panel(axes: Axes, panel: Panel) -> None:
    for mark in panel.marks:
        color = _color(mark.number)
        axes.errorbar(mark.x, mark.y, mark.y_error, mark.x_error, fmt="o", color=color, elinewidth=1.0)
        axes.annotate(
            str(mark.number), (mark.x, mark.y), xytext=(4, 4), textcoords="offset points", color=color, size=9
        )
    front = [panel.marks[index] for index in pareto_front([(mark.x, mark.y) for mark in panel.marks])]
    axes.step([mark.x for mark in front], [mark.y for mark in front], where="post", color=GRAY, linewidth=1.0, zorder=0)
    if panel.counts_flops:
        axes.set_xlim(left=0.0)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: scientific(value) if value else "0"))
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x_name)
    axes.set_ylabel("held-out loss (nats per token)")
    axes.grid(axis="both")


def spaced_labels(rates: Sequence[float], share: float = 0.08) -> list[str]:
    """Returns the labels of ascending rates on a logarithmic axis.

    A rate that is closer to the last label than a share of the axis has none.
    """
    labels: list[str] = []
    last = 0.0
    for rate in rates:
        is_apart = not last or math.log(rate / last) > share * math.log(rates[-1] / rates[0])
        labels.append(f"{rate:g}" if is_apart else "")
        last = rate if is_apart else last
    return labels


def draw_rates(
    losses: Mapping[str, Mapping[float, float]], chosen: Mapping[str, float], numbers: Mapping[str, int], path: Path
) -> None:
    """Plots the validation loss of every contender by learning rate, as differences to its best one.

    Args:
        losses: by contender and rate, on the last rung; finite.
        chosen: the chosen rate of every contender, which is marked.
        numbers: of the contenders in the tables of the report.
    """
    with figure(path, max(3.6, 1.2 + 0.17 * len(losses))) as drawing:
        axes, ends = drawing.subplots(), []
        for name, by_rate in losses.items():
            color, rates = _color(numbers[name]), sorted(by_rate)
            best = by_rate[chosen[name]]
            heights = [by_rate[rate] - best for rate in rates]
            axes.plot(rates, heights, marker="o", color=color)
            axes.plot([chosen[name]], [0.0], marker="o", markersize=9, fillstyle="none", color=color)
            ends.append((heights[-1], f"{numbers[name]} {name}", color))
        axes.set_xscale("log")
        # The style turns off mathtext, in which the default formatter writes powers of ten.
        trained = sorted({rate for by_rate in losses.values() for rate in by_rate})
        axes.set_xticks(trained, spaced_labels(trained))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title("validation loss above that of the chosen rate")
        axes.set_xlabel("learning rate")
        axes.grid(axis="y")
        drawing.draw_without_rendering()
        label_ends(axes, ends)

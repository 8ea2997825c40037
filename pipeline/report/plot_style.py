"""The style of the plots: one color per method in all plots, and labels at the ends of lines instead of legends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.report.runs import RunArtifacts

WIDTH = 9.0  # inches, about the width at which a README shows an image
DPI = 200
TEXT_COLOR, GRAY, LIGHT_GRAY = "#1f2328", "#6a737d", "#d8dee4"
SPARE_COLORS = ("#6a3d9a", "#8c564b", "#b2182b", "#17888f", "#9a9a00", "#4d4d4d", "#e377c2", "#1b4f9c")
_STYLE = {
    "text.parse_math": False,  # names of runs and tasks may contain a dollar sign
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.edgecolor": GRAY,
    "axes.labelcolor": TEXT_COLOR,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": LIGHT_GRAY,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "text.color": TEXT_COLOR,
    "xtick.color": GRAY,
    "ytick.color": GRAY,
    "xtick.labelcolor": TEXT_COLOR,
    "ytick.labelcolor": TEXT_COLOR,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
}


@contextmanager
def figure(path: Path, height: float) -> Iterator[Figure]:
    """Yields a figure of ``WIDTH`` by ``height`` inches and saves it to ``path`` as PNG when the block ends.

    It does not use pyplot, which keeps global state and may look for a window system.
    """
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        drawing = Figure(figsize=(WIDTH, height))
        yield drawing
        drawing.savefig(path, dpi=DPI, metadata={"Software": None})


def colors(runs: Sequence[RunArtifacts]) -> dict[str, str]:
    """Returns the color of each run by name: its method's, or a spare one if methods repeat or have none."""
    methods = [run.method for run in runs]
    distinct = len(set(methods)) == len(methods)
    spare = iter(SPARE_COLORS * (1 + len(runs) // len(SPARE_COLORS)))
    return {run.name: (run.method_color if distinct else None) or next(spare) for run in runs}


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Moves label positions apart until neighbors are at least ``gap`` from each other, within [low, high].

    Labels that touch are merged into a block around their common center, and blocks that then touch are merged again
    (the pool-adjacent-violators algorithm). The order of the labels does not change.
    """
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    blocks: list[list[float]] = []
    for index in order:
        blocks.append([positions[index]])
        while len(blocks) > 1 and _lowest(blocks[-1], gap) < _lowest(blocks[-2], gap) + gap * len(blocks[-2]):
            last = blocks.pop()
            blocks[-1] += last
    apart = [_lowest(block, gap) + rank * gap for block in blocks for rank in range(len(block))]
    placed = list(positions)
    for rank, (index, position) in enumerate(zip(order, apart, strict=True)):
        placed[index] = min(max(position, low + rank * gap), high - (len(order) - 1 - rank) * gap)
    return placed


def _lowest(block: Sequence[float], gap: float) -> float:
    return sum(block) / len(block) - gap * (len(block) - 1) / 2


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Writes each line's name into the right margin, in the line's color, at the height of its end, without overlaps.

    Args:
        ends: (y in data units, text, color) of each line. The axis limits must be final.
    """
    low, high = axes.get_ylim()
    inches = axes.get_window_extent().height / axes.figure.dpi
    gap = (high - low) * 0.165 / inches  # a line of text is about 0.165 inches high
    for (_, text, color), y in zip(ends, spread([end[0] for end in ends], gap, low, high), strict=True):
        axes.annotate(
            text, (1, y), xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points",
            color=color, va="center", annotation_clip=False,
        )  # fmt: skip

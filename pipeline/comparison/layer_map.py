"""A picture of the surgery: the base's layers below, the expanded model's above, and what came from where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from pipeline.comparison.plot_style import FAINT, INK, QUIET, colours, figure
from pipeline.comparison.run_artifacts import RunArtifacts, labels, layouts

BASE_Y, NEW_Y, CELL = 0.0, 1.9, 0.84
NARROWEST = 24  # cells that a strip has room for at least, so that those of a small model are not stretched
OLD, SEVERAL = "#e7eaee", "#44546a"  # a layer of the base; new layers that several methods place alike


def layer_map(runs: Sequence[RunArtifacts], path: Path) -> bool:
    """One strip for all runs whose layers come from the same places. Returns whether there was anything to draw."""
    groups = layouts(runs)
    if not groups:
        return False
    names, palette = labels(runs), colours(runs)
    widest = max(NARROWEST, *(expansion["num_layers"] for _, expansion in groups))
    with figure(path, 1.45 * len(groups)) as drawing:
        all_axes = drawing.subplots(len(groups), 1, squeeze=False)[:, 0]
        for axes, (alike, expansion) in zip(all_axes, groups, strict=True):
            _strip(axes, expansion, palette[alike[0].name] if len(alike) == 1 else SEVERAL, widest)
            axes.set_title(_title([names[run.name] for run in alike], expansion))
    return True


def _title(names: Sequence[str], expansion: Mapping[str, Any]) -> str:
    new = sum(layer["new"] for layer in expansion["layers"])
    return f"{', '.join(names)}: {expansion['num_base_layers']} layers + {new} new = {expansion['num_layers']}"


def _strip(axes: Axes, expansion: Mapping[str, Any], colour: str, widest: int) -> None:
    """Every base layer stands straight below the layer it became, so that the gaps show where new ones went in."""
    layers = expansion["layers"]
    base_x = {layer["from"][0]: layer["layer"] for layer in layers if not layer["new"]}
    for layer in layers:
        for source in layer["from"]:
            _connector(axes, base_x[source], layer["layer"], colour if layer["new"] else FAINT, layer["new"])
        _cell(axes, layer["layer"], NEW_Y, colour if layer["new"] else OLD)
    for x in base_x.values():
        _cell(axes, x, BASE_Y, OLD)
    inks = {layer["layer"]: "white" if layer["new"] else INK for layer in layers}
    _numbers(axes, {index: index for index in inks}, NEW_Y, inks, widest)
    _numbers(axes, base_x, BASE_Y, dict.fromkeys(base_x, INK), widest)
    for y, text in ((BASE_Y, "base"), (NEW_Y, "expanded")):
        axes.text(-0.5 - 0.01 * widest, y, text, ha="right", va="center", color=QUIET)
    axes.set_xlim(-0.5 - 0.08 * widest, widest - 0.4)
    axes.set_ylim(-0.75, NEW_Y + 0.75)
    axes.axis("off")


def _numbers(axes: Axes, places: Mapping[int, int], y: float, inks: Mapping[int, str], widest: int) -> None:
    """A layer's number in its cell; where two digits would not fit, every tenth number outside the row."""
    fitting = 330 / widest  # points
    if fitting >= 5:
        for index, x in places.items():
            axes.text(x, y - 0.02, str(index), ha="center", va="center", color=inks[index], fontsize=min(8.0, fitting))
        return
    outside = y + 0.62 if y == NEW_Y else y - 0.62
    for index, x in places.items():
        if index % 10 == 0:
            axes.text(x, outside, str(index), ha="center", va="center", color=QUIET, fontsize=7)


def _connector(axes: Axes, base_x: float, new_x: float, colour: str, new: bool) -> None:
    ys = [BASE_Y + CELL / 2 + 0.05, NEW_Y - CELL / 2 - 0.05]
    axes.plot([base_x, new_x], ys, color=colour, linewidth=1.3 if new else 1.0, zorder=2 if new else 1)


def _cell(axes: Axes, x: float, y: float, face: str) -> None:
    corner = (x - CELL / 2, y - CELL / 2)
    shape = "round,pad=0,rounding_size=0.14"
    axes.add_patch(FancyBboxPatch(corner, CELL, CELL, boxstyle=shape, facecolor=face, edgecolor="none"))

"""All figures of a report as PNG files. Only this module's parts import matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.comparison.layer_map import layer_map
from pipeline.comparison.loss_plots import held_out_loss, training_loss
from pipeline.comparison.run_artifacts import RunArtifacts
from pipeline.comparison.score_plots import scores_by_target, seconds_by_stage_plot
from pipeline.comparison.scores import Scores

LAYERS, SCORES, HELD_OUT, TRAINING, SECONDS = (
    f"{name}.png" for name in ("layers", "scores", "held_out_loss", "training_loss", "seconds")
)


def draw_all(runs: Sequence[RunArtifacts], scores: Scores, base_loss: float | None, out: Path) -> set[str]:
    """Draws what the runs have numbers for into ``out`` and returns the file names."""
    drawn = {
        LAYERS: layer_map(runs, out / LAYERS),
        SCORES: scores_by_target(runs, scores, out / SCORES),
        HELD_OUT: held_out_loss(runs, base_loss, out / HELD_OUT),
        TRAINING: training_loss(runs, out / TRAINING),
        SECONDS: seconds_by_stage_plot(runs, out / SECONDS),
    }
    return {name for name, there in drawn.items() if there}

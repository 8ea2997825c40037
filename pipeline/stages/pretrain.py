"""The pretrain stage: continual pre-training on the corpus, by default of the new layers only."""

from __future__ import annotations

from pipeline.artifacts.task import Metrics, StageTask
from pipeline.estimates.fitting import suggest_settings_that_fit
from pipeline.training.job import run_training


def run(task: StageTask) -> Metrics:
    """Writes the trained model, ``metrics.jsonl`` and ``training.json``. The parents are "model" and "data"."""
    with suggest_settings_that_fit(task):
        return run_training(task)

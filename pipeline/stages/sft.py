"""The sft stage: instruction tuning on conversations, with the loss on the assistant's tokens only."""

from __future__ import annotations

from pipeline.artifacts.task import Metrics, StageTask
from pipeline.estimates.fitting import suggest_settings_that_fit
from pipeline.training.job import run_training


def run(task: StageTask) -> Metrics:
    """Writes the tuned model, ``metrics.jsonl`` and ``training.json``. The parents are "model" and "data"."""
    with suggest_settings_that_fit(task):
        return run_training(task)

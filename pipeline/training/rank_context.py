"""What a training stage knows on one rank: its task, settings, device and precision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.artifacts.task import StageTask
from pipeline.config import Train
from pipeline.training.job import CHECKPOINTS
from pipeline.training.precision import Precision


@dataclass(frozen=True)
class RankContext:
    """One stage on one rank: what is to be done, where, and in which number format."""

    task: StageTask
    settings: Train
    log_dir: Path
    device: torch.device
    precision: Precision
    rank: int
    ranks: int

    @property
    def model_dir(self) -> Path:
        """The model to train."""
        return self.task.parents["model"]

    @property
    def data_dir(self) -> Path:
        """The token blocks to train on."""
        return self.task.parents["data"]

    @property
    def checkpoints(self) -> Path:
        """Where the state goes while training lasts."""
        return self.task.out / CHECKPOINTS

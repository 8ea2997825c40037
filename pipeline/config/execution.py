"""Settings that change where and how visibly a run goes, never its numbers."""

from __future__ import annotations

from typing import Literal

from pipeline.config.section import Positive, Section


class Tracking(Section):
    """Weights & Biases; a JSONL beside the artifact is always written."""

    wandb: Literal["offline", "online", "disabled"]
    project: str
    entity: str | None


class Launch(Section):
    """Where workers run. Never changes numbers."""

    device: Literal["auto", "cpu", "cuda"]
    processes: Positive | Literal["auto"]  # worker processes on this node; auto: one a GPU, else one
    threads: Positive | Literal["auto"]  # CPU threads a process; auto: cores / processes

"""Settings that change where and how visibly a run goes, never its numbers."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from pipeline.config.devices import DEVICES
from pipeline.config.section import Fraction, Positive, Section


class Tracking(Section):
    """Weights & Biases; a JSONL beside the artifact is always written."""

    wandb: Literal["offline", "online", "disabled"]
    project: str
    entity: str | None


class Launch(Section):
    """Where workers run. Never changes numbers."""

    device: str  # auto | cpu | cuda, or a GPU of DEVICES, which means cuda and lets action=plan say what fits
    processes: Positive | Literal["auto"]  # worker processes on this node; auto: one a GPU, else one
    nodes: Positive  # machines, for action=plan; a run takes those that it stands on
    threads: Positive | Literal["auto"]  # CPU threads a process; auto: cores / processes
    utilization: Fraction  # of the device's peak that training reaches (MFU); action=plan's hours follow from it

    @field_validator("device")
    @classmethod
    def _is_known(cls, device: str) -> str:
        if device not in ("auto", "cpu", "cuda", *DEVICES):
            raise ValueError(f"devices are auto, cpu, cuda, {', '.join(DEVICES)}")
        return device

    @property
    def kind(self) -> Literal["auto", "cpu", "cuda"]:
        """The device without its name."""
        return "cuda" if self.device in DEVICES else self.device  # type: ignore[return-value]  # validated above

"""GPUs that ``launch.device`` can name: what fits on them, and how fast they can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.section import Fraction, NonNegative, Positive, Section


@dataclass(frozen=True)
class Device:
    """One kind of GPU."""

    memory_gib: float  # as torch.cuda.get_device_properties reports it, rounded down
    bfloat16_tflops: float  # peak of dense matrix products that accumulate in float32


# Peaks are the makers' own, without sparsity: the data sheets of H100, H200, A100, B200 (HGX), L40S, L4 and A10,
# Ada's and Ampere's GA102 white papers (appendix A) for the RTX cards.
DEVICES: dict[str, Device] = {
    "b200_180gb": Device(178.0, 2250.0),
    "h200_141gb": Device(139.0, 989.4),
    "h100_80gb": Device(79.0, 989.4),
    "h100_pcie_80gb": Device(79.0, 756.0),
    "a100_80gb": Device(79.0, 312.0),
    "a100_40gb": Device(39.0, 312.0),
    "l40s_48gb": Device(44.0, 362.1),
    "l4_24gb": Device(21.9, 121.0),
    "a10_24gb": Device(21.9, 125.0),
    "rtx4090_24gb": Device(23.5, 165.2),
    "rtx3090_24gb": Device(23.5, 71.0),
}


# --------------------------------------------------------------------------------------------------
# Settings that change where and how visibly a run goes, never its numbers.


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


SlurmTime = Annotated[
    str, Field(pattern=r"^(\d+-)?\d+(:\d\d){0,2}$")
]  # hours:minutes:seconds; days-hours; minutes:seconds


class Resources(Section):
    """What one stage asks of Slurm."""

    partition: str | None  # null: slurm.partition
    nodes: Positive  # more than one for pretrain and sft only: the other stages use one process
    gpus: NonNegative  # a node
    cpus: Positive  # a node
    memory: str | None  # a node, such as 64G; "0": all of it; null: the cluster's default
    time: Positive | SlurmTime  # a whole number: minutes
    options: list[str]  # more of sbatch's own, such as --constraint=h100


class Slurm(Section):
    """How stages become batch jobs."""

    partition: str | None  # null: the cluster's default; likewise below
    account: str | None
    qos: str | None
    environment: list[str]  # shell lines before the command, such as "module load cuda"
    options: list[str]  # more of sbatch's own, for every job
    signal_seconds: Positive  # ahead of the time limit, to finish a step and save
    max_requeues_without_progress: NonNegative
    load: Resources
    expand: Resources
    tokenize: Resources
    pretrain: Resources
    sft: Resources
    evaluate: Resources
    report: Resources

    @model_validator(mode="after")
    def _only_training_uses_many_nodes(self) -> Slurm:
        for stage in ("load", "expand", "tokenize", "evaluate", "report"):
            if self.resources(stage).nodes > 1:
                raise ValueError(f"{stage}.nodes must be 1: only pretrain and sft run on several nodes")
        return self

    def resources(self, stage: str) -> Resources:
        """One stage's part."""
        resources: Resources = getattr(self, stage)
        return resources

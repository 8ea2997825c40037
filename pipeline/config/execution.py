"""Settings that decide where a run happens and what is reported about it, but never change its numbers.

They are ``tracking``, ``launch`` and ``slurm``, together with the table of GPUs that ``launch.device`` can name.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from pipeline.config.section import Fraction, Line, NonNegative, Positive, Section


@dataclass(frozen=True)
class Gpu:
    """A GPU model.

    Attributes:
        model: the words that distinguish it in the name that ``torch.cuda.get_device_name`` returns.
        memory_gib: total memory as ``torch.cuda.get_device_properties`` reports it, rounded down.
        bfloat16_tflops: peak of dense matrix products with float32 accumulation.
        float32_tflops: peak of the float32 units. Training in float32 leaves TF32 off, as PyTorch does by default.
    """

    model: str
    memory_gib: float
    bfloat16_tflops: float
    float32_tflops: float

    def tflops(self, precision: Literal["bfloat16", "float32"]) -> float:
        """The peak of matrix products in a precision of compute."""
        return self.bfloat16_tflops if precision == "bfloat16" else self.float32_tflops


# Peaks are NVIDIA's own figures without sparsity: the data sheets of H100, H200, GH200, A100, B200 (HGX), L40S, L4 and
# A10, and the Ada and Ampere GA102 white papers (appendix A) for the RTX cards. The float32 peak of the B200 is that of
# the Blackwell architecture brief (HGX).
GPUS: dict[str, Gpu] = {
    "b200_180gb": Gpu("B200", 178.0, 2250.0, 80.0),
    "h200_141gb": Gpu("H200", 139.0, 989.4, 67.0),
    "h200_nvl_141gb": Gpu("H200 NVL", 139.0, 835.5, 60.0),
    "gh200_96gb": Gpu("GH200", 94.0, 989.4, 67.0),
    "h100_80gb": Gpu("H100", 79.0, 989.4, 66.9),
    "h100_nvl_94gb": Gpu("H100 NVL", 93.0, 835.5, 60.0),
    "h100_pcie_80gb": Gpu("H100 PCIe", 79.0, 756.5, 51.2),
    "a100_80gb": Gpu("A100", 79.0, 312.0, 19.5),
    "a100_40gb": Gpu("A100", 39.0, 312.0, 19.5),
    "l40s_48gb": Gpu("L40S", 44.0, 362.05, 91.6),
    "l4_24gb": Gpu("L4", 21.9, 121.0, 30.3),
    "a10_24gb": Gpu("A10", 21.9, 125.0, 31.2),
    "rtx4090_24gb": Gpu("RTX 4090", 23.5, 165.2, 82.6),
    "rtx3090_24gb": Gpu("RTX 3090", 23.5, 71.0, 35.6),
}

# Words of a device name that leave the peak unchanged: vendor, form factor, and size and kind of memory. Any other
# word, such as Laptop, Ti, D or MIG, means another product or a part of one.
_NEUTRAL_WORD = re.compile(r"NVIDIA|Tesla|GeForce|SXM\d?|PCIe|\d+GB?|HBM\d\w?", re.IGNORECASE)


def bfloat16_peak(device_name: str) -> float | None:
    """Looks up a GPU's peak bfloat16 rate.

    Args:
        device_name: as ``torch.cuda.get_device_name`` returns it, such as ``NVIDIA A100-SXM4-80GB``.

    Returns:
        FLOP/s, or None for a device that is not in ``GPUS``.
    """
    words = re.split(r"[\s-]+", device_name.lower())
    # Longer models first, so that "NVIDIA H100 PCIe" is not taken for an "H100".
    for gpu in sorted(GPUS.values(), key=lambda gpu: -len(gpu.model)):
        model = gpu.model.lower().split()
        if set(model) <= set(words) and all(word in model or _NEUTRAL_WORD.fullmatch(word) for word in words):
            return gpu.bfloat16_tflops * 1e12
    return None


def _project(name: str) -> str:
    if found := sorted({*"/\\#?%:"} & {*name}):
        raise ValueError(f"names of W&B projects cannot contain {' '.join(found)}")
    return name


class Tracking(Section):
    """Logging to an experiment tracker. Metrics are always written to a JSONL file in the artifact as well."""

    backend: Literal["wandb", "tensorboard", "mlflow", "none"]
    log_model: bool  # upload the models with the report, instead of recording where they are
    notify: Line | None  # a command that is run with outcome and report path when a run has ended or failed
    wandb: Literal["offline", "online", "disabled"]  # WANDB_MODE and WANDB_DISABLED can change it
    project: Annotated[Line, Field(max_length=128), AfterValidator(_project)]  # W&B's project, MLflow's experiment
    entity: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None  # a user or team; null: W&B's default


class Launch(Section):
    """Where worker processes run. Never changes numbers."""

    device: str  # auto, cpu, cuda, or a name in GPUS: cuda, and the memory that training needs is checked
    processes: Positive | Literal["auto"]  # worker processes per node; auto: one per GPU, or one on CPUs
    nodes: Positive  # number of nodes, for action=plan; a run uses the nodes of its Slurm job
    threads: Positive | Literal["auto"]  # CPU threads per process; auto: cores / processes
    collective_timeout_seconds: Positive  # after which a rank that the others wait for is considered stuck
    wait_policy: Literal["passive", "active"]  # of idle CPU threads: sleep, or spin, which slows down other programs
    utilization: Fraction | Literal["auto"]  # share of the peak that training reaches, for the hours in action=plan

    @field_validator("device")
    @classmethod
    def _is_known(cls, device: str) -> str:
        if device not in ("auto", "cpu", "cuda", *GPUS):
            raise ValueError(f"devices are auto, cpu, cuda, {', '.join(GPUS)}")
        return device

    @property
    def kind(self) -> Literal["auto", "cpu", "cuda"]:
        """The kind of device, with the name of a GPU resolved to cuda."""
        return "cuda" if self.device in GPUS else self.device  # type: ignore[return-value]  # validated above


SlurmTime = Annotated[str, Field(pattern=r"^(\d+-)?\d+(:\d\d){0,2}$")]  # such as 04:00:00 or 1-12 (days-hours)


def _option(text: str) -> str:
    if not text.startswith("-"):
        raise ValueError("an option of sbatch begins with '-', such as --constraint=h100")
    return text


SbatchOption = Annotated[Line, AfterValidator(_option)]


class Resources(Section):
    """The resources of one stage's batch job."""

    partition: Line | None  # null: slurm.partition
    nodes: Positive  # more than one only for pretrain and sft
    gpus: NonNegative  # per node
    cpus: Positive  # per node
    memory: Line | None  # per node, such as 64G; "0": all of it; null: the cluster's default
    time: Positive | SlurmTime  # an integer is in minutes
    options: list[SbatchOption]  # further options of sbatch, such as --constraint=h100

    @property
    def time_seconds(self) -> float:
        """The time limit as Slurm reads it; infinite for 0, which is no limit."""
        days, dash, clock = str(self.time).rpartition("-")
        parts = [int(part) for part in clock.split(":")]
        # "10" and "10:30" begin with minutes, but with hours after days ("1-10").
        units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
        seconds = int(days or 0) * 86400 + sum(part * unit for part, unit in zip(parts, units, strict=False))
        return seconds or math.inf


class Slurm(Section):
    """How stages are submitted as batch jobs."""

    partition: Line | None  # null: the cluster's default; likewise account and qos
    account: Line | None
    qos: Line | None
    environment: list[Line]  # shell commands to run first, such as "module load cuda"
    options: list[SbatchOption]  # further options of sbatch for every job
    signal_seconds: Positive  # how long before the time limit the run is asked to save and stop; limits are longer
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
        """Returns the resources of one stage."""
        resources: Resources = getattr(self, stage)
        return resources

    @property
    def least_time_seconds(self) -> int:
        """What a time limit must exceed, so that the signal comes after the start: Slurm may send it a minute early."""
        return self.signal_seconds + 60

    def has_time_to_start(self, stage: str) -> bool:
        """Whether a stage's time limit is long enough, see ``least_time_seconds``."""
        return self.resources(stage).time_seconds > self.least_time_seconds

"""Estimates of what a run needs, from shapes and settings alone: parameters, FLOPs, memory and disk. No torch."""

from pipeline.estimates.disk import Disk, TrainingOutputs, disk_of
from pipeline.estimates.fitting import largest_micro_batch, setup_of, usable, what_fits, when_out_of_memory
from pipeline.estimates.memory import Memory, Setup, memory_of
from pipeline.estimates.sizes import Sizes, Trained, sizes_of, trained_part
from pipeline.estimates.stopping import stop_seconds, write_seconds
from pipeline.estimates.utilization import utilization_of

__all__ = [
    "Disk", "Memory", "Setup", "Sizes", "Trained", "TrainingOutputs", "disk_of", "largest_micro_batch",
    "memory_of", "setup_of", "sizes_of", "stop_seconds", "trained_part", "usable", "utilization_of",
    "what_fits", "when_out_of_memory", "write_seconds",
]  # fmt: skip

"""What a run will need, from shapes and settings alone: parameters, operations, memory, disk, hours. No torch."""

from pipeline.estimate.disk import Disk, Kept, disk_of, lesa_scratch
from pipeline.estimate.fitting import largest_micro_batch, ranks, setup_of, usable, what_fits, when_out_of_memory
from pipeline.estimate.memory import Memory, Setup, memory_of
from pipeline.estimate.sizes import Sizes, sizes_of
from pipeline.estimate.trained import Trained, trained_part

__all__ = [
    "Disk", "Kept", "Memory", "Setup", "Sizes", "Trained", "disk_of", "largest_micro_batch", "lesa_scratch",
    "memory_of", "ranks", "setup_of", "sizes_of", "trained_part", "usable", "what_fits", "when_out_of_memory",
]  # fmt: skip

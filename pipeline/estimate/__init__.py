"""What a run will need, from shapes and settings alone: parameters, operations, memory, disk, hours. No torch."""

from pipeline.estimate.disk import Disk, Kept, disk_of, lesa_scratch
from pipeline.estimate.memory import Memory, Setup, memory_of
from pipeline.estimate.trained import Trained, trained_part

__all__ = ["Disk", "Kept", "Memory", "Setup", "Trained", "disk_of", "lesa_scratch", "memory_of", "trained_part"]

"""Out of memory, said in one sentence; the driver adds the settings that would fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.errors import TrainingFailure
from pipeline.launch.failure import OUT_OF_MEMORY

CPU_ALLOCATOR = "DefaultCPUAllocator"  # torch raises a plain RuntimeError for the host's memory


@contextmanager
def named_when_out_of_memory() -> Iterator[None]:
    """Turns torch's and Python's own errors into one.

    Raises:
        TrainingFailure: instead of them.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and CPU_ALLOCATOR not in str(error):
            raise
        said = str(error).strip().partition("\n")[0]
        raise TrainingFailure(f"{OUT_OF_MEMORY}: {said}") from error

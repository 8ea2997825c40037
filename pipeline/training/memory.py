"""Out of memory, said with the settings that need less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.config import Train
from pipeline.errors import NamedFailure
from pipeline.training.validate import less_memory

CPU_ALLOCATOR = "DefaultCPUAllocator"  # torch raises a plain RuntimeError for the host's memory


class OutOfMemoryFailure(NamedFailure):
    """A GPU or the host had no more memory to give."""


@contextmanager
def named_when_out_of_memory(section: str, train: Train, ranks: int) -> Iterator[None]:
    """Turns torch's and Python's own errors into one message that names what to change.

    Raises:
        OutOfMemoryFailure: instead of them.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and CPU_ALLOCATOR not in str(error):
            raise
        said = str(error).strip().partition("\n")[0]
        raise OutOfMemoryFailure(f"out of memory: {said}. {less_memory(section, train, ranks)}") from error

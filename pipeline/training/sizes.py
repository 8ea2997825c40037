"""Sizes of the engine's that memory and disk follow from. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Precision = Literal["bfloat16", "float32"]

BYTES: dict[Precision, int] = {"bfloat16": 2, "float32": 4}
CHUNK_LOGITS = 2**24  # elements of logits alive at once: 64 MiB in float32
CHECKPOINT_BYTES = 12  # a trained parameter: float32 master weight and two moments


# --------------------------------------------------------------------------------------------------
# What this processor can do, without torch.

BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """What Linux says the processor can do; empty on other systems."""
    if not cpuinfo.is_file():
        return set()
    flags = (line for line in cpuinfo.read_text().splitlines() if line.startswith("flags"))
    return set(next(flags, "").partition(":")[2].split())

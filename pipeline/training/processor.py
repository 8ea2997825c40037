"""What this processor can do, without torch."""

from __future__ import annotations

from pathlib import Path

BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """What Linux says the processor can do; empty on other systems."""
    if not cpuinfo.is_file():
        return set()
    flags = (line for line in cpuinfo.read_text().splitlines() if line.startswith("flags"))
    return set(next(flags, "").partition(":")[2].split())

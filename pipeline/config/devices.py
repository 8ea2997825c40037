"""GPUs that ``launch.device`` can name: what fits on them, and how fast they can be."""

from __future__ import annotations

from dataclasses import dataclass


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

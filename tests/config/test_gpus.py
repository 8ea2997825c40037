"""The table of GPUs, looked up by the names that ``torch.cuda.get_device_name`` reports."""

import pytest

from pipeline.config.execution import GPUS, bfloat16_peak


@pytest.mark.parametrize(
    "device_name, gpu",
    [
        ("NVIDIA B200", "b200_180gb"),
        ("NVIDIA H200", "h200_141gb"),
        ("NVIDIA H200 NVL", "h200_nvl_141gb"),
        ("NVIDIA GH200 480GB", "gh200_96gb"),
        ("NVIDIA H100 80GB HBM3", "h100_80gb"),
        ("NVIDIA H100 80GB HBM3e", "h100_80gb"),
        ("NVIDIA H100 PCIe", "h100_pcie_80gb"),
        ("NVIDIA H100 NVL", "h100_nvl_94gb"),
        ("NVIDIA A100-SXM4-80GB", "a100_80gb"),
        ("A100-SXM4-40GB", "a100_40gb"),
        ("NVIDIA A100-PCIE-40GB", "a100_40gb"),
        ("NVIDIA A100 80GB PCIe", "a100_80gb"),
        ("NVIDIA L40S", "l40s_48gb"),
        ("NVIDIA L4", "l4_24gb"),
        ("NVIDIA A10", "a10_24gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090_24gb"),
        ("NVIDIA GeForce RTX 3090", "rtx3090_24gb"),
    ],
)
def test_the_peak_of_a_known_device(device_name: str, gpu: str) -> None:
    assert bfloat16_peak(device_name) == GPUS[gpu].bfloat16_tflops * 1e12


def test_float32_products_are_slower_on_every_device() -> None:
    for gpu in GPUS.values():
        assert gpu.tflops("bfloat16") == gpu.bfloat16_tflops > gpu.tflops("float32") == gpu.float32_tflops > 0


@pytest.mark.parametrize(
    "device_name",
    [
        "NVIDIA RTX A1000 Laptop GPU",
        "NVIDIA RTX A1000",
        "NVIDIA A100X",
        "NVIDIA A10G",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "GRID A100-40C",
        "NVIDIA L40",
        "NVIDIA RTX 4000 Ada Generation",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "Tesla V100-SXM2-16GB",
        "NVIDIA Unheard Of",
    ],
)
def test_no_peak_for_a_device_that_only_resembles_a_known_one(device_name: str) -> None:
    assert bfloat16_peak(device_name) is None

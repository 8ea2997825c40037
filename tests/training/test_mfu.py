import pytest
import torch

from pipeline.training.mfu import memory_in_use, sheet_rate


@pytest.mark.parametrize(
    "name, rate",
    [("NVIDIA H200", 989.4e12), ("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H100 PCIe", 756.5e12),
     ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA Unheard Of", None)],
)  # fmt: skip
def test_the_data_sheet_is_found_by_the_devices_name(name: str, rate: float | None):
    assert sheet_rate(name, "bfloat16") == rate


def test_the_sheet_says_nothing_of_float32():
    assert sheet_rate("NVIDIA H200", "float32") is None


def test_memory_in_use_grows_with_what_is_held():
    before = memory_in_use(torch.device("cpu"))
    held = torch.ones(2**24)
    assert memory_in_use(torch.device("cpu")) - before > 0.9 * held.nbytes

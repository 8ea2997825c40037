import mmap
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from pipeline.training import mfu
from pipeline.training.batches import TokenIndices
from pipeline.training.freeze import freeze_others
from pipeline.training.loss import SummedLoss
from tests.tiny_families import tiny_model

BATCH, LENGTH = 2, 24


@pytest.mark.parametrize(
    "name, rate",
    [("NVIDIA H200", 989.4e12), ("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H100 PCIe", 756.5e12),
     ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA Unheard Of", None)],
)  # fmt: skip
def test_data_sheet_peaks_are_found_by_device_name(name: str, rate: float | None):
    assert mfu.data_sheet_rate(name, "bfloat16") == rate


def test_the_data_sheet_has_no_peak_for_float32():
    assert mfu.data_sheet_rate("NVIDIA H200", "float32") is None


def test_the_measured_rate_is_plausible():
    assert mfu.matrix_rate(torch.float32, torch.device("cpu"), size=64) > 1e6


def test_memory_in_use_grows_with_an_allocation():
    before = mfu.memory_in_use(torch.device("cpu"))
    held = torch.frombuffer(mmap.mmap(-1, 2**26), dtype=torch.float32).fill_(1.0)  # not from malloc's free memory
    assert mfu.memory_in_use(torch.device("cpu")) - before > 0.9 * held.nbytes


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_flops_count_the_experts_that_a_token_is_routed_to(family: str):
    model = tiny_model(family).train()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    ids, positions = torch.randint(0, 384, (BATCH, LENGTH)), torch.arange(LENGTH).expand(BATCH, LENGTH)
    with FlopCounterMode(display=False) as counter:
        SummedLoss(model)(ids, positions, TokenIndices.of(ids, positions, positions > 0)).backward()
    with FlopCounterMode(display=False) as angles:
        model.base_model.rotary_emb(torch.zeros(BATCH, 1), positions)
    expected = counter.get_total_flops() - angles.get_total_flops()
    assert mfu.training_flops(model, LENGTH).of_tokens(BATCH * LENGTH, BATCH * (LENGTH - 1)) == expected


@pytest.mark.parametrize(
    "trained",
    [("layers.2.", "layers.3."), ("layers.1.",), ("layers.",), ("layers.", "embed_tokens", ".norm."), (".norm.",)],
    ids=["top", "inner", "layers", "all", "final_norm"],
)
def test_flops_equal_those_of_the_counter_of_torch(tiny_llama_dir: Path, trained: tuple[str, ...]):
    """Uses eager attention: it consists of plain matrix products, while the backward pass of sdpa recomputes some."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32, attn_implementation="eager")
    freeze_others(model, {name for name, _ in model.named_parameters() if any(part in name for part in trained)})
    ids = torch.randint(0, 384, (BATCH, LENGTH))
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    mask = (positions > 0) & (torch.rand(BATCH, LENGTH) < 0.7)
    with FlopCounterMode(display=False) as counter:
        SummedLoss(model)(ids, positions, TokenIndices.of(ids, positions, mask)).backward()
    with FlopCounterMode(display=False) as angles:  # rotary angles are computed by a matrix product
        model.base_model.rotary_emb(torch.zeros(BATCH, 1), positions)
    expected = counter.get_total_flops() - angles.get_total_flops()
    ours = mfu.training_flops(model, LENGTH).of_tokens(BATCH * LENGTH, int(mask.sum()))
    assert ours == expected

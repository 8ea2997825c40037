import json
import mmap
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from pipeline.estimates import trained_part
from pipeline.models.families import shape_of
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


LATENT = {
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "head_dim": 8, "v_head_dim": 16, "q_lora_rank": 24,
    "kv_lora_rank": 12, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 12, "first_k_dense_replace": 1,
}  # fmt: skip


@pytest.mark.parametrize("family, changes", [("qwen2_moe", {}), ("gpt_oss", {}), ("deepseek_v3", LATENT)])
def test_flops_count_experts_that_a_token_is_routed_to_and_latent_attention(family: str, changes: dict[str, object]):
    model = tiny_model(family, **changes).train()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    ids, positions = torch.randint(0, 384, (BATCH, LENGTH)), torch.arange(LENGTH).expand(BATCH, LENGTH)
    with FlopCounterMode(display=False) as counter:
        SummedLoss(model)(ids, positions, TokenIndices.of(ids, positions, positions > 0)).backward()
    with FlopCounterMode(display=False) as angles:
        model.base_model.rotary_emb(torch.zeros(BATCH, 1), positions)
    expected = counter.get_total_flops() - angles.get_total_flops()
    counted = mfu.training_flops(model, LENGTH)
    assert counted.of_tokens(BATCH * LENGTH, BATCH * (LENGTH - 1)) == expected
    shape = shape_of(json.loads(model.config.to_json_string(use_diff=False)))
    assert trained_part("pretrain", "all", shape, {}).flops(LENGTH) == counted


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

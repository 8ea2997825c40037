from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from pipeline.training.freeze import freeze_others
from pipeline.training.loss import SummedLoss
from pipeline.training.mfu import training_flops

BATCH, LENGTH = 2, 24


@pytest.mark.parametrize(
    "trained",
    [("layers.2.", "layers.3."), ("layers.1.",), ("layers.",), ("layers.", "embed_tokens", ".norm."), (".norm.",)],
    ids=["top", "inner", "layers", "all", "final_norm"],
)
def test_equals_torchs_counter(tiny_llama_dir: Path, trained: tuple[str, ...]):
    """Eager attention is plain matrix products, all of which the counter sees; sdpa's backward recomputes some."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32, attn_implementation="eager")
    freeze_others(model, {name for name, _ in model.named_parameters() if any(part in name for part in trained)})
    ids = torch.randint(0, 384, (BATCH, LENGTH))
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    mask = (positions > 0) & (torch.rand(BATCH, LENGTH) < 0.7)
    with FlopCounterMode(display=False) as counter:
        SummedLoss(model)(ids, positions, mask).backward()
    with FlopCounterMode(display=False) as angles:  # rotary angles are made by a matrix product
        model.base_model.rotary_emb(torch.zeros(BATCH, 1), positions)
    expected = counter.get_total_flops() - angles.get_total_flops()
    ours = training_flops(model, LENGTH).of_tokens(BATCH * LENGTH, int(mask.sum()))
    assert ours == expected

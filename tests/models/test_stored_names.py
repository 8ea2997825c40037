"""What was trained in memory goes back under the names it was stored with, in every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.models.reading import export_with_replaced
from tests.tiny_families import FAMILIES, save_tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_every_trained_parameter_finds_its_way_back(family: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    base, out = save_tiny(family, tmp_path / "base", tiny_tokenizer), tmp_path / "out"
    out.mkdir()
    model = AutoModelForCausalLM.from_pretrained(base)
    trained = {name: p.detach() + 1 for name, p in model.named_parameters() if "layers.1." in name}
    export_with_replaced(base, out, trained)
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(after) == set(before)
    assert all(torch.equal(after[name], tensor + ("layers.1." in name)) for name, tensor in before.items())
    again = AutoModelForCausalLM.from_pretrained(out)
    assert all(torch.equal(again.get_parameter(name), tensor) for name, tensor in trained.items())


def test_a_head_under_another_name(tiny_tokenizer: Any, tmp_path: Path) -> None:
    base, out = save_tiny("gpt_neox", tmp_path / "base", tiny_tokenizer), tmp_path / "out"
    out.mkdir()
    export_with_replaced(base, out, {"lm_head.weight": torch.ones(384, 16)})
    assert load_file(out / "model.safetensors")["embed_out.weight"].eq(1).all()

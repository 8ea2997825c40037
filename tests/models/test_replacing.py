"""Exports replace the given tensors and nothing else, and write trained parameters as their family stores them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.files import write_json
from pipeline.models.reading import ModelDirectory
from pipeline.models.replacing import write_with_replaced
from pipeline.models.stored_parameters import StoredParameters
from tests.tiny_families import TINY_CONFIGS, save_tiny


def test_export_differs_only_in_the_replaced_tensors(tiny_llama_dir: Path, tmp_path: Path) -> None:
    base, out = Path(shutil.copytree(tiny_llama_dir, tmp_path / "base")), tmp_path / "out"
    write_json(base / "expansion.json", {"method": "copy"})
    out.mkdir()
    name = "model.layers.2.mlp.up_proj.weight"
    replacement = torch.randn(64, 32, dtype=torch.float64, requires_grad=True)
    write_with_replaced(base, out, {name: replacement})
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(before) == set(after)
    assert after[name].dtype == before[name].dtype
    assert torch.equal(after.pop(name), replacement.detach().float())
    assert all(torch.equal(tensor, before[other]) for other, tensor in after.items())
    assert {path.name for path in out.iterdir()} == {path.name for path in base.iterdir()}
    unchanged = [path.name for path in base.iterdir() if path.suffix != ".safetensors"]
    assert all((out / other).read_bytes() == (base / other).read_bytes() for other in unchanged)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(model.get_parameter(name), replacement.detach().float())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [({"lm_head.weight": torch.ones(384, 32)}, "no tensor lm_head"), ({"model.norm.weight": torch.ones(3)}, "shape")],
    ids=["a tied head", "another shape"],
)
def test_tensors_that_the_base_does_not_have_are_rejected(
    tiny_llama_dir: Path, tmp_path: Path, tensors: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_with_replaced(tiny_llama_dir, tmp_path, tensors)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_parameters_are_read_as_transformers_loads_them_and_written_under_their_stored_names(
    family: str, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    base, out = save_tiny(family, tmp_path / "base", tiny_tokenizer), tmp_path / "out"
    out.mkdir()
    model = AutoModelForCausalLM.from_pretrained(base)
    stored = StoredParameters(ModelDirectory(base))
    assert all(torch.equal(stored.read(name), parameter) for name, parameter in model.named_parameters())
    trained = {name: p.detach() + 1 for name, p in model.named_parameters() if "layers.1." in name}
    write_with_replaced(base, out, trained)
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(after) == set(before)
    assert all(torch.equal(after[name], tensor + ("layers.1." in name)) for name, tensor in before.items())
    again = AutoModelForCausalLM.from_pretrained(out)
    assert all(torch.equal(again.get_parameter(name), tensor) for name, tensor in trained.items())


def test_parts_of_several_dtypes_are_read_in_the_widest_and_written_in_their_own(
    tiny_tokenizer: Any, tmp_path: Path
) -> None:
    base, out = save_tiny("qwen3_moe", tmp_path / "base", tiny_tokenizer), tmp_path / "out"
    out.mkdir()
    weights = load_file(base / "model.safetensors")
    narrow = "model.layers.1.mlp.experts.2.down_proj.weight"
    weights[narrow] = weights[narrow].bfloat16()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    parameter = "model.layers.1.mlp.experts.down_proj"
    value = StoredParameters(ModelDirectory(base)).read(parameter)
    assert value.dtype == torch.float32 and torch.equal(value[2], weights[narrow].float())
    write_with_replaced(base, out, {parameter: value + 1})
    after = load_file(out / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in after.items()} == {n: t.dtype for n, t in weights.items()}
    assert torch.equal(after[narrow], (weights[narrow].float() + 1).bfloat16())


def test_a_head_is_written_under_the_name_it_is_stored_with(tiny_tokenizer: Any, tmp_path: Path) -> None:
    base, out = save_tiny("gpt_neox", tmp_path / "base", tiny_tokenizer), tmp_path / "out"
    out.mkdir()
    write_with_replaced(base, out, {"lm_head.weight": torch.ones(384, 16)})
    assert load_file(out / "model.safetensors")["embed_out.weight"].eq(1).all()


def test_importing_the_export_does_not_import_transformers() -> None:
    program = "import sys, pipeline.models.replacing; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

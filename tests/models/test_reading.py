"""Model directories read one tensor at a time, and what is carried over from one to the next."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.models.reading import ModelDirectory, copy_side_files, export_with_replaced


def test_packed_weights_are_refused(tmp_path: Path) -> None:
    save_file({"packed": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", {})
    with pytest.raises(UserError, match="F8_E4M3.*before quantisation"):
        ModelDirectory(tmp_path)


def test_side_files_are_copied_byte_for_byte(tiny_llama_dir: Path, tmp_path: Path) -> None:
    copy_side_files(tiny_llama_dir, tmp_path)
    copied = {path.name for path in tmp_path.iterdir()}
    assert copied == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert all((tmp_path / name).read_bytes() == (tiny_llama_dir / name).read_bytes() for name in copied)


def test_an_export_differs_in_the_replaced_tensors_only(tiny_llama_dir: Path, tmp_path: Path) -> None:
    base, out = Path(shutil.copytree(tiny_llama_dir, tmp_path / "base")), tmp_path / "out"
    write_json(base / "expansion.json", {"method": "copy"})
    out.mkdir()
    name = "model.layers.2.mlp.up_proj.weight"
    replacement = torch.randn(64, 32, dtype=torch.float64, requires_grad=True)
    export_with_replaced(base, out, {name: replacement})
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
    ("tensors", "says"),
    [({"lm_head.weight": torch.ones(384, 32)}, "no tensor lm_head"), ({"model.norm.weight": torch.ones(3)}, "shape")],
    ids=["a tied head", "another shape"],
)
def test_an_export_of_what_the_base_does_not_have(
    tiny_llama_dir: Path, tmp_path: Path, tensors: dict[str, Tensor], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        export_with_replaced(tiny_llama_dir, tmp_path, tensors)
    assert not list(tmp_path.iterdir())

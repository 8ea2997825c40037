"""Model directories read and written one tensor at a time."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.artifact import write_json
from pipeline.errors import UserError
from pipeline.model_dir import ModelDirectory, ShardWriter, TensorSpec, copy_side_files, export_with_replaced

TENSORS = {
    "matrix": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "rounded": torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "half": torch.tensor([1e-7, -0.0, 65504.0], dtype=torch.float16),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "counts": torch.tensor([1, -2, 3]),
    "mask": torch.tensor([True, False]),
}


def _specs(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _write(directory: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int = 10**9) -> None:
    with ShardWriter(directory, _specs(tensors), max_shard_bytes) as writer:
        for name in reversed(list(tensors)):
            writer.write(name, tensors[name])
    write_json(directory / "config.json", {})


def test_one_file_is_what_the_library_reads(tmp_path: Path) -> None:
    _write(tmp_path, TENSORS)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json"}
    read = load_file(tmp_path / "model.safetensors")
    assert set(read) == set(TENSORS)
    assert all(read[name].dtype == tensor.dtype and torch.equal(read[name], tensor) for name, tensor in TENSORS.items())


def test_many_files_hold_no_more_than_they_may_and_read_as_one(tmp_path: Path) -> None:
    tensors = {f"tensor_{index}": torch.full((10,), float(index)) for index in range(7)}  # 40 bytes each
    _write(tmp_path, tensors, max_shard_bytes=100)
    names = sorted(path.name for path in tmp_path.glob("model*"))
    assert names == [*(f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)), "model.safetensors.index.json"]
    assert [len(load_file(tmp_path / name)) for name in names[:4]] == [2, 2, 2, 1]
    model = ModelDirectory(tmp_path)
    assert model.specs == _specs(tensors)
    assert all(torch.equal(model.read(name), tensor) for name, tensor in tensors.items())


def test_views_are_written_as_what_they_show(tmp_path: Path) -> None:
    matrix = torch.arange(6.0).reshape(2, 3).T
    _write(tmp_path, {"view": matrix})
    assert torch.equal(load_file(tmp_path / "model.safetensors")["view"], matrix)


def test_files_get_their_names_only_when_all_is_written(tmp_path: Path) -> None:
    specs = _specs({"a": torch.ones(1), "b": torch.ones(1)})
    with pytest.raises(AssertionError, match="not written: b"), ShardWriter(tmp_path, specs) as writer:
        writer.write("a", torch.ones(1))
    assert not list(tmp_path.glob("model*"))


def test_what_an_earlier_attempt_left_is_removed(tmp_path: Path) -> None:
    _write(tmp_path, {f"old_{index}": torch.ones(10) for index in range(4)}, max_shard_bytes=50)
    (tmp_path / ".model-7.partial").write_bytes(b"half")
    _write(tmp_path, {"new": torch.ones(1)})
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json"}


@pytest.mark.parametrize("wrong", [torch.ones(3), torch.ones(2).double()], ids=["shape", "dtype"])
def test_a_tensor_that_is_not_as_announced(tmp_path: Path, wrong: Tensor) -> None:
    writer = ShardWriter(tmp_path, _specs({"a": torch.ones(2)}))
    with pytest.raises(AssertionError, match="not as announced"):
        writer.write("a", wrong)


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

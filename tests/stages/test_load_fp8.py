"""Checkpoints in FP8 become unquantized models: every block of a matrix is multiplied by its scale."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.__main__ import compose_jobs
from pipeline.errors import UserError
from pipeline.planning import prepare
from pipeline.planning.checks import find_blockers
from pipeline.stages import load
from tests.plain_settings import model_at
from tests.stages.one_task import make_task
from tests.tiny_families import save_tiny

LARGEST = torch.finfo(torch.float8_e4m3fn).max
BLOCK = (10, 6)  # divides none of the sizes, so that the last blocks are smaller
NAME = "model.layers.1.self_attn.o_proj.weight"


def _blocks(matrix: Tensor, block: tuple[int, int]) -> list[tuple[int, int, Tensor]]:
    rows, columns = (range(0, size, step) for size, step in zip(matrix.shape, block, strict=True))
    return [
        (i // block[0], j // block[1], matrix[i : i + block[0], j : j + block[1]]) for i, j in product(rows, columns)
    ]


def _quantize(matrix: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what is stored, the scales, and their products, block by block."""
    stored, exact = torch.empty_like(matrix, dtype=torch.float8_e4m3fn), torch.empty_like(matrix)
    scales = torch.empty(-(-matrix.shape[0] // block[0]), -(-matrix.shape[1] // block[1]))
    triples = zip(_blocks(matrix, block), _blocks(stored, block), _blocks(exact, block), strict=True)
    for (i, j, values), (_, _, small), (_, _, product_) in triples:
        scales[i, j] = values.abs().max() / LARGEST
        small.copy_(values / scales[i, j])
        product_.copy_(small.float() * scales[i, j])
    return stored, scales, exact


@pytest.fixture(scope="module", params=["qwen3", "qwen3_moe"])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    return save_tiny(request.param, tmp_path_factory.mktemp(request.param), tiny_tokenizer)


Quantized = tuple[Path, dict[str, Tensor]]


@pytest.fixture
def quantized(plain: Path, tmp_path: Path) -> Quantized:
    """A checkpoint in FP8, and what its tensors are."""
    return _write(plain, tmp_path / "fp8", BLOCK)


def _write(plain: Path, directory: Path, block: tuple[int, int] | None) -> Quantized:
    directory.mkdir()
    for file in plain.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    stored, exact = {}, load_file(plain / "model.safetensors")
    for name, tensor in exact.items():
        stored[name] = tensor
        if "proj" in name and tensor.ndim == 2:
            stored[name], scales, exact[name] = _quantize(tensor, block or (tensor.shape[0], tensor.shape[1]))
            stored[f"{name}_scale_inv"] = scales if block else scales.reshape(())
            if not block:
                stored[name.replace(".weight", ".activation_scale")] = torch.tensor(0.5)
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    size = None if block is None else list(block)
    _change_config(directory, quant_method="fp8", weight_block_size=size, activation_scheme="dynamic", fmt="e4m3")
    return directory, exact


def _change_config(directory: Path, **quantization: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


def _change_weights(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _load(model: Path, out: Path, **changes: object) -> dict[str, Any]:
    return load.run(make_task("load", model_at(model, dequantize=True, **changes), out))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_block_is_multiplied_by_its_scale(quantized: Quantized, tmp_path: Path, dtype: str) -> None:
    directory, exact = quantized
    metrics = _load(directory, tmp_path / "out", dtype=dtype)
    written, expected = load_file(tmp_path / "out" / "model.safetensors"), getattr(torch, dtype)
    assert written.keys() == exact.keys()
    assert all(torch.equal(tensor, exact[name].to(expected)) for name, tensor in written.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], "quantization_config" in config) == (dtype, False)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == expected
    assert all("float8" not in warning for warning in metrics.get("warnings", []))


def test_one_scale_for_a_complete_matrix(plain: Path, tmp_path: Path) -> None:
    directory, exact = _write(plain, tmp_path / "fp8", None)
    _load(directory, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == exact.keys()
    assert all(torch.equal(tensor, exact[name]) for name, tensor in written.items())


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda tensors: tensors.pop(f"{NAME}_scale_inv"), "its scales .* are missing"),
        (lambda tensors: tensors.update({f"{NAME}_scale_inv": torch.ones(1, 1)}), r"shape \[1, 1\], but must be"),
    ],
    ids=["missing", "shape"],
)
def test_wrong_scales_are_refused_by_plan_and_run(
    quantized: Quantized, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], fault: str
) -> None:
    directory, _ = quantized
    _change_weights(directory, change)
    with pytest.raises(UserError, match=f"{NAME}.*{fault}"):
        _load(directory, tmp_path / "out")
    assert any(NAME in fault for fault in _planned_faults(directory, tmp_path, "model.dequantize=true"))


def test_fp8_is_refused_with_the_remedy_unless_it_may_be_dequantized(quantized: Quantized, tmp_path: Path) -> None:
    directory, _ = quantized
    (fault,) = _planned_faults(directory, tmp_path)
    assert "model.dequantize = false" in fault and "Set model.dequantize=true" in fault
    with pytest.raises(UserError, match="Set model.dequantize=true"):
        load.run(make_task("load", model_at(directory), tmp_path / "out"))
    assert not _planned_faults(directory, tmp_path, "model.dequantize=true")


@pytest.mark.parametrize(
    ("quantization", "rule"),
    [
        ({"quant_method": "gptq"}, "FP8 with one scale per block"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "null or two positive integers"),
    ],
)
def test_other_quantization_is_refused(
    quantized: Quantized, tmp_path: Path, quantization: dict[str, object], rule: str
) -> None:
    directory, _ = quantized
    _change_config(directory, **quantization)
    with pytest.raises(UserError, match=rule):
        _load(directory, tmp_path / "out")


def test_fp8_without_a_quantization_config_is_refused(quantized: Quantized, tmp_path: Path) -> None:
    directory, _ = quantized
    _change_config(directory)
    with pytest.raises(UserError, match="packed dtype F8_E4M3"):
        _load(directory, tmp_path / "out")


def _planned_faults(model: Path, output_dir: Path, *arguments: str) -> list[str]:
    command = ["+experiment=quickstart", "model=hub", f"model.path={model}", *arguments, "stages=[load]"]
    job = compose_jobs([*command, f"output_dir={output_dir}", "action=plan"], False, None)[0]
    (prepared,) = prepare([job.settings])
    return [str(blocker.fault) for blocker in find_blockers(prepared)]

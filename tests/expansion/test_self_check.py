"""A correct model passes, and each kind of fault is found and named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.expansion import self_check
from pipeline.expansion.self_check import CheckFailedError, check_model
from pipeline.models.cache_check import CACHE_TOLERANCE
from pipeline.models.layer_config import explicit_config
from tests.family_coverage import tiny_model
from tests.tiny_families import TINY_CONFIGS, save_tiny

WHOLE, LAYER_BY_LAYER = 10**9, 0  # bytes of memory that the check may use


@pytest.fixture
def model(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A copy that a test may corrupt."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


def _config(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


def _change(directory: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("memory", [WHOLE, LAYER_BY_LAYER])
def test_a_correct_model_has_its_own_logits(tiny_llama_dir: Path, memory: int) -> None:
    outcome = check_model(tiny_llama_dir, _config(tiny_llama_dir), same_logits_as=tiny_llama_dir, memory=memory)
    assert outcome.logit_difference == 0.0
    assert outcome.cache_difference < 1e-5


def test_logits_are_not_compared_without_a_reference(tiny_llama_dir: Path) -> None:
    outcome = check_model(tiny_llama_dir, _config(tiny_llama_dir), same_logits_as=None, memory=WHOLE)
    assert outcome.logit_difference is None


@pytest.mark.parametrize("memory", [WHOLE, LAYER_BY_LAYER])
@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, "missing_keys.*layers.1.mlp.up_proj"),
        ("model.layers.4.mlp.up_proj.weight", torch.ones(64, 32), "unexpected_keys.*layers.4"),
        ("model.norm.weight", torch.full((32,), torch.nan), "model.norm.weight is not finite"),
        ("lm_head.weight", torch.ones(384, 32), "not tied"),
        ("model.norm.weight", torch.ones(32), "logits differ from the base's"),
    ],
    ids=["missing", "unexpected", "not finite", "untied", "other logits"],
)
def test_faults_in_the_weights_are_found(
    model: Path, tiny_llama_dir: Path, name: str, tensor: torch.Tensor | None, message: str, memory: int
) -> None:
    _change(model, name, tensor)
    with pytest.raises(CheckFailedError, match=message):
        check_model(model, _config(model), same_logits_as=tiny_llama_dir, memory=memory)


def test_a_config_that_reads_back_differently_is_found(model: Path) -> None:
    with pytest.raises(CheckFailedError, match="differently in rms_norm_eps"):
        check_model(model, {**_config(model), "rms_norm_eps": 0.5}, same_logits_as=None, memory=WHOLE)


def test_a_layer_that_uses_the_cache_of_another_is_found(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classic bug of copied layers: correct logits without a cache, wrong ones with it."""
    load = self_check._load

    def load_with_shared_index(directory: Path, **placement: Any) -> Any:
        loaded: Any = load(directory, **placement)
        loaded.model.layers[2].self_attn.layer_idx = 1
        return loaded

    monkeypatch.setattr(self_check, "_load", load_with_shared_index)
    with pytest.raises(CheckFailedError, match="cached decoding differs"):
        check_model(model, _config(model), same_logits_as=model, memory=WHOLE)


def test_a_large_model_is_never_held(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are on the meta device, and a narrow model of the same depth is decoded."""
    loaded: list[Any] = []
    load, decode = self_check._load, self_check.cache_difference

    def load_and_remember(directory: Path, **placement: Any) -> Any:
        loaded.append(load(directory, **placement))
        return loaded[-1]

    def decode_and_remember(model: Any, prompt: torch.Tensor) -> float:
        loaded.append(model)
        return decode(model, prompt)

    monkeypatch.setattr(self_check, "_load", load_and_remember)
    monkeypatch.setattr(self_check, "cache_difference", decode_and_remember)
    outcome = check_model(tiny_llama_dir, _config(tiny_llama_dir), tiny_llama_dir, memory=LAYER_BY_LAYER)
    *streamed, twin = loaded
    assert {parameter.device.type for model in streamed for parameter in model.parameters()} == {"meta"}
    assert (twin.config.num_hidden_layers, twin.config.num_attention_heads, twin.config.hidden_size) == (4, 2, 16)
    assert outcome.logits_of.startswith("layer by layer") and outcome.cache_of.startswith("a narrow")
    assert not list(tiny_llama_dir.glob(".check-*"))


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_every_family_can_be_checked_layer_by_layer(family: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """From disk, a correct model has its own logits, its narrow twin decodes, and a corrupted layer is found."""
    base = save_tiny(family, tmp_path / "base", tiny_tokenizer)
    config = explicit_config(base)
    outcome = check_model(base, config, same_logits_as=base, memory=LAYER_BY_LAYER)
    assert outcome.logits_of.startswith("layer by layer") and outcome.cache_of.startswith("a narrow")
    assert outcome.logit_difference == 0.0
    assert outcome.cache_difference < 1e-5

    corrupted = Path(shutil.copytree(base, tmp_path / "corrupted"))
    tensors = load_file(corrupted / "model.safetensors")
    name = next(name for name in tensors if "layers.2." in name and tensors[name].dim() > 1)
    _change(corrupted, name, tensors[name].flip(0))  # no norm compensates for this, as it may for a scale or a shift
    with pytest.raises(CheckFailedError, match="logits differ from the base's"):
        check_model(corrupted, config, same_logits_as=base, memory=LAYER_BY_LAYER)


@pytest.mark.parametrize("family", ["deepseek_v3", "codegen", "diffllama", "mamba"])
def test_families_without_a_row_can_be_checked_layer_by_layer(family: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Their sizes depend on each other in ways of their own, or they have no heads."""
    tiny_model(family).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    outcome = check_model(tmp_path, explicit_config(tmp_path), same_logits_as=tmp_path, memory=LAYER_BY_LAYER)
    assert outcome.logits_of.startswith("layer by layer") and outcome.cache_of.startswith("a narrow")
    assert outcome.logit_difference == 0.0 and outcome.cache_difference <= CACHE_TOLERANCE

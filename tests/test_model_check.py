"""A sound model passes; each kind of fault is found and named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import model_check
from pipeline.model_check import CheckFailedError, check_model


@pytest.fixture
def model(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
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


def test_a_sound_model_agrees_with_itself(tiny_llama_dir: Path) -> None:
    outcome = check_model(tiny_llama_dir, _config(tiny_llama_dir), same_logits_as=tiny_llama_dir)
    assert outcome.logit_difference == 0.0
    assert outcome.cache_difference < 1e-5


def test_without_a_promise_logits_are_not_compared(tiny_llama_dir: Path) -> None:
    assert check_model(tiny_llama_dir, _config(tiny_llama_dir), same_logits_as=None).logit_difference is None


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, "missing_keys.*layers.1.mlp.up_proj"),
        ("model.layers.4.mlp.up_proj.weight", torch.ones(64, 32), "unexpected_keys.*layers.4"),
        ("model.norm.weight", torch.full((32,), torch.nan), "model.norm.weight is not finite"),
        ("lm_head.weight", torch.ones(384, 32), "not tied"),
        ("model.norm.weight", torch.ones(32), "logits differ from the base's"),
    ],
    ids=["missing", "unexpected", "not finite", "untied", "other logits"],
)
def test_a_fault_in_the_weights(
    model: Path, tiny_llama_dir: Path, name: str, tensor: torch.Tensor | None, says: str
) -> None:
    _change(model, name, tensor)
    with pytest.raises(CheckFailedError, match=says):
        check_model(model, _config(model), same_logits_as=tiny_llama_dir)


def test_a_config_that_reads_back_differently(model: Path) -> None:
    with pytest.raises(CheckFailedError, match="differently in rms_norm_eps"):
        check_model(model, {**_config(model), "rms_norm_eps": 0.5}, same_logits_as=None)


def test_a_layer_that_uses_another_ones_cache(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classic fault of a copied layer: the same logits without a cache, wrong ones with it."""
    load = model_check._load

    def load_with_shared_index(directory: Path) -> Any:
        loaded: Any = load(directory)
        loaded.model.layers[2].self_attn.layer_idx = 1
        return loaded

    monkeypatch.setattr(model_check, "_load", load_with_shared_index)
    with pytest.raises(CheckFailedError, match="cached decoding differs"):
        check_model(model, _config(model), same_logits_as=model)

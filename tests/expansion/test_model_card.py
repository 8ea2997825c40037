"""The model card describes how the model was made and from which weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.expansion.model_card import base_weights, model_card
from pipeline.files import sha256_file, write_json

EXPANSION: dict[str, Any] = {
    "method": "llama_pro",
    "settings": {"method": "llama_pro", "new_layers": 1, "position": "top"},
    "source": "LLaMA Pro: Progressive LLaMA with Block Expansion, arXiv 2401.02415",
    "num_base_layers": 2,
    "num_layers": 3,
    "layers": [
        {"layer": 0, "new": False, "from": [0]},
        {"layer": 1, "new": True, "from": [0, 1]},
        {"layer": 2, "new": False, "from": [1]},
    ],
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A directory with a config and weights, as far as the card reads them."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def test_a_base_without_a_manifest_is_identified_by_its_weights(base: Path) -> None:
    card = model_card(EXPANSION | {"seed": 3, "base": base_weights(base)}, base)
    assert "# 2 layers grown to 3 by llama_pro" in card
    assert "arXiv 2401.02415" in card
    assert "- New layers: 1\n" in card
    assert "| position | top |" in card
    assert "- Seed: 3" in card
    assert f"| model.safetensors | {sha256_file(base / 'model.safetensors')} |" in card
    assert "base_model" not in card


def test_the_path_of_a_local_base_is_not_named(base: Path) -> None:
    settings = {"path": "/home/someone/model", "revision": None, "gguf_file": None}
    write_json(base / "manifest.json", {"settings": settings, "files": {}})
    card = model_card(EXPANSION | {"seed": 0, "base": base_weights(base)}, base)
    assert "- Base: a local model directory" in card and "/home" not in card
    settings = {"path": "package:tiny_model", "revision": None, "gguf_file": "tiny.gguf"}
    write_json(base / "manifest.json", {"settings": settings, "files": {}})
    assert "- Base: package:tiny_model tiny.gguf" in model_card(EXPANSION | {"seed": 0, "base": {}}, base)


def test_source_and_hashes_are_taken_from_the_manifest(base: Path) -> None:
    files = {"model.safetensors": {"bytes": 7, "sha256": "abc"}}
    settings = {"path": "meta-llama/Llama-3.2-1B", "revision": "0123456", "gguf_file": None}
    write_json(base / "manifest.json", {"settings": settings, "files": files})
    card = model_card(EXPANSION | {"seed": 0, "base": base_weights(base)}, base)
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert 'base_model: "meta-llama/Llama-3.2-1B"' in card
    assert "- Base: meta-llama/Llama-3.2-1B 0123456" in card
    assert "| model.safetensors | abc |" in card

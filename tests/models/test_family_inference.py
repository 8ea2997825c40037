"""What is inferred about models without a row in the family table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import AnyExpand
from pipeline.files import read_json
from pipeline.models.families import Family, Role, family_of, shape_of
from pipeline.models.families.inferred import family_from_json, family_to_json
from pipeline.models.family_inference.infer import infer_family
from pipeline.models.reading import ModelDirectory
from tests.family_coverage import check_family, tiny_model
from tests.tiny_families import save_tiny

ROWS = ("llama", "gemma2", "olmo2", "phi3", "gpt_neox", "starcoder2", "stablelm", "mixtral", "qwen2_moe", "gpt_oss")
# Conv1D and learned positions, one fused projection for all heads, parallel blocks, output norms, experts beside dense
# layers, convolutions beside attention, state spaces only, a layer that cannot be silenced, and one
# that depends on its index.
OTHERS = ("gpt2", "falcon", "cohere2", "exaone4", "deepseek_v3", "lfm2", "mamba", "minimax", "diffllama")


def _elements(family: Family, stored: dict[str, Tensor], config: dict[str, Any]) -> dict[tuple[str, bytes], Role]:
    """Role by the elements of stored tensors that a tensor of layer 1 consists of, in their order."""
    found = {}
    for tensor in family.tensors_by_layer(stored, config)[1]:
        numbers = stored[family.tensor_name(1, tensor.stored)]
        read = numbers if tensor.place is None else tensor.place.read(numbers)
        found[tensor.stored, read.contiguous().numpy().tobytes()] = tensor.role
    return found


@pytest.mark.parametrize("family", ROWS)
def test_what_is_inferred_equals_the_row(family: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    """The same roles for the same elements of stored tensors, and the same shapes of all tensors of the model."""
    save_tiny(family, tmp_path, tiny_tokenizer)
    config = read_json(tmp_path / "config.json")
    inferred, row = infer_family(config), family_of(family)
    specs = ModelDirectory(tmp_path).specs
    stored = {name: torch.arange(spec.numel).view(spec.shape) for name, spec in specs.items()}
    assert _elements(inferred, stored, config) == _elements(row, stored, config)
    shape = shape_of(config)
    assert inferred.inference is not None
    outside = {**inferred.inference.before, **inferred.inference.after}
    assert outside == {**shape.before, **shape.after}
    assert inferred.stored_lm_head == row.stored_lm_head
    for kind in inferred.inference.kinds:
        shapes = {name: size for key, entry in kind.items() for name, size in entry.shapes(key, config).items()}
        assert shapes == shape.layers[0].tensors


@pytest.mark.parametrize("family", OTHERS)
def test_models_without_a_row_are_expanded_like_those_with_one(
    family: str, expand_settings: Callable[..., AnyExpand], tmp_path: Path, tiny_tokenizer: Any
) -> None:
    found = check_family(family, tmp_path, tiny_tokenizer, expand_settings)
    assert found.how == "inferred"
    assert ("cannot keep the logits" in found.note) == (family in ("minimax", "diffllama"))


def test_an_inferred_family_survives_json() -> None:
    family = infer_family(tiny_model("falcon").config.to_dict())
    assert family_from_json(family_to_json(family)) == family


def test_scales_in_two_dimensions_belong_to_norms(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """The norms of queries and keys of Cohere have a scale for every head, [heads, head size]."""
    save_tiny("cohere", tmp_path, tiny_tokenizer, use_qk_norm=True)
    inferred = infer_family(read_json(tmp_path / "config.json"))
    for name, heads in (("q_norm", 4), ("k_norm", 2)):
        ((role, place),) = inferred.parts(f"model.layers.0.self_attn.{name}.weight", {})
        assert (role.name, role.kind, role.side, role.silent, place) == (name, "norm", "inner", None, None)
        assert inferred.inference is not None
        assert inferred.inference.kinds[0][f"self_attn.{name}.weight"].shape == (heads, 4)

"""Random layers are what transformers' initializer gives, apart from their outputs, which are zero."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.config import AnyExpand
from pipeline.expansion.method import Workspace, method_of
from pipeline.models.families import LayerTensor, family_of
from pipeline.models.reading import ModelDirectory
from tests.tiny_families import SMALL, TINY_CONFIGS, layer_tensors, layers_by_role

WIDE = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "initializer_range": 0.05}


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_random_layers_are_distributed_as_by_the_model_s_initializer(
    family: str, expand_settings: Callable[..., AnyExpand], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **TINY_CONFIGS[family], **WIDE})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    initial = layers_by_role(tmp_path)
    stored = ModelDirectory(tmp_path)
    by_name = {tensor.name: tensor for tensor in layer_tensors(family_of(family), stored.specs, stored.config)}
    base = [{by_name[name]: torch.full_like(value, torch.nan) for name, value in layer.items()} for layer in initial]
    method = method_of(expand_settings("random_init", new_layers=1, position=[0]))
    work = Workspace(declared_seed=0, config=config.to_dict())
    for _, tensor, value in method.new_tensors(base, method.place(len(base)), work):
        _check(tensor, value, initial[0][tensor.name])


def _check(tensor: LayerTensor, value: Tensor, initial: Tensor) -> None:
    assert value.shape == initial.shape
    if tensor.role.silent is not None:
        assert bool((value == tensor.role.silent).all())
    elif float(initial.std()) == 0:
        assert torch.equal(value, initial), tensor.name
    elif value.numel() < 16:  # too few for a standard deviation
        assert 0 < float(value.abs().max()) < 5 * WIDE["initializer_range"], tensor.name
    else:
        tolerance = 5 / (2 * value.numel()) ** 0.5  # five standard errors of a standard deviation
        assert float(value.std()) == pytest.approx(float(initial.std()), rel=2 * tolerance), tensor.name
        assert abs(float(value.mean())) < 5 * float(value.std()) / value.numel() ** 0.5

"""Base layers in memory: what a method sees, without files."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pipeline.models.families import LayerTensor, family_of
from tests.expansion.random_layer import Layers, random_layer


@pytest.fixture
def random_layers() -> Callable[[int], Layers]:
    """``random_layers(5)``: five different Llama layers with biases, float32."""
    roles = family_of("llama").roles

    def make(count: int) -> Layers:
        generator = torch.Generator().manual_seed(count)
        layers = [random_layer(generator) for _ in range(count)]
        return [{LayerTensor(name, roles[name]): value for name, value in layer.items()} for layer in layers]

    return make

"""Base layers in memory, as a method reads them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pipeline.models.families import LayerTensor, family_of
from tests.expansion.random_layer import Layers, random_layer


@pytest.fixture
def random_layers() -> Callable[[int], Layers]:
    """``random_layers(5)`` returns five different float32 Llama layers with biases."""
    roles = family_of("llama").roles

    def make(count: int) -> Layers:
        generator = torch.Generator().manual_seed(count)
        layers = [random_layer(generator) for _ in range(count)]
        return [{LayerTensor(name, roles[name]): value for name, value in layer.items()} for layer in layers]

    return make

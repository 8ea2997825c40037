"""A random Llama layer with biases, in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.models.families import LayerTensor

Layers = list[dict[LayerTensor, Tensor]]

HIDDEN, KEY_VALUE, INTERMEDIATE = 8, 4, 12
CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2, "hidden_size": HIDDEN}
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def random_layer(generator: torch.Generator) -> dict[str, Tensor]:
    matrices = {f"{module}.weight": torch.randn(shape, generator=generator) for module, shape in SHAPES.items()}
    biases = {f"{module}.bias": torch.randn(shape[0], generator=generator) for module, shape in SHAPES.items()}
    norms = {
        f"{module}.weight": torch.rand(HIDDEN, generator=generator) + 0.5
        for module in ("input_layernorm", "post_attention_layernorm")
    }
    return {**matrices, **biases, **norms}

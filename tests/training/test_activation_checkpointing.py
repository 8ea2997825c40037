"""With activation checkpointing, frozen layers below the lowest trainable one still store no activations."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from pipeline.training.engine import _checkpoint_activations
from pipeline.training.freeze import decoder_layers, freeze_others


def test_outputs_below_the_lowest_trainable_layer_require_no_gradient(tiny_llama_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).train()
    freeze_others(model, {name for name, _ in model.named_parameters() if ".layers.2." in name})
    _checkpoint_activations(model)
    requires_grad = {}
    for index, layer in enumerate(decoder_layers(model)):
        layer.register_forward_hook(
            lambda _, __, output, index=index: requires_grad.update({index: output.requires_grad})
        )
    model(torch.randint(0, 384, (1, 16)), use_cache=False)
    assert requires_grad == {0: False, 1: False, 2: True, 3: True}

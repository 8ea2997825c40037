"""What the engine's model asks of the formula in ``pipeline.flops``."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from transformers import PreTrainedModel

from pipeline.flops import HeadWork, LayerWork, TrainingFlops, matrix_entries
from pipeline.training.freeze import decoder_layers, full_shape, lowest_trainable_layer


def training_flops(model: PreTrainedModel, sequence_length: int) -> TrainingFlops:
    """Operations a token; counted once, after the choice of what trains."""
    config, lowest = model.config.get_text_config(), lowest_trainable_layer(model)
    share = _expert_share(config)
    layers = []
    for layer in decoder_layers(model):
        sizes = [(p, matrix_entries(name, full_shape(p), share)) for name, p in layer.named_parameters()]
        layers.append(LayerWork(sum(size for _, size in sizes), sum(size for p, size in sizes if p.requires_grad)))
    weight = model.get_output_embeddings().weight
    reaches_below = lowest < len(layers) or _final_norm_trains(model)
    head = HeadWork(full_shape(weight).numel(), weight.requires_grad, reaches_below)
    return TrainingFlops.count(layers, lowest, head, sequence_length * _attention_size(config))


def _expert_share(config: Any) -> Fraction:
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return Fraction(config.num_experts_per_tok, experts) if experts else Fraction(1)


def _attention_size(config: Any) -> int:
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_attention_heads * head_size)


def _final_norm_trains(model: PreTrainedModel) -> bool:
    inside = {id(p) for p in decoder_layers(model).parameters()}
    embeddings = {id(p) for p in model.get_input_embeddings().parameters()}
    return any(p.requires_grad for p in model.base_model.parameters() if id(p) not in inside | embeddings)

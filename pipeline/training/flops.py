"""The floating-point operations that a training step needs.

A matrix product of [m, k] and [k, n] counts 2·m·k·n. For one token in a sequence of S tokens, with W_i the entries
of layer i's weight matrices, A = heads · head size, V·H the head, and l the lowest trainable layer:

    forward            Σ_i (2·W_i + 4·S·A)  +  2·V·H        over all layers; the head only for supervised tokens
    input gradients    Σ_{i ≥ l} (2·W_i + 8·S·A)  +  2·V·H  down to l and no further
    weight gradients   Σ_{trainable matrices} 2·W           (the head's for supervised tokens)

Attention counts queries against all S keys, as PaLM's appendix B (arXiv 2204.02311) and torch's FLOP counter do,
although documents in one block do not see each other. Norms, activations, the softmax and the optimizer are left
out, and recomputation is never needed, only chosen. In layer l itself the gradient stops at its first norm, which
trains; where it does not, the true count is smaller by that layer's input projections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from pipeline.training.freeze import decoder_layers, full_shape, lowest_trainable_layer


@dataclass(frozen=True)
class TrainingFlops:
    """Operations a token for one model, choice of trainable parameters and sequence length."""

    body: int  # decoder layers, every token
    head: int  # only tokens with a target

    @classmethod
    def of_model(cls, model: PreTrainedModel, sequence_length: int) -> TrainingFlops:
        """Counts once, after the choice of what trains."""
        layers, lowest = decoder_layers(model), lowest_trainable_layer(model)
        attention = sequence_length * _attention_size(model.config.get_text_config())
        body = 0
        for index, layer in enumerate(layers):
            matrices = [p for p in layer.parameters() if len(full_shape(p)) == 2]
            weights = sum(full_shape(p).numel() for p in matrices)
            body += 2 * weights + 4 * attention
            if index >= lowest:
                body += 2 * weights + 8 * attention
            body += sum(2 * full_shape(p).numel() for p in matrices if p.requires_grad)
        return cls(body, _head(model, reaches_below=lowest < len(layers) or _final_norm_trains(model)))

    def of_tokens(self, tokens: int, supervised_tokens: int) -> int:
        """Operations for so many tokens, of which so many have a target."""
        return tokens * self.body + supervised_tokens * self.head


def _attention_size(config: Any) -> int:
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_attention_heads * head_size)


def _final_norm_trains(model: PreTrainedModel) -> bool:
    inside = {id(p) for p in decoder_layers(model).parameters()}
    embeddings = {id(p) for p in model.get_input_embeddings().parameters()}
    return any(p.requires_grad for p in model.base_model.parameters() if id(p) not in inside | embeddings)


def _head(model: PreTrainedModel, reaches_below: bool) -> int:
    weight = model.get_output_embeddings().weight
    products = 1 + int(reaches_below) + int(weight.requires_grad)
    return int(2 * full_shape(weight).numel() * products)

"""A decoder's parameters counted from its config, before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """Parameters of a dense decoder with gated MLP."""

    num_hidden_layers: int
    per_layer: int
    outside: int  # embeddings, head, final norm

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.outside + self.num_hidden_layers * self.per_layer

    def with_layers(self, num_hidden_layers: int) -> Shape:
        """The same width at another depth."""
        return Shape(num_hidden_layers, self.per_layer, self.outside)


def shape_of(config: Mapping[str, Any]) -> Shape:
    """Counts q, k, v, o, gate, up, down, two norms a layer, embeddings, the head when untied; no biases."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    attention = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim
    mlp = 3 * hidden * config["intermediate_size"]
    embeddings = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return Shape(config["num_hidden_layers"], attention + mlp + 2 * hidden, embeddings + hidden)

"""LLaMA Pro's block expansion (arXiv 2401.02415): copies whose blocks add zero.

A new layer is its lower neighbour with o_proj and down_proj (weights and biases) at zero, so the model computes
exactly what the base does. Zeroing a pre-norm's scale instead would do that too, but would stop every gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.config import LlamaProExpand
from pipeline.expansion.layer_plan import LayerPlan
from pipeline.expansion.layers import Journal, Layer, NewTensor, copies, silenced


def expand(
    base: Sequence[Layer], plan: LayerPlan, settings: LlamaProExpand, seed: int, journal: Journal
) -> Iterator[NewTensor]:
    """Every new layer is its lower base neighbour, silenced."""
    for layer, tensor, value in copies(base, plan):
        yield NewTensor(layer, tensor, silenced(tensor, value))

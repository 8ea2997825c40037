"""LLaMA Pro's block expansion (arXiv 2401.02415, section 3): copies whose blocks add zero.

A new layer is a copy of its lower neighbor with o_proj and down_proj (weights and biases) set to zero, so the model
computes exactly what the base does. Zeroing the scale of a pre-norm instead would do that too, but would block every
gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.expansion.layer_plan import LayerPlan
from pipeline.expansion.method import InsertionMethod, LayerWeights, NewTensor, Workspace, copies, silenced


class LlamaPro(InsertionMethod):
    """Every new layer is a copy of its lower base neighbor with zeroed outputs."""

    title = "LLaMA Pro"
    source = "LLaMA Pro: Progressive LLaMA with Block Expansion, arXiv 2401.02415"
    color = "#d55e00"
    like_layers = "none"

    @property
    def keeps_logits(self) -> bool:
        """Always: both blocks of a new layer add zero."""
        return True

    def new_tensors(self, base: Sequence[LayerWeights], plan: LayerPlan, work: Workspace) -> Iterator[NewTensor]:
        """Yields the copies."""
        for layer, tensor, value in copies(base, plan):
            yield NewTensor(layer, tensor, silenced(tensor, value))

"""The mean of a layer and the next, after the heads and neurons of the next were permuted to match the first.

A plain mean mixes heads and neurons that have nothing in common but their index, and optimal transport (OpT-DeUS) mixes
each with many others, regardless of heads and of rotary embeddings. Here each is averaged with the one that it
resembles most, by permutations that leave what the next layer computes as it is (see ``pipeline.expansion.alignment``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.expansion.layer_plan import LayerPlan
from pipeline.expansion.method import (
    LayerWeights,
    NewTensor,
    Workspace,
    ZeroInitMethod,
    from_neighbors,
)
from pipeline.models.families import Shape


class AlignedAverage(ZeroInitMethod):
    """Every new layer is halfway between the two it is made from, with aligned heads and neurons."""

    title = "aligned averaging"
    source = "mean of the two neighbors, after weight matching of heads and neurons (Git Re-Basin, arXiv 2209.04836)"
    color = "#2f9e9e"
    like_layers = "sources"
    needs_attention_and_mlp = True
    uses_gpu = True

    def check_layers(self, base: Shape) -> None:
        """Checks also that the heads of the model are known."""
        super().check_layers(base)
        if base.inferred:
            raise self._unfit(
                "how the heads of this model are stored is not known, since its family is inferred",
                "Choose a method that does not depend on heads.",
            )

    def new_tensors(self, base: Sequence[LayerWeights], plan: LayerPlan, work: Workspace) -> Iterator[NewTensor]:
        """Yields the means, computed in float32, and records how many heads and neurons were moved."""
        from pipeline.expansion.alignment import align

        heads = work.config["num_attention_heads"]

        def mean(index: int, lower: LayerWeights, upper: LayerWeights) -> LayerWeights:
            aligned, moved = align(upper, lower, heads)
            work.record(f"layer {index}", **moved)
            work.note(f"layer {index}", **moved)
            return {tensor: (lower[tensor].float() + aligned[tensor]) / 2 for tensor in lower}

        return self.zeroed(from_neighbors(base, plan, work, mean))

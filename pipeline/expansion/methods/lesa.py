"""LESA (arXiv 2502.13794, section 3): the matrices of a new layer are predicted from those of its neighbors.

For each matrix role separately, the base's matrices side by side have one exact SVD, in which layer i is W_i = U S V_i.
A small network G learns to predict V_i from V_{i-1} and V_{i+1}, and a new layer is U S G([V_lower, V_upper]) (see
``lesa_predictions``). All other tensors come from layer 0, as in the authors' code: its small norms damp the new layer,
and without them the model breaks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Literal

from pipeline.config.section import Fraction, NonNegativeFloat, Positive, PositiveFloat
from pipeline.expansion.layer_plan import LayerPlan, PlannedLayer
from pipeline.expansion.method import (
    LayerWeights,
    NewTensor,
    Workspace,
    ZeroInitMethod,
    is_on_disk,
)
from pipeline.models.families import LayerTensor, LinearMap, Shape

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_PUBLISHED_GROWTH = 3  # times the parameters of the base


class Lesa(ZeroInitMethod):
    """Every matrix of a new layer is predicted; norms and biases are copied from the base."""

    title = "LESA"
    source = "LESA: Learnable LLM Layer Scaling-Up, arXiv 2502.13794"
    color = "#0072b2"
    needs_attention_and_mlp = True
    draws_random_numbers = True
    uses_gpu = True
    min_base_layers = 3  # the predictor learns from layers that have two neighbors

    variant: str  # the preset that the values below come from; recorded, never read
    epochs: Positive
    norm_loss_weight: Fraction  # the loss's lambda
    learning_rate: PositiveFloat  # of AdamW; if standardized, scaled by 576 / width for matrices with more columns
    weight_decay: NonNegativeFloat  # of AdamW
    schedule: Literal["constant", "cosine"]  # of the learning rate; cosine has a short warmup
    batch_size: Positive  # singular directions per step
    norm_batch: Positive  # singular directions per norm in the loss; in the authors' code their batch
    hidden_size: Positive  # of the predictor
    standardized: bool  # inputs of unit variance, first predictions centered and of the targets' size; else raw
    norms: Literal["layer0", "neighbour", "average"]  # where a new layer's norms and biases come from

    def scratch_bytes(self, base: Shape, gpu_memory: int | None = None) -> int:
        """Returns the size of V of the largest role, or 0 if V fits in memory."""
        size = max((_size_of_v(base, matrix) for matrix in _matrices(base)), default=0)
        return size if is_on_disk(size, gpu_memory) else 0

    def gpu_bytes(self, base: Shape, gpu_memory: int) -> int:
        """Estimates the peak memory, which is that of the largest eigendecomposition or of V.

        The former holds four float64 matrices ``[out, out]``, as measured on CPUs. Beside V there are U S, its inverse,
        a layer's matrix and its part of V, in float32. Together, small roles take at most a gigabyte more.
        """
        peaks = [0]
        for matrix in _matrices(base):
            size, rank = _size_of_v(base, matrix), min(matrix.rows, len(base.layers) * matrix.columns)
            beside = 4 * (2 * matrix.rows * rank + (matrix.rows + rank) * matrix.columns)
            peaks += [4 * 8 * matrix.rows**2, beside + (0 if is_on_disk(size, gpu_memory) else size)]
        return max(peaks)

    def new_tensors(self, base: Sequence[LayerWeights], plan: LayerPlan, work: Workspace) -> Iterator[NewTensor]:
        """Yields copied and predicted tensors, with zeroed outputs if ``zero_init``."""
        from pipeline.expansion.lesa_predictions import predict_matrices

        if len(plan.layers) > LARGEST_PUBLISHED_GROWTH * plan.num_base_layers:
            work.warnings.append(
                f"{len(plan.layers)} layers from {plan.num_base_layers}: LESA's authors do not go beyond "
                f"{LARGEST_PUBLISHED_GROWTH} times the parameters, and predictions made from other predictions are "
                "less accurate"
            )
        yield from self.zeroed(chain(self._copy(base, plan), predict_matrices(base, plan, self, work)))

    def _copy(self, base: Sequence[LayerWeights], plan: LayerPlan) -> Iterator[NewTensor]:
        for tensor in base[0]:
            if tensor.role.kind != "matrix":
                for planned in plan.new_layers:
                    yield NewTensor(planned.layer, tensor, self._copied(base, planned, tensor))

    def _copied(self, base: Sequence[LayerWeights], planned: PlannedLayer, tensor: LayerTensor) -> Tensor:
        import torch

        # The authors found no way to predict a router, and layer 0's was trained for other experts.
        if tensor.role.kind == "router" or self.norms == "neighbour":
            return base[planned.base[0]][tensor]
        if self.norms == "layer0":
            return base[0][tensor]
        return torch.stack([base[index][tensor].float() for index in planned.base]).mean(dim=0)


def _matrices(base: Shape) -> Iterator[LinearMap]:
    return (matrix for layer in base.layers for maps in layer.linear_maps.values() for matrix in maps)


def _size_of_v(base: Shape, matrix: LinearMap) -> int:
    """Returns the size in bytes of V of one role, ``[layers, rank, in]`` in float32, where ``rank`` is at most out."""
    return 4 * len(base.layers) * min(matrix.rows, len(base.layers) * matrix.columns) * matrix.columns

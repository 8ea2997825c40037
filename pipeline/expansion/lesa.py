"""LESA (arXiv 2502.13794, section 3): matrices of a new layer predicted from its neighbours in a shared spectrum.

For each matrix role on its own: the base's matrices side by side have one exact SVD, layer i is W_i = U S V_i, and a
small network learns V_i from V_{i-1} and V_{i+1}. A new layer is U S G([V_lower, V_upper]). What is no matrix comes,
as in the authors' code, from layer 0: its small norms damp the new layer, without which the model breaks.

One role is one unit of work with its own random numbers, so that roles can be made in any order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pipeline.architecture import LayerTensor
from pipeline.config import LesaExpand
from pipeline.expansion.layer_plan import LayerPlan, PlannedLayer
from pipeline.expansion.layers import Journal, Layer, NewTensor, silenced
from pipeline.expansion.predictor import Predictor, train_predictor
from pipeline.expansion.spectrum import Spectrum, decompose


def expand(
    base: Sequence[Layer], plan: LayerPlan, settings: LesaExpand, seed: int, journal: Journal
) -> Iterator[NewTensor]:
    """Predicts every matrix; norms and biases as ``settings.norms`` says; outputs zeroed if ``settings.zero_init``."""
    for tensor in base[0]:
        if tensor.role.kind == "matrix":
            made = _predict_role(base, plan, settings, seed, journal, tensor)
        else:
            made = ((planned.layer, _borrowed(base, planned, settings, tensor)) for planned in plan.new_layers)
        for layer, value in made:
            yield NewTensor(layer, tensor, silenced(tensor, value) if settings.zero_init else value)


def _borrowed(base: Sequence[Layer], planned: PlannedLayer, settings: LesaExpand, tensor: LayerTensor) -> Tensor:
    """A norm or bias of a new layer."""
    if settings.norms == "layer0":
        return base[0][tensor]
    if settings.norms == "neighbour":
        return base[planned.base[0]][tensor]
    return torch.stack([base[index][tensor].float() for index in planned.base]).mean(dim=0)


def _predict_role(
    base: Sequence[Layer], plan: LayerPlan, settings: LesaExpand, seed: int, journal: Journal, tensor: LayerTensor
) -> Iterator[tuple[int, Tensor]]:
    """The matrices ``[out, in]`` of one role in every new layer, by index in the new model."""
    spectrum = decompose(lambda layer: base[layer][tensor], len(base))
    predictor = Predictor(spectrum.d_in, settings.hidden_size, role_seed(seed, tensor))
    loss = train_predictor(
        predictor,
        spectrum.right,
        settings,
        role_seed(seed, tensor),
        note=lambda epoch, loss: journal.note(f"{tensor.module} epoch {epoch + 1}/{settings.epochs}", loss=loss),
    )
    journal.record(tensor.module, rank=spectrum.rank, rows=spectrum.d_out, loss=loss)
    return _rebuild(spectrum, predictor, plan)


@torch.no_grad()
def _rebuild(spectrum: Spectrum, predictor: Predictor, plan: LayerPlan) -> Iterator[tuple[int, Tensor]]:
    """U S G([V_lower, V_upper]) in making order; a predicted V serves the layers that are made from it."""
    predicted: dict[int, Tensor] = {}

    def right_at(index: int) -> Tensor:
        return predicted[index] if index in predicted else spectrum.right[plan.layers[index].base[0]]

    made = []
    for planned in plan.new_layers:
        lower, upper = planned.made_from
        predicted[planned.layer] = predictor(torch.cat([right_at(lower), right_at(upper)], dim=1))
        made.append((planned.layer, spectrum.left @ predicted[planned.layer]))
    return iter(made)


def role_seed(seed: int, tensor: LayerTensor) -> int:
    """A seed of the role's own, the same in whatever order roles are made."""
    digest = hashlib.sha256(f"{seed} {tensor.name}".encode()).digest()
    return int.from_bytes(digest[:7], "big")

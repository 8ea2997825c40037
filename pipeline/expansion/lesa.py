"""LESA (arXiv 2502.13794, section 3): matrices of a new layer predicted from its neighbours in a shared spectrum.

For each matrix role on its own: the base's matrices side by side have one exact SVD, layer i is W_i = U S V_i, and a
small network learns V_i from V_{i-1} and V_{i+1}. A new layer is U S G([V_lower, V_upper]). What is no matrix comes,
as in the authors' code, from layer 0: its small norms damp the new layer, without which the model breaks.

One role is one unit of work with its own random numbers, so that roles can be made in any order. A predictor is too
small to be worth more than one thread, and suffers where cores are shared: decompositions use all threads, and then
several predictors are taught at once, each on one.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from pipeline.architecture import LayerTensor
from pipeline.config import LesaExpand
from pipeline.expansion.layer_plan import LayerPlan, PlannedLayer
from pipeline.expansion.layers import Journal, Layer, NewTensor, silenced
from pipeline.expansion.predictor import Predictor, train_predictor
from pipeline.expansion.spectrum import Spectrum, decompose

MAX_GROWTH = 3  # times the base, as far as the authors went
MAX_ROLES_AT_ONCE = 4  # each holds its V of all layers, as large as the role's matrices in float32


def expand(
    base: Sequence[Layer], plan: LayerPlan, settings: LesaExpand, seed: int, journal: Journal
) -> Iterator[NewTensor]:
    """Predicts every matrix; norms and biases as ``settings.norms`` says; outputs zeroed if ``settings.zero_init``."""
    _warn_of_growth(plan, journal)
    for made in chain(_borrow(base, plan, settings), _predict(base, plan, settings, seed, journal)):
        yield made._replace(value=silenced(made.tensor, made.value)) if settings.zero_init else made


def _warn_of_growth(plan: LayerPlan, journal: Journal) -> None:
    """Says when more is asked for than the authors tried, layers standing for parameters."""
    if len(plan.layers) > MAX_GROWTH * plan.num_base_layers:
        journal.warnings.append(
            f"{len(plan.layers)} layers from {plan.num_base_layers}: LESA's authors do not go beyond {MAX_GROWTH} "
            "times the parameters, and predictions between predictions are further from what was learnt"
        )


def _borrow(base: Sequence[Layer], plan: LayerPlan, settings: LesaExpand) -> Iterator[NewTensor]:
    """All norms and biases of the new layers."""
    for tensor in base[0]:
        if tensor.role.kind != "matrix":
            for planned in plan.new_layers:
                yield NewTensor(planned.layer, tensor, _borrowed(base, planned, settings, tensor))


def _borrowed(base: Sequence[Layer], planned: PlannedLayer, settings: LesaExpand, tensor: LayerTensor) -> Tensor:
    if tensor.role.kind == "router":  # the authors found no way to predict one, and layer 0's knows other experts
        return base[planned.base[0]][tensor]
    if settings.norms == "layer0":
        return base[0][tensor]
    if settings.norms == "neighbour":
        return base[planned.base[0]][tensor]
    return torch.stack([base[index][tensor].float() for index in planned.base]).mean(dim=0)


def _predict(
    base: Sequence[Layer], plan: LayerPlan, settings: LesaExpand, seed: int, journal: Journal
) -> Iterator[NewTensor]:
    """All matrices of the new layers, role by role in the order of ``base[0]``."""
    at_once = min(torch.get_num_threads(), MAX_ROLES_AT_ONCE)
    taught: deque[tuple[RoleWork, Future[float]]] = deque()
    with ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for tensor in base[0]:
            if tensor.role.kind == "matrix":
                work = prepare(base, tensor, settings, seed)
                taught.append((work, pool.submit(work.teach, settings, journal)))
                if len(taught) == at_once:
                    yield from _collect(*taught.popleft(), plan, journal)
        while taught:
            yield from _collect(*taught.popleft(), plan, journal)


def _collect(work: RoleWork, loss: Future[float], plan: LayerPlan, journal: Journal) -> Iterator[NewTensor]:
    """Waits for a role's predictor and makes its matrices."""
    spectrum = work.spectrum
    journal.record(work.tensor.module, rank=spectrum.rank, rows=spectrum.d_out, loss=loss.result())
    for layer, value in work.rebuild(plan):
        yield NewTensor(layer, work.tensor, value)


@dataclass(frozen=True)
class RoleWork:
    """One matrix role on its way from base layers to new ones."""

    tensor: LayerTensor
    seed: int  # the role's own
    spectrum: Spectrum
    predictor: Predictor

    def teach(self, settings: LesaExpand, journal: Journal) -> float:
        """Trains the predictor; returns its last epoch's mean loss."""

        def note(epoch: int, loss: float) -> None:
            journal.note(f"{self.tensor.module} epoch {epoch + 1}/{settings.epochs}", loss=loss)

        return train_predictor(self.predictor, self.spectrum.right, settings, self.seed, note)

    @torch.no_grad()
    def rebuild(self, plan: LayerPlan) -> list[tuple[int, Tensor]]:
        """U S G([V_lower, V_upper]), ``[out, in]``, by index in the new model.

        A predicted V serves the layers that are made from it.
        """
        predicted: dict[int, Tensor] = {}

        def right_at(index: int) -> Tensor:
            return predicted[index] if index in predicted else self.spectrum.right[plan.layers[index].base[0]]

        for planned in plan.new_layers:
            lower, upper = planned.made_from
            predicted[planned.layer] = self.predictor(torch.cat([right_at(lower), right_at(upper)], dim=1))
        return [(layer, self.spectrum.left @ right) for layer, right in predicted.items()]


def prepare(base: Sequence[Layer], tensor: LayerTensor, settings: LesaExpand, seed: int) -> RoleWork:
    """Decomposes a role and draws its predictor's first weights."""
    spectrum = decompose(lambda layer: base[layer][tensor], len(base))
    seed = role_seed(seed, tensor)
    return RoleWork(tensor, seed, spectrum, Predictor(spectrum.d_in, settings.hidden_size, seed))


def role_seed(seed: int, tensor: LayerTensor) -> int:
    """A seed of the role's own, the same in whatever order roles are made."""
    digest = hashlib.sha256(f"{seed} {tensor.name}".encode()).digest()
    return int.from_bytes(digest[:7], "big")

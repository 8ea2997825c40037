"""LESA (arXiv 2502.13794, section 3): matrices of a new layer predicted from its neighbours in a shared spectrum.

For each matrix role on its own: the base's matrices side by side have one exact SVD, layer i is W_i = U S V_i, and a
small network learns V_i from V_{i-1} and V_{i+1}. A new layer is U S G([V_lower, V_upper]). What is no matrix comes,
as in the authors' code, from layer 0: its small norms damp the new layer, without which the model breaks.

One role is one unit of work with its own random numbers, so that roles can be made in any order, and an interrupted
expansion goes on with the roles that are missing. A predictor of a small model is worth no more than one thread, and
suffers where cores are shared: a group of roles is decomposed with all threads, then taught side by side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from pipeline.config import LesaExpand
from pipeline.expansion.layer_plan import LayerPlan, PlannedLayer
from pipeline.expansion.layers import Journal, Layer, NewTensor, silenced
from pipeline.expansion.lesa_predictor import Predictor, train_predictor
from pipeline.expansion.svd import Spectrum, decompose
from pipeline.models.families import LayerTensor

MAX_GROWTH = 3  # times the base, as far as the authors went
MAX_ROLES_AT_ONCE = 4  # whose predictors are taught side by side
GROUP_BYTES = 1_000_000_000  # of V of all layers; a role that has more is worth all threads by itself


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
    """All matrices of the new layers that are not made yet."""
    missing = [tensor for tensor in base[0] if tensor.role.kind == "matrix" and not _is_made(tensor, plan, journal)]
    for group in _groups(base, missing):
        yield from _predict_group(base, group, plan, settings, seed, journal)


def _predict_group(
    base: Sequence[Layer], group: Sequence[LayerTensor], plan: LayerPlan, settings: LesaExpand, seed: int,
    journal: Journal,
) -> Iterator[NewTensor]:  # fmt: skip
    """All matrices of some roles, whose factors are let go with the last of them: a group's room is the next one's."""
    works = [prepare(base, tensor, settings, seed, journal) for tensor in group]
    for work, loss in zip(works, _teach(works, settings, journal), strict=True):
        yield from _make(work, loss, plan, journal)


def _groups(base: Sequence[Layer], tensors: Iterable[LayerTensor]) -> Iterator[list[LayerTensor]]:
    """Roles whose V of all layers may be held together, the largest first so that none is left for last."""
    sizes = {tensor: base[0][tensor].numel() * len(base) * torch.float32.itemsize for tensor in tensors}
    group: list[LayerTensor] = []
    held = 0
    for tensor, size in sorted(sizes.items(), key=lambda item: -item[1]):
        if group and held + size > GROUP_BYTES:
            yield group
            group, held = [], 0
        group.append(tensor)
        held += size
    if group:
        yield group


def _is_made(tensor: LayerTensor, plan: LayerPlan, journal: Journal) -> bool:
    """Whether every new layer has this matrix already; one missing needs the whole role's work."""
    return all((planned.layer, tensor) in journal.made for planned in plan.new_layers)


def _teach(works: Sequence[RoleWork], settings: LesaExpand, journal: Journal) -> Iterator[float]:
    """Trains predictors, several side by side with a thread each or one with all, and gives their losses in turn."""
    if len(works) == 1:
        yield works[0].teach(settings, journal)
        return
    at_once = min(torch.get_num_threads(), MAX_ROLES_AT_ONCE)
    with ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(lambda work: work.teach(settings, journal), works)


def _make(work: RoleWork, loss: float, plan: LayerPlan, journal: Journal) -> Iterator[NewTensor]:
    """A role's matrices of all new layers."""
    spectrum, norms = work.spectrum, []
    for layer, predicted in work.predict(plan):
        norms.append(float(torch.linalg.vector_norm(predicted)))
        yield NewTensor(layer, work.tensor, spectrum.left @ predicted)
    known = torch.stack([torch.linalg.vector_norm(right) for right in spectrum.right[1:-1]]).square().mean().sqrt()
    journal.record(
        work.tensor.module,
        rank=spectrum.rank,
        rows=spectrum.d_out,
        loss=loss / spectrum.scale**2,
        predicted_norm_ratio=sum(norms) / len(norms) / float(known),
    )
    journal.keep()


@dataclass(frozen=True)
class RoleWork:
    """One matrix role on its way from base layers to new ones."""

    tensor: LayerTensor
    seed: int  # the role's own
    spectrum: Spectrum
    predictor: Predictor

    def teach(self, settings: LesaExpand, journal: Journal) -> float:
        """Trains the predictor; returns its last epoch's mean loss."""

        def note(step: int, steps: int, loss: float) -> None:
            journal.note(f"{self.tensor.module} predictor {step}/{steps}", loss=loss)

        return train_predictor(self.predictor, self.spectrum.right, settings, self.seed, note)

    @torch.no_grad()
    def predict(self, plan: LayerPlan) -> Iterator[tuple[int, Tensor]]:
        """V of each new layer, ``[rank, in]``, by index in the new model: G([V_lower, V_upper]).

        A predicted V serves the layers that are made from it, and is forgotten after the last of them.
        """
        predicted: dict[int, Tensor] = {}
        remaining = list(plan.new_layers)

        def right_at(index: int) -> Tensor:
            return predicted[index] if index in predicted else self.spectrum.right[plan.layers[index].base[0]]

        while remaining:
            planned = remaining.pop(0)
            lower, upper = planned.made_from
            predicted[planned.layer] = self.predictor(torch.cat([right_at(lower), right_at(upper)], dim=1))
            yield planned.layer, predicted[planned.layer]
            needed = {index for later in remaining for index in later.made_from}
            predicted = {index: right for index, right in predicted.items() if index in needed}


def prepare(base: Sequence[Layer], tensor: LayerTensor, settings: LesaExpand, seed: int, journal: Journal) -> RoleWork:
    """Decomposes a role and draws its predictor's first weights."""
    journal.note(f"{tensor.module} decomposition")
    spectrum = decompose(lambda layer: base[layer][tensor], len(base), journal.scratch, settings.standardized)
    seed = role_seed(seed, tensor)
    predictor = Predictor(spectrum.d_in, settings.hidden_size, seed).to(spectrum.right.device)
    return RoleWork(tensor, seed, spectrum, predictor)


def role_seed(seed: int, tensor: LayerTensor) -> int:
    """A seed of the role's own, the same in whatever order roles are made."""
    digest = hashlib.sha256(f"{seed} {tensor.name}".encode()).digest()
    return int.from_bytes(digest[:7], "big")

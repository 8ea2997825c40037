"""LESA's matrices: each role of all base layers is decomposed, a predictor learns from it, new layers are predicted.

One role is one unit of work with its own seed, so roles can be made in any order, and an interrupted expansion resumes
with the roles that are missing. The predictor of a small model is too small to use more than one thread, so the roles
of a group are decomposed with all threads, one after the other, and then trained concurrently with one thread each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.expansion.layer_plan import LayerPlan
from pipeline.expansion.lesa_predictor import Predictor, train_predictor
from pipeline.expansion.method import LayerWeights, NewTensor, Workspace, seed_for
from pipeline.expansion.svd import SharedSVD, decompose
from pipeline.models.families import LayerTensor

if TYPE_CHECKING:
    from pipeline.expansion.methods.lesa import Lesa

MAX_CONCURRENT_ROLES = 4
GROUP_BYTES = 1_000_000_000  # V of all layers of one group's roles; a larger role is trained alone with all threads


def predict_matrices(
    base: Sequence[LayerWeights], plan: LayerPlan, settings: Lesa, work: Workspace
) -> Iterator[NewTensor]:
    """Yields all matrices of the new layers, except roles that an earlier attempt has completed."""
    missing = [
        tensor
        for tensor in base[0]
        if tensor.role.kind == "matrix" and not all((planned.layer, tensor) in work.made for planned in plan.new_layers)
    ]
    for group in _groups(base, missing):
        yield from _predict_group(base, group, plan, settings, work)


def _groups(base: Sequence[LayerWeights], tensors: Iterable[LayerTensor]) -> Iterator[list[LayerTensor]]:
    """Divides roles into groups whose V of all layers fit into ``GROUP_BYTES``, the largest first."""
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


def _predict_group(
    base: Sequence[LayerWeights], group: Sequence[LayerTensor], plan: LayerPlan, settings: Lesa, work: Workspace
) -> Iterator[NewTensor]:
    """Yields all matrices of some roles. Their factors are freed when it ends, before the next group is decomposed."""
    roles = [prepare_role(base, tensor, settings, work) for tensor in group]
    for role, loss in zip(roles, _train(roles, settings, work), strict=True):
        yield from _new_matrices(role, loss, plan, work)


def _train(roles: Sequence[MatrixRole], settings: Lesa, work: Workspace) -> Iterator[float]:
    """Trains the predictors and yields their losses in order: several with one thread each, or one with all threads."""
    if len(roles) == 1:
        yield roles[0].train(settings, work)
        return
    workers = min(torch.get_num_threads(), MAX_CONCURRENT_ROLES)
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(lambda role: role.train(settings, work), roles)


def _new_matrices(role: MatrixRole, loss: float, plan: LayerPlan, work: Workspace) -> Iterator[NewTensor]:
    """Yields one role's matrices of all new layers, then records and saves them."""
    svd, norms = role.svd, []
    for layer, predicted in role.predict(plan):
        norms.append(float(torch.linalg.vector_norm(predicted)))
        yield NewTensor(layer, role.tensor, svd.left @ predicted)
    # The layers that the predictor learned to predict; the first and the last have only one neighbor.
    inner = range(1, len(svd.right) - 1)
    known = torch.stack([torch.linalg.vector_norm(svd.right_of(layer)) for layer in inner]).square().mean().sqrt()
    work.record(
        role.tensor.module,
        rank=svd.rank,
        rows=svd.d_out,
        loss=loss / svd.scale**2,
        predicted_norm_ratio=sum(norms) / len(norms) / float(known),
    )
    work.save()


@dataclass(frozen=True)
class MatrixRole:
    """One role's matrices of all base layers, decomposed, and the predictor of further ones."""

    tensor: LayerTensor
    seed: int
    svd: SharedSVD
    predictor: Predictor

    def train(self, settings: Lesa, work: Workspace) -> float:
        """Trains the predictor. Returns the mean loss of its last epoch."""

        def note(step: int, steps: int, loss: float) -> None:
            work.note(f"{self.tensor.module} predictor {step}/{steps}", loss=loss)

        return train_predictor(self.predictor, self.svd.right, settings, self.seed, note)

    @torch.no_grad()
    def predict(self, plan: LayerPlan) -> Iterator[tuple[int, Tensor]]:
        """Yields the index of each new layer and its V ``[rank, in]``, which is G([V_lower, V_upper]).

        A predicted V is held as long as other layers are predicted from it.
        """
        predicted: dict[int, Tensor] = {}

        def right_at(index: int) -> Tensor:
            return predicted[index] if index in predicted else self.svd.right_of(plan.layers[index].base[0])

        for planned, needed in plan.making_steps():
            lower, upper = planned.made_from
            predicted[planned.layer] = self.predictor(torch.cat([right_at(lower), right_at(upper)], dim=1))
            yield planned.layer, predicted[planned.layer]
            predicted = {index: right for index, right in predicted.items() if index in needed}


def prepare_role(base: Sequence[LayerWeights], tensor: LayerTensor, settings: Lesa, work: Workspace) -> MatrixRole:
    """Decomposes one role and initializes its predictor."""
    work.note(f"{tensor.module} decomposition")
    svd = decompose(lambda layer: base[layer][tensor], len(base), work.scratch, settings.standardized)
    seed = seed_for(work.seed, tensor.name)  # whatever the order in which roles are made
    predictor = Predictor(svd.d_in, settings.hidden_size, seed).to(svd.left.device)
    return MatrixRole(tensor, seed, svd, predictor)

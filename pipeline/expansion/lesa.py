"""LESA (arXiv 2502.13794, section 3): matrices of a new layer predicted from its neighbours in a shared spectrum.

For each matrix role on its own: the base's matrices side by side have one exact SVD, layer i is W_i = U S V_i, and a
small network learns V_i from V_{i-1} and V_{i+1}. A new layer is U S G([V_lower, V_upper]). What is no matrix comes,
as in the authors' code, from layer 0: its small norms damp the new layer, without which the model breaks.

One role is one unit of work with its own random numbers, so that roles can be made in any order, and an interrupted
expansion goes on with the roles that are missing. A predictor of a small model is worth no more than one thread, and
suffers where cores are shared: decompositions use all threads, and then several predictors are taught at once.
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
LARGE_BYTES = 1_000_000_000  # of V; such a role has all threads for itself


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
    """All matrices of the new layers that are not made yet, role by role in the order of ``base[0]``."""
    at_once = min(torch.get_num_threads(), MAX_ROLES_AT_ONCE)
    taught: deque[tuple[RoleWork, Future[float]]] = deque()
    with ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for tensor in base[0]:
            if tensor.role.kind != "matrix" or _is_made(tensor, plan, journal):
                continue
            work = prepare(base, tensor, settings, seed, journal)
            taught.append((work, _teach(work, settings, journal, pool)))
            if len(taught) == at_once or work.is_large:
                yield from _collect(*taught.popleft(), plan, journal)
        while taught:
            yield from _collect(*taught.popleft(), plan, journal)


def _is_made(tensor: LayerTensor, plan: LayerPlan, journal: Journal) -> bool:
    """Whether every new layer has this matrix already; one missing needs the whole role's work."""
    return all((planned.layer, tensor) in journal.made for planned in plan.new_layers)


def _teach(work: RoleWork, settings: LesaExpand, journal: Journal, pool: ThreadPoolExecutor) -> Future[float]:
    """Trains a small role's predictor in the background, a large one's at once with all threads."""
    if not work.is_large:
        return pool.submit(work.teach, settings, journal)
    done: Future[float] = Future()
    done.set_result(work.teach(settings, journal))
    return done


def _collect(work: RoleWork, loss: Future[float], plan: LayerPlan, journal: Journal) -> Iterator[NewTensor]:
    """Waits for a role's predictor and makes its matrices."""
    facts = {"rank": work.spectrum.rank, "rows": work.spectrum.d_out, "loss": loss.result()}
    norms = []
    for layer, predicted in work.predict(plan):
        norms.append(float(torch.linalg.vector_norm(predicted)))
        yield NewTensor(layer, work.tensor, work.spectrum.left @ predicted)
    known = work.spectrum.right[1:-1].square().sum(dim=(1, 2)).mean().sqrt()
    journal.record(work.tensor.module, **facts, predicted_norm_ratio=sum(norms) / len(norms) / float(known))


@dataclass(frozen=True)
class RoleWork:
    """One matrix role on its way from base layers to new ones."""

    tensor: LayerTensor
    seed: int  # the role's own
    spectrum: Spectrum
    predictor: Predictor

    @property
    def is_large(self) -> bool:
        """Whether the role is worth all threads by itself."""
        right = self.spectrum.right
        return right.numel() * right.element_size() > LARGE_BYTES

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
    spectrum = decompose(lambda layer: base[layer][tensor], len(base), journal.scratch)
    seed = role_seed(seed, tensor)
    predictor = Predictor(spectrum.d_in, settings.hidden_size, seed).to(spectrum.right.device)
    return RoleWork(tensor, seed, spectrum, predictor)


def role_seed(seed: int, tensor: LayerTensor) -> int:
    """A seed of the role's own, the same in whatever order roles are made."""
    digest = hashlib.sha256(f"{seed} {tensor.name}".encode()).digest()
    return int.from_bytes(digest[:7], "big")

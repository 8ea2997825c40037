"""Muon: updates by the orthogonalized momentum of a matrix (Jordan et al., https://kellerjordan.github.io/posts/muon/).

Updates are multiplied by 0.2·√max(rows, columns). They then have the size of AdamW's, and its learning rate and weight
decay can be kept ("Muon is Scalable for LLM Training", arXiv 2502.16982, section 2.2). Muon updates the matrices of
linear maps in decoder layers one by one: queries, keys and values, gate and up, or experts are separate matrices also
if they are stored as one tensor. AdamW updates embeddings, the head, routers, norms and biases.

ZeRO 1 and 2 flatten the parameters of a group, and every rank updates one partition. The momentum needs no more than
that, but a matrix can be orthogonalized only as a whole. A rank orthogonalizes those matrices of which it holds a part,
and those that no rank holds whole are summed up from their parts first.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn
from transformers import PreTrainedModel

from pipeline.config import Train
from pipeline.models.families import Place, family_for
from pipeline.models.flops import orthogonalization_flops
from pipeline.training.freeze import full_shape, layer_of_parameter
from pipeline.training.selection import no_matrix_error

MOMENTUM = 0.95  # with Nesterov's acceleration, as in both publications
# Of Jordan et al.: every iteration replaces the singular values s by a·s + b·s³ + c·s⁵.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPSILON = 1e-7


def matrices_of(section: str, model: PreTrainedModel, train: Train, new: Collection[int]) -> dict[str, list[Place]]:
    """Returns the trained parameters that Muon updates, with the places of their matrices. Empty for AdamW.

    Args:
        section: the section of the settings, for messages.
        model: the model, after ``freeze_others``.
        train: the settings.
        new: the layers that ``muon_new_layers`` means.

    Raises:
        UserError: no trained parameter is such a matrix.
    """
    if not train.uses_muon:
        return {}
    config, layers = model.config.to_dict(), layer_of_parameter(model)
    family, found = family_for(config), {}
    for name, parameter in model.named_parameters():
        chosen = parameter.requires_grad and (train.optimizer == "muon" or layers[name] in new)
        parts = family.parts(name, config) if chosen else []
        places = [place or Place(name) for role, place in parts if role.kind == "matrix"]
        if parts and len(places) == len(parts) and len(full_shape(parameter)) == 2 + (places[0].expert is not None):
            found[name] = places
    if not found:
        raise no_matrix_error(section, train.optimizer)
    return found


def update_flops(model: PreTrainedModel, matrices: Mapping[str, Sequence[Place]], steps: int) -> int:
    """Returns the operations with which one update orthogonalizes all matrices, each in so many iterations."""
    shapes = ((full_shape(model.get_parameter(name)), places) for name, places in matrices.items())
    # On the meta device, places give the shapes of matrices without data.
    wholes = ((torch.empty(shape, device="meta"), places) for shape, places in shapes)
    pieces = (place.read(whole) for whole, places in wholes for place in places)
    return sum(orthogonalization_flops(piece.shape[0], piece.shape[1], steps) for piece in pieces)


@dataclass(frozen=True)
class NewtonSchulz:
    """The iteration that orthogonalizes a matrix.

    Attributes:
        steps: the number of iterations.
        dtype: of its products. Processors without instructions for bfloat16 take more than ten times as long for it as
            for float32, so they compute in float32.
    """

    steps: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Fragment:
    """The elements of a parameter in a tensor that the optimizer updates.

    Attributes:
        shape: of the parameter.
        places: of its matrices.
        start: of the fragment in the updated tensor.
        offset: of the fragment in the parameter.
        length: of the fragment; 0 if this rank holds nothing of the parameter.
        is_split: whether no rank holds the full parameter.
    """

    shape: torch.Size
    places: Sequence[Place]
    start: int
    offset: int
    length: int
    is_split: bool


def locate(parameters: Mapping[nn.Parameter, Sequence[Place]], partitioned: bool) -> dict[nn.Parameter, Fragment]:
    """Returns the fragments on this rank, in the order of ``parameters``. Collective.

    Args:
        parameters: the parameters that Muon updates, with the places of their matrices.
        partitioned: whether ZeRO has partitioned them.
    """
    if not parameters:
        return {}
    addresses = [_address(parameter) if partitioned else (0, 0, parameter.numel()) for parameter in parameters]
    whole = [length == p.numel() for p, (_, _, length) in zip(parameters, addresses, strict=True)]
    device = next(iter(parameters)).device
    held = torch.tensor(whole, dtype=torch.int32, device=device)
    if partitioned:
        distributed.all_reduce(held, op=distributed.ReduceOp.MAX)
    return {
        parameter: Fragment(parameter.shape, places, *address, is_split=not is_whole)
        for (parameter, places), address, is_whole in zip(parameters.items(), addresses, held.tolist(), strict=True)
    }


def _address(parameter: Any) -> tuple[int, int, int]:
    """Returns the start in the partition, the offset in the parameter and the length of this rank's fragment."""
    mapping = parameter._hp_mapping  # DeepSpeed's link from a parameter to its fragment on this rank
    if mapping is None:
        return 0, 0, 0
    return mapping.hp_fragment_address.start, mapping.lp_fragment_address.start, mapping.hp_fragment_address.numel


@torch.no_grad()
def muon_step(
    tensor: torch.Tensor,
    momentum: torch.Tensor,
    fragments: Collection[Fragment],
    rate: float,
    weight_decay: float,
    iteration: NewtonSchulz,
) -> None:
    """Updates one tensor and its momentum. Collective if a parameter is split.

    Args:
        tensor: a parameter, or a flat partition of several, with its gradient.
        momentum: in the same shape.
        fragments: of all parameters of the group, in the same order on all ranks.
        rate: the learning rate.
        weight_decay: per unit of the learning rate.
        iteration: with which a matrix is orthogonalized.
    """
    assert tensor.grad is not None
    momentum.lerp_(tensor.grad, 1.0 - MOMENTUM)
    direction = tensor.grad.lerp(momentum, MOMENTUM)
    flat = direction.view(-1)
    for fragment in fragments:
        own = flat[fragment.start : fragment.start + fragment.length]
        if not fragment.is_split:
            if fragment.length:
                _orthogonalize(own.view(fragment.shape), fragment.places, iteration)
            continue
        full = flat.new_zeros(fragment.shape.numel())
        part = full[fragment.offset : fragment.offset + fragment.length]
        part.copy_(own)
        distributed.all_reduce(full)  # of zeros and the parts of all ranks
        if fragment.length:
            _orthogonalize(full.view(fragment.shape), fragment.places, iteration)
            own.copy_(part)
    tensor.mul_(1.0 - rate * weight_decay).add_(direction, alpha=-rate)


def _orthogonalize(parameter: torch.Tensor, places: Sequence[Place], iteration: NewtonSchulz) -> None:
    """Replaces every matrix of a parameter by its update."""
    for place in places:
        place.write(parameter, orthogonalized(place.read(parameter), iteration))


def orthogonalized(matrix: torch.Tensor, iteration: NewtonSchulz) -> torch.Tensor:
    """Returns 0.2·√max(rows, columns) times the matrix [rows, columns] with all singular values moved towards 1.

    This is the Newton-Schulz iteration of torch's Muon, which always computes in bfloat16.
    """
    rows, columns = matrix.shape
    wide = matrix.T if rows > columns else matrix
    wide = wide.to(iteration.dtype)
    wide = wide / wide.norm().clamp(min=EPSILON)  # so that no singular value is greater than 1
    a, b, c = COEFFICIENTS
    for _ in range(iteration.steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return (wide.T if rows > columns else wide).to(matrix.dtype) * (0.2 * math.sqrt(max(rows, columns)))

"""How transformers stores the parameters of a layer: under the same name, another one, or in parts such as experts.

A small model is saved whose elements are numbered consecutively, so that every stored number identifies its parameter
and its position.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.models.families.tensors import Place
from pipeline.models.family_inference.decoder import Decoder, NotUnderstoodError

EXPERT_INDEX = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Layout:
    """Names are within a layer, except those of tensors outside of the layers.

    Attributes:
        renamed: by name in memory, another name on disk.
        parts: by name in memory, the parts on disk by name, with ``{i}`` in place of the expert, and where each is for
            expert 0.
    """

    renamed: Mapping[str, str]
    parts: Mapping[str, Mapping[str, Place]]


def layout_of(decoder: Decoder, layers: list[int]) -> Layout:
    """Saves a small model, whose weights are overwritten, and compares the names.

    Args:
        layers: one layer of each kind.

    Raises:
        NotUnderstoodError: a tensor is stored in a form that has no ``Place``.
    """
    model = decoder.model
    saved = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_floating_point()}
    begins: dict[str, int] = {}
    begin, seen = 0, set()
    for name, tensor in saved.items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            begins[name] = begin
            tensor.data = torch.arange(begin, begin + tensor.numel(), dtype=torch.float64).view(tensor.shape)
            begin += tensor.numel()
    model.tie_weights()
    with TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        stored = {
            name: tensor for path in Path(directory).glob("*.safetensors") for name, tensor in load_file(path).items()
        }
    names = sorted(begins, key=begins.__getitem__)
    bounds = torch.tensor([begins[name] for name in names], dtype=torch.float64)
    renamed: dict[str, str] = {}
    parts: dict[str, dict[str, Place]] = {}
    chosen = tuple(decoder.prefix.format(layer=layer) for layer in layers)
    every = tuple(decoder.prefix.format(layer=layer) for layer in range(len(decoder.layers)))
    for on_disk, tensor in stored.items():
        if on_disk in begins:
            continue
        memory = names[int(torch.searchsorted(bounds, tensor.min().double(), right=True)) - 1]
        positions = (tensor.double() - begins[memory]).long()
        if memory.startswith(chosen):
            _add_inside(decoder, memory, on_disk, positions, saved[memory].shape, renamed, parts)
        elif not memory.startswith(every):
            if positions.flatten().tolist() != list(range(saved[memory].numel())):
                raise NotUnderstoodError(f"{memory} is stored as {on_disk} in another form")
            renamed[memory] = on_disk
    return Layout(renamed, parts)


def _add_inside(
    decoder: Decoder,
    memory: str,
    on_disk: str,
    positions: Tensor,
    shape: torch.Size,
    renamed: dict[str, str],
    parts: dict[str, dict[str, Place]],
) -> None:
    split = [decoder.split(name) for name in (memory, on_disk)]
    if split[0] is None or split[1] is None:
        raise NotUnderstoodError(f"{memory} is stored as {on_disk}, outside of its layer")
    inside, name = split[0][1], split[1][1]
    whole = torch.arange(shape.numel()).view(shape)
    if positions.shape == whole.shape and torch.equal(positions, whole):
        renamed[inside] = name
        return
    expert = int(EXPERT_INDEX.findall(name)[-1]) if EXPERT_INDEX.search(name) else None
    if expert:
        return  # like expert 0
    place = _place(inside, positions, whole, expert)
    if place is None:
        raise NotUnderstoodError(f"{memory} is stored as {on_disk} in another form")
    *_, last = EXPERT_INDEX.finditer(name) if expert is not None else (None,)
    pattern = name if last is None else f"{name[: last.start()]}.{{i}}.{name[last.end() :]}"
    parts.setdefault(inside, {})[pattern] = place


def _place(stored: str, positions: Tensor, whole: Tensor, expert: int | None) -> Place | None:
    """Returns where a tensor is within a stored one, if that can be expressed."""
    matrix = whole if expert is None else whole[expert]
    for transposed in (False, True) if matrix.dim() == 2 else (False,):
        rows = (matrix.T if transposed else matrix).shape[0]
        for groups, (begin, end, shares) in [
            *((1, share) for share in ((0, 1, 1), (0, 1, 2), (1, 2, 2), (0, 1, 3), (1, 2, 3), (2, 3, 3))),
            *((rows // 2, share) for share in ((0, 1, 2), (1, 2, 2))),
        ]:
            if rows % (groups * shares):
                continue
            place = Place(stored, expert, transposed, groups, begin, end, shares)
            read = place.read(whole)
            if read.shape == positions.shape and torch.equal(read, positions):
                return place
    return None

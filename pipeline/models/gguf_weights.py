"""The weights of GGUF files that transformers does not read, dequantized one tensor at a time.

Names of tensors in the file are those in the tables of the ``gguf`` package, which llama.cpp's converter uses. Names,
shapes and the parts of fused tensors are those of the family's row. What the converter changes is undone:

- llama (Mixtral): rows of queries and keys are reordered so that the two dimensions that rotate together are adjacent.
- llama and gpt-oss: the matrices of a layer's experts are stacked, ``[experts, out, in]``, gate and up separately.
- gptneox: the queries of all heads come first, then all keys, then all values. The model has them head by head.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from pipeline.errors import UserError, first_few, one_line
from pipeline.models.families import Parameter, Place, family_of, shape_of
from pipeline.models.families.parameters import dimension
from pipeline.models.gguf import Metadata
from pipeline.models.tensors import TensorSpec

HEADS = {"q": "num_attention_heads", "k": "num_key_value_heads"}  # by role


@dataclass(frozen=True)
class _Piece:
    """What is read of a tensor of the file, for a tensor of the model or one part of it.

    Attributes:
        stored: the name of the tensor of the file.
        shape: its complete shape.
        index: an expert or rows. None for everything.
        heads: the number of heads whose rows are reordered. 0 if they are not.
        place: where the part is. None if it is a tensor of the model by itself.
    """

    stored: str
    shape: tuple[int, ...]
    index: int | slice | None = None
    heads: int = 0
    place: Place | None = None


_Tensor = tuple[str, tuple[int, ...], list[_Piece]]  # a tensor of the model: name, shape and what it is read from


class GgufWeights:
    """The weights of a GGUF file, under the names of published checkpoints.

    Args:
        file: a file whose family is read here.
        metadata: of the file, checked.

    Attributes:
        specs: shape of every tensor by name, in float32, which they are dequantized to.

    Raises:
        UserError: the file is damaged, or its tensors are not those that its metadata describe.
    """

    def __init__(self, file: Path, metadata: Metadata) -> None:
        self._family = family_of(metadata.family)
        self._config = self._family.with_defaults(metadata.config())
        self._is_llama = metadata.architecture == "llama"
        arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == metadata.architecture)
        self._names = gguf.get_tensor_name_map(arch, self._config["num_hidden_layers"])
        self._pieces: dict[str, list[_Piece]] = {}
        self.specs: dict[str, TensorSpec] = {}
        for name, shape, pieces in chain(self._outside(), self._inside()):
            self._pieces[name], self.specs[name] = pieces, TensorSpec(torch.float32, shape)
        self._tensors = {tensor.name: tensor for tensor in _tensors_of(file)}
        self._check(file)

    def read(self, name: str) -> Tensor:
        """Reads one tensor."""
        pieces = self._pieces[name]
        if pieces[0].place is None:
            return self._read(pieces[0])
        whole = torch.empty(self.specs[name].shape)
        for piece in pieces:
            assert piece.place is not None
            piece.place.write(whole, self._read(piece))
        return whole

    def _read(self, piece: _Piece) -> Tensor:
        tensor = self._tensors[piece.stored]
        index = slice(None) if piece.index is None else piece.index
        if len(piece.shape) > 1:  # only the last dimension is packed
            unpacked = gguf.dequantize(tensor.data[index], tensor.tensor_type)
        else:
            unpacked = gguf.dequantize(tensor.data, tensor.tensor_type)[index]
        values = torch.from_numpy(np.require(unpacked, requirements="W"))  # a copy if it is the file itself
        return values.unflatten(0, (piece.heads, -1, 2)).transpose(1, 2).flatten(0, 2) if piece.heads else values

    def _outside(self) -> Iterator[_Tensor]:
        """Yields the tensors outside the layers."""
        shape = shape_of(self._config)
        for name, size in {**shape.before, **shape.after}.items():
            stored = self._family.stored_names.get(name, name)
            yield stored, size, [_Piece(self._in_file(stored), size)]

    def _inside(self) -> Iterator[_Tensor]:
        """Yields the tensors of all layers."""
        for layer in range(self._config["num_hidden_layers"]):
            for name, entry in self._family.parameters(self._config, layer).items():
                stored = self._family.tensor_name(layer, self._family.stored_names.get(name, name))
                ((_, shape),) = entry.shapes(name, self._config).items()
                if isinstance(entry, Parameter):
                    heads = HEADS.get(entry.role.name) if self._is_llama else None
                    count = dimension(self._config, heads) if heads else 0
                    yield stored, shape, [_Piece(self._in_file(stored), shape, heads=count)]
                    continue
                places = [
                    (self._family.tensor_name(layer, part), place)
                    for part, _, place in entry.places(name, self._config)
                ]
                parts = dict(self._parts(stored, shape, places))
                if self._is_llama:  # Mixtral is published with every expert by itself
                    yield from ((part, each.shape[1:], [replace(each, place=None)]) for part, each in parts.items())
                else:
                    yield stored, shape, [*parts.values()]

    def _parts(
        self, whole: str, shape: tuple[int, ...], places: Sequence[tuple[str, Place]]
    ) -> Iterator[tuple[str, _Piece]]:
        """Yields the parts of a fused tensor by the names that they have if they are stored by themselves.

        In the file, the matrices of experts are stacked part by part, and other parts follow each other.
        """
        row = 0
        for name, place in places:
            size = tuple(place.read(torch.empty(shape, device="meta")).shape)
            if place.expert is not None:
                yield name, _Piece(self._in_file(name), (shape[0], *size), place.expert, place=place)
            else:
                yield name, _Piece(self._in_file(whole), shape, slice(row, row + size[0]), place=place)
                row += size[0]

    def _in_file(self, name: str) -> str:
        """Returns the name that a tensor has in the file. Experts of a layer have the same."""
        found: str | None = self._names.get_name(re.sub(r"\.experts\.\d+\.", ".experts.", name), (".weight", ".bias"))
        if found is None:
            return name
        # Attention sinks are parameters without a suffix.
        return found if found.endswith((".weight", ".bias")) else f"{found}.weight"

    def _check(self, file: Path) -> None:
        """Checks names and shapes of all tensors of the file."""
        expected = {piece.stored: piece.shape for pieces in self._pieces.values() for piece in pieces}
        found = {name: tuple(map(int, reversed(tensor.shape))) for name, tensor in self._tensors.items()}
        faults = [f"{name} is missing" for name in expected if name not in found]
        faults += [f"{name} is not in such a model" for name in found if name not in expected]
        faults += [
            f"{name} has the shape {list(shape)} and not {list(expected[name])}"
            for name, shape in found.items()
            if expected.get(name, shape) != shape
        ]
        if faults:
            rule = f"its tensors are not those of the {self._config['model_type']} model that its metadata describe: "
            raise _unusable(file, rule + first_few(faults, separator="; "))


def _tensors_of(file: Path) -> list[gguf.ReaderTensor]:
    try:
        return list(gguf.GGUFReader(file).tensors)
    except (ValueError, IndexError) as error:
        raise _unusable(file, f"the file is truncated or damaged ({one_line(error)})") from error


def _unusable(file: Path, rule: str) -> UserError:
    remedy = "Download the file again, or use the model's safetensors."
    return UserError(setting="model.gguf_file", value=file.name, rule=rule, remedy=remedy)

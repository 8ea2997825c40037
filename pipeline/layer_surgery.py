"""Streams a base's tensors and a method's new ones into the weight files of a deeper model, and outlasts interruptions.

Holds what the method holds: the base's tensors are copied from file to file, and a new one is written when it comes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.architecture import Architecture, LayerTensor
from pipeline.artifact import read_json, write_json
from pipeline.disk import refused_where_full
from pipeline.expansion.layer_plan import LayerPlan
from pipeline.expansion.layers import Journal, Layer, NewTensor
from pipeline.expansion.spectrum import Scratch, in_memory
from pipeline.model_dir import ModelDirectory
from pipeline.progress import progress
from pipeline.shard_writer import ShardWriter

KEEP_EVERY_SECONDS = 10.0  # what an interruption can cost, beside the piece of work in hand
SCRATCH_ON_DISK_BYTES = 1_000_000_000  # room that a method asks for is in memory below this
RECORDS = ".expansion.records.json"  # what the method had to say of the tensors that are kept

Method = Callable[[list[Layer], LayerPlan, Journal], Iterator[NewTensor]]


class StoredLayer(Mapping[LayerTensor, Tensor]):
    """One layer of the base; tensors are read when they are asked for, parts of fused ones as themselves."""

    def __init__(self, base: ModelDirectory, names: Mapping[LayerTensor, str], device: torch.device) -> None:
        self._base, self._names, self._device = base, names, device

    def __getitem__(self, tensor: LayerTensor) -> Tensor:
        stored = self._base.read(self._names[tensor])
        part: Tensor = stored if tensor.place is None else tensor.place.read(stored)
        return part.to(self._device)

    def __iter__(self) -> Iterator[LayerTensor]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Names:
    """What every tensor of a deeper model is called, and where it comes from."""

    base: ModelDirectory
    architecture: Architecture
    plan: LayerPlan

    @cached_property
    def tensors(self) -> list[LayerTensor]:
        """Of every layer."""
        return self.architecture.layer_tensors(self.base.specs, self.base.config)

    @cached_property
    def sources(self) -> dict[str, str]:
        """For every stored tensor of the deeper model, in order, the base's tensor that has its dtype and shape."""
        outside = {name: name for name in self.base.specs if self.architecture.layer_of(name) is None}
        name_of = self.architecture.tensor_name
        inside = {
            name_of(planned.layer, name): name_of(planned.base[0], name)
            for planned in self.plan.layers
            for name in dict.fromkeys(tensor.stored for tensor in self.tensors)
        }
        return {**outside, **inside}

    @cached_property
    def new(self) -> dict[tuple[int, LayerTensor], str]:
        """Every tensor of a new layer, those that are parts of a stored one by the name of the part."""
        return {
            (planned.layer, tensor): self.architecture.tensor_name(planned.layer, tensor.name)
            for planned in self.plan.new_layers
            for tensor in self.tensors
        }

    @property
    def parts(self) -> dict[str, list[str]]:
        """The stored tensors of new layers that come in parts, and the parts' names."""
        parts: dict[str, list[str]] = {}
        for (layer, tensor), name in self.new.items():
            if tensor.place is not None:
                parts.setdefault(self.stored(layer, tensor), []).append(name)
        return parts

    @property
    def kept(self) -> dict[str, str]:
        """The tensors that are the base's, and their names there."""
        layer_of, layers = self.architecture.layer_of, self.plan.layers
        return {
            name: source
            for name, source in self.sources.items()
            if (layer := layer_of(name)) is None or not layers[layer].new
        }

    def stored(self, layer: int, tensor: LayerTensor) -> str:
        """The name of the stored tensor that holds this one."""
        return self.architecture.tensor_name(layer, tensor.stored)

    def base_layers(self, device: torch.device) -> list[Layer]:
        """The base as a method sees it."""
        return [
            StoredLayer(self.base, {tensor: self.stored(layer, tensor) for tensor in self.tensors}, device)
            for layer in range(self.plan.num_base_layers)
        ]


def write_weights(names: Names, method: Method, device: torch.device, out: Path) -> Journal:
    """Writes every tensor of the deeper model into ``out``: the base's as they are, new ones rounded to its dtypes.

    What an interrupted attempt has kept there is not made again.

    Args:
        method: what makes the new tensors, on ``device``.

    Raises:
        UserError: the disk has no room.
    """
    specs = {name: names.base.specs[source] for name, source in names.sources.items()}
    with ShardWriter(out, specs, names.parts) as writer:
        _copy_base(writer, names)
        made = {key for key, name in names.new.items() if name in writer.written}
        with progress("expand", total=len(names.new)) as bar:
            bar.move_to(len(made))
            journal = Journal(
                note=lambda note, **numbers: bar.advance(0, note=note, **numbers),
                made=made,
                scratch=_scratch_in(out),
                records=_kept_records(out) if made else {},
            )
            kept_at = time.monotonic()
            for new in method(names.base_layers(device), names.plan, journal):
                if time.monotonic() - kept_at > KEEP_EVERY_SECONDS:
                    write_json(out / RECORDS, journal.records)
                    writer.keep()
                    kept_at = time.monotonic()
                if (new.layer, new.tensor) not in made:
                    _write_new(writer, names, new)
                    bar.advance(1, note=names.new[new.layer, new.tensor])
    (out / RECORDS).unlink(missing_ok=True)
    return journal


def _copy_base(writer: ShardWriter, names: Names) -> None:
    kept = names.kept
    with progress("copy", total=len(kept)) as bar:
        for name, source in kept.items():
            if name not in writer.written:
                writer.copy(name, names.base.place(source))
            bar.advance(1, note=name)


def _write_new(writer: ShardWriter, names: Names, new: NewTensor) -> None:
    """Rounds a new tensor to the dtype of what it came from; a part goes to its place in the stored tensor."""
    stored = names.stored(new.layer, new.tensor)
    if new.tensor.place is None:
        dtype = names.base.specs[names.sources[stored]].dtype
        writer.write(stored, new.value.to("cpu", dtype))
    else:
        name = names.new[new.layer, new.tensor]
        new.tensor.place.write(writer.part(stored, name), new.value.to("cpu"))


def _kept_records(out: Path) -> dict[str, dict[str, Any]]:
    records: dict[str, dict[str, Any]] = read_json(out / RECORDS)
    return records


def _scratch_in(directory: Path) -> Scratch:
    """Room in a file of ``directory`` for what is large and not on a GPU; the file has no name, so none is left."""

    def room(shape: tuple[int, ...], device: torch.device) -> Tensor:
        size = torch.Size(shape).numel() * torch.float32.itemsize
        if device.type != "cpu" or size <= SCRATCH_ON_DISK_BYTES:
            return in_memory(shape, device)
        path = directory / ".scratch"
        with refused_where_full(directory, size), open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
        mapped = torch.from_file(str(path), shared=True, size=size // torch.float32.itemsize)
        path.unlink()
        return mapped.view(shape)

    return room

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

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.expansion.layer_plan import LayerPlan
from pipeline.expansion.method import LayerWeights, NewTensor, Scratch, Workspace, in_memory
from pipeline.files import SCRATCH_ON_DISK_BYTES, disk_full_as_user_error, read_json, write_json
from pipeline.models.families import Family, LayerTensor
from pipeline.models.reading import ModelDirectory
from pipeline.models.tensors import TensorSpec
from pipeline.models.writing import PROGRESS_FILE, ShardWriter
from pipeline.progress import progress

KEEP_EVERY_SECONDS = 10.0  # what an interruption can cost, beside the piece of work in hand
RECORDS = ".expansion.records.json"  # what the method had to say of what is kept, and the sign that it was

MakeTensors = Callable[[list[LayerWeights], LayerPlan, Workspace], Iterator[NewTensor]]


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
    architecture: Family
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

    def spec(self, layer: int, tensor: LayerTensor) -> TensorSpec:
        """Dtype and shape of the stored tensor that holds this one."""
        return self.base.specs[self.sources[self.stored(layer, tensor)]]

    def base_layers(self, device: torch.device) -> list[LayerWeights]:
        """The base as a method sees it."""
        return [
            StoredLayer(self.base, {tensor: self.stored(layer, tensor) for tensor in self.tensors}, device)
            for layer in range(self.plan.num_base_layers)
        ]


def write_weights(
    names: Names, new_tensors: MakeTensors, device: torch.device, out: Path, seed: int | None = None
) -> Workspace:
    """Writes every tensor of the deeper model into ``out``: the base's as they are, new ones rounded to its dtypes.

    What an interrupted attempt has kept there is not made again; where that was everything, nothing is.

    Args:
        new_tensors: a method's function of that name.
        device: of the tensors that it works with.
        seed: for a method that draws random numbers.

    Raises:
        UserError: the disk has no room.
    """
    specs = {name: names.base.specs[source] for name, source in names.sources.items()}
    if _is_finished(out, specs):
        return Workspace(**read_json(out / RECORDS))
    with ShardWriter(out, specs, names.parts) as writer:
        _copy_base(writer, names)
        made = {key for key, name in names.new.items() if name in writer.written}
        records = read_json(out / RECORDS)["records"] if made else {}
        if not made:
            forget_records(out)
        with progress("expand", total=sum(_millions(names, *key) for key in names.new)) as bar:
            bar.move_to(sum(_millions(names, *key) for key in made))
            keeper = _Keeper(writer, out, has_kept=bool(made))
            work = Workspace(
                note=lambda note, **numbers: bar.advance(0, note=note, **numbers),
                made=made,
                keep=lambda: keeper.keep(work),
                scratch=_scratch_in(out),
                records=records,
                declared_seed=seed,
            )
            for new in new_tensors(names.base_layers(device), names.plan, work):
                keeper.keep_now_and_then(work)
                if (new.layer, new.tensor) not in made:
                    _write_new(writer, names, new)
                    bar.advance(_millions(names, *new[:2]), note=names.new[new.layer, new.tensor])
            if keeper.has_kept:
                keeper.keep(work)
    return work


def forget_records(out: Path) -> None:
    """The weights that are there are final, or wrong: what was said of them is of no use to another attempt."""
    (out / RECORDS).unlink(missing_ok=True)


class _Keeper:
    """Makes work outlast an interruption: when it is told to, and every few seconds."""

    def __init__(self, writer: ShardWriter, out: Path, has_kept: bool) -> None:
        self._writer, self._out = writer, out
        self._last = time.monotonic()
        self.has_kept = has_kept  # at the end only then: what is made within seconds is not worth waiting for the disk

    def keep(self, work: Workspace) -> None:
        """Now."""
        write_json(self._out / RECORDS, {"records": work.records, "warnings": work.warnings})
        self._writer.flush()
        self._last, self.has_kept = time.monotonic(), True

    def keep_now_and_then(self, work: Workspace) -> None:
        """Where the last time is a while ago."""
        if time.monotonic() - self._last > KEEP_EVERY_SECONDS:
            self.keep(work)


def _is_finished(out: Path, specs: Mapping[str, TensorSpec]) -> bool:
    """Whether an attempt that was cut off later had written, and kept, all of it."""
    if not (out / RECORDS).is_file() or (out / PROGRESS_FILE).exists():
        return False
    try:
        return ModelDirectory(out, out.glob("model*.safetensors")).specs == specs
    except UserError:  # a file that is cut short
        return False


def _millions(names: Names, layer: int, tensor: LayerTensor) -> float:
    """A new tensor's entries, by which its work is counted; of the stored one where it is a part."""
    return names.spec(layer, tensor).entries / 1e6


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
        writer.write(stored, new.value.to("cpu", names.spec(new.layer, new.tensor).dtype))
    else:
        name = names.new[new.layer, new.tensor]
        new.tensor.place.write(writer.part(stored, name), new.value.to("cpu"))


def _scratch_in(directory: Path) -> Scratch:
    """Room in a file of ``directory`` for what is large and not on a GPU; the file has no name, so none is left."""

    def room(shape: tuple[int, ...], device: torch.device) -> Tensor:
        size = torch.Size(shape).numel() * torch.float32.itemsize
        if device.type != "cpu" or size <= SCRATCH_ON_DISK_BYTES:
            return in_memory(shape, device)
        path = directory / ".scratch"
        try:
            with disk_full_as_user_error(directory, size), open(path, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
            return torch.from_file(str(path), shared=True, size=size // torch.float32.itemsize).view(shape)
        finally:
            path.unlink()

    return room

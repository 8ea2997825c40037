"""Base and new tensors on their way to disk: interruptions, room to work in, and where new ones go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import AnyExpand
from pipeline.expansion import surgery
from pipeline.expansion.layer_plan import LayerPlan
from pipeline.expansion.method import LayerWeights, NewTensor, Workspace, method_of
from pipeline.expansion.surgery import TensorNames, write_weights
from pipeline.models.families import family_of
from pipeline.models.reading import ModelDirectory

ExpandSettings = Callable[..., AnyExpand]
CPU = torch.device("cpu")


class Interrupted(Exception):
    """What a test ends a method with."""


class Watched:
    """A method that remembers what it gave, and ends after a number of tensors."""

    def __init__(self, settings: AnyExpand, gives: int | None = None) -> None:
        self._settings, self._gives = settings, gives
        self.given: list[str] = []
        self.work = Workspace()

    def __call__(self, layers: list[LayerWeights], plan: LayerPlan, work: Workspace) -> Iterator[NewTensor]:
        self.work = work
        for new in method_of(self._settings).new_tensors(layers, plan, work):
            if len(self.given) == self._gives:
                raise Interrupted
            self.given.append(f"{new.layer} {new.tensor.name}")
            yield new


def _names(base: Path, settings: AnyExpand) -> TensorNames:
    model = ModelDirectory(base)
    return TensorNames(model, family_of("llama"), method_of(settings).place(model.config["num_hidden_layers"]))


@pytest.mark.parametrize("method", ["lesa", "opt_deus", "average", "llama_pro"])
def test_an_interrupted_expansion_goes_on_and_ends_the_same(
    expand_settings: ExpandSettings,
    tiny_llama_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    small = {"epochs": 1, "hidden_size": 16} if method == "lesa" else {}
    settings = expand_settings(method, new_layers=2, position=[1, 1], **small)
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    whole.mkdir(), parted.mkdir()
    uninterrupted = Watched(settings)
    write_weights(_names(tiny_llama_dir, settings), uninterrupted, CPU, whole, seed=0)

    monkeypatch.setattr(surgery, "SAVE_EVERY_SECONDS", -1.0)
    with pytest.raises(Interrupted):
        write_weights(_names(tiny_llama_dir, settings), Watched(settings, gives=12), CPU, parted, seed=0)
    second = Watched(settings)
    work = write_weights(_names(tiny_llama_dir, settings), second, CPU, parted, seed=0)
    assert (parted / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert work.records == uninterrupted.work.records
    kept = {"lesa": 12}.get(method, 11)  # a role of LESA's is kept when it is whole; else the twelfth was in hand
    assert len(second.work.made) == kept
    assert _weights_in(parted) == {"model.safetensors"}
    if method == "lesa":  # whose roles are its units of work, the largest first
        assert not any(name in given for name in ("gate_proj", "up_proj", "down_proj") for given in second.given)
    if method == "opt_deus":  # whose units of work are layers, here the second one from the first
        assert work.records.keys() == second.work.records.keys()


@pytest.mark.parametrize("content", [b"", bytes(64), b'{"records": 3}'])
@pytest.mark.parametrize("gives", [3, None])
def test_expansion_restarts_if_the_records_of_an_earlier_attempt_are_unreadable(
    expand_settings: ExpandSettings,
    tiny_llama_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gives: int | None,
    content: bytes,
) -> None:
    settings = expand_settings("average", new_layers=1)
    monkeypatch.setattr(surgery, "SAVE_EVERY_SECONDS", -1.0)
    with nullcontext() if gives is None else pytest.raises(Interrupted):
        write_weights(_names(tiny_llama_dir, settings), Watched(settings, gives=gives), CPU, tmp_path, seed=0)
    (tmp_path / surgery.RECORDS).write_bytes(content)
    second = Watched(settings)
    write_weights(_names(tiny_llama_dir, settings), second, CPU, tmp_path, seed=0)
    assert not second.work.made and second.given
    assert _weights_in(tmp_path) == {"model.safetensors"}


def _weights_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} - {surgery.RECORDS}


def test_a_layer_that_is_made_and_that_no_other_needs_is_not_solved_again(
    expand_settings: ExpandSettings, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = expand_settings("opt_deus", new_layers=2, position=[0, 2])
    monkeypatch.setattr(surgery, "SAVE_EVERY_SECONDS", -1.0)
    with pytest.raises(Interrupted):
        write_weights(_names(tiny_llama_dir, settings), Watched(settings, gives=12), CPU, tmp_path, seed=0)
    second = Watched(settings)
    write_weights(_names(tiny_llama_dir, settings), second, CPU, tmp_path, seed=0)
    assert {given.split()[0] for given in second.given} == {"4"}  # 1 was whole


def test_an_attempt_that_was_cut_off_after_the_last_tensor_is_not_made_again(
    expand_settings: ExpandSettings, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    settings = expand_settings("lesa", new_layers=2, epochs=1, hidden_size=16)
    names = _names(tiny_llama_dir, settings)
    first = write_weights(names, Watched(settings), CPU, tmp_path, seed=0)
    written = (tmp_path / "model.safetensors").stat().st_mtime_ns
    second = Watched(settings)
    again = write_weights(names, second, CPU, tmp_path, seed=0)
    assert second.given == [] and (tmp_path / "model.safetensors").stat().st_mtime_ns == written
    assert (again.records, again.warnings) == (first.records, first.warnings)

    surgery.forget_records(tmp_path)  # the stage's word that they are final, or wrong
    write_weights(names, second, CPU, tmp_path, seed=0)
    assert second.given


def test_large_room_is_in_a_file_without_a_name(
    expand_settings: ExpandSettings, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = expand_settings("lesa", new_layers=2, epochs=1, hidden_size=16)
    in_memory, on_disk = tmp_path / "memory", tmp_path / "disk"
    in_memory.mkdir(), on_disk.mkdir()
    write_weights(_names(tiny_llama_dir, settings), Watched(settings), CPU, in_memory, seed=0)

    monkeypatch.setattr(surgery, "SCRATCH_ON_DISK_BYTES", 0)
    mapped: list[int] = []
    from_file = torch.from_file

    def remember(path: str, shared: bool, size: int) -> torch.Tensor:
        mapped.append(size)
        return from_file(path, shared=shared, size=size)

    monkeypatch.setattr(torch, "from_file", remember)
    write_weights(_names(tiny_llama_dir, settings), Watched(settings), CPU, on_disk, seed=0)
    assert len(mapped) == 7
    assert _weights_in(on_disk) == {"model.safetensors"}
    first, second = (load_file(directory / "model.safetensors") for directory in (in_memory, on_disk))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())

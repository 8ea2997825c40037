"""Data that must survive a power failure is on disk before any file refers to it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.artifacts.store import Artifact
from pipeline.data.blocks import BlockWriter
from pipeline.models.tensors import TensorSpec
from pipeline.models.writing import PROGRESS_FILE, ShardWriter
from tests.training.test_checkpoint import save

Event = tuple[str, Path]  # what was done, and to which path


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """Every fsync and rename of this process, in order. A rename is recorded by its target."""
    seen: list[Event] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        seen.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def note_replace(source: Any, target: Any) -> None:
        seen.append(("rename", Path(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    return seen


def _flushed_before_rename(events: list[Event], target: Path) -> set[str]:
    """Returns the names of the files that were flushed before the directory was renamed."""
    return {path.name for what, path in events[: events.index(("rename", target))] if what == "fsync"}


def test_all_files_of_an_artifact_are_flushed_before_it_is_committed(tmp_path: Path, events: list[Event]) -> None:
    artifact = Artifact(tmp_path, "load", "key")
    (artifact.partial / "inner").mkdir(parents=True)
    (artifact.partial / "inner" / "weights").write_text("content")
    artifact.commit({"key": "key"})
    wanted = {"weights", "inner", "manifest.json", artifact.partial.name}
    assert _flushed_before_rename(events, artifact.path) >= wanted


def test_all_files_of_a_checkpoint_are_flushed_before_it_gets_its_name(tmp_path: Path, events: list[Event]) -> None:
    save(tmp_path, 3, fill=1.0)
    final = tmp_path / "step-00000003"
    flushed = {name.split(".", 2)[1] if name[0] == "." else name for name in _flushed_before_rename(events, final)}
    assert flushed >= {"00000.safetensors", "state", f"{final.name}.partial"}  # state.json before its own rename
    assert events[-1] == ("fsync", tmp_path)  # the rename itself, before older checkpoints are removed


def test_weights_are_flushed_before_the_list_of_what_need_not_be_written_again(
    tmp_path: Path, events: list[Event]
) -> None:
    specs = {name: TensorSpec(torch.float32, (4,)) for name in ("first", "second")}
    with ShardWriter(tmp_path, specs, max_shard_bytes=16) as writer:
        for name in specs:
            writer.write(name, torch.ones(4))
        writer.flush()
        *weights, progress = [path.name for what, path in events if what == "fsync"]
        assert sorted(weights) == [".model-0.partial", ".model-1.partial"]
        assert progress == PROGRESS_FILE


def test_blocks_are_flushed_before_a_saved_state_counts_them(tmp_path: Path, events: list[Event]) -> None:
    with BlockWriter(tmp_path, "train", 4) as writer:
        ones = np.ones((2, 4))
        writer.append(ones.astype(np.uint32), ones.astype(np.uint32), ones.astype(np.uint8))
        assert writer.save()["blocks"] == 2
        flushed = {path.name for what, path in events if what == "fsync"}
        assert flushed == {f"train.{name}.npy" for name in ("input_ids", "position_ids", "loss_mask")}
        assert all((tmp_path / name).stat().st_size > 128 for name in flushed)  # headers and two blocks

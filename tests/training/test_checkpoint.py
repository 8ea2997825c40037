import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.errors import TrainingFailure
from pipeline.training import checkpoint
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.optimizer_state import ADAMW_STATE, StateKey


class DictOptimizerState:
    """A substitute for ``OptimizerState`` with its tensors in a dictionary."""

    def __init__(self, fill: float) -> None:
        self.tensors = {(name, key): torch.full((3, 5), fill) for name in "abcd" for key in self.keys(name)}
        self.step = 0

    def keys(self, name: str) -> tuple[StateKey, ...]:
        return ("weight", *ADAMW_STATE)

    def names(self):
        return iter("abcd")

    def read(self, name, key):
        return self.tensors[name, key]

    def write(self, name, key, value):
        self.tensors[name, key] = value

    def set_step(self, step):
        self.step = step


def save(directory: Path, step: int, fill: float, keep: int = 2, **options) -> int:
    state = {"progress": {"step": step}}
    return checkpoint.save(directory, step, DictOptimizerState(fill), state, True, keep, **options)


@pytest.mark.parametrize("shard_bytes, shards", [(1, 4), (2 * 3 * 60, 2), (2**30, 1)])
def test_a_checkpoint_in_any_number_of_shards_is_restored(tmp_path: Path, shard_bytes: int, shards: int):
    save(tmp_path, 7, fill=0.3, shard_bytes=shard_bytes)
    found = checkpoint.newest(tmp_path, pytest.fail)
    assert found is not None and found.step == 7 and found.content()["progress"] == {"step": 7}
    assert len(list(found.path.glob("*.safetensors"))) == shards
    optimizer_state = DictOptimizerState(0.0)
    checkpoint.restore(found, optimizer_state)
    assert optimizer_state.step == 7
    assert all(torch.equal(value, torch.full((3, 5), 0.3)) for value in optimizer_state.tensors.values())
    assert dict(found.tensors()).keys() == set("abcd")


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_newest_checkpoints_are_kept(tmp_path: Path, keep: int):
    for step in range(1, 6):
        save(tmp_path, step, fill=step, keep=keep)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in range(6 - keep, 6)]


def test_a_checkpoint_is_barely_larger_than_the_float32_state(tmp_path: Path):
    """There are four tensors of 60 bytes with two moments each. Headers and state.json are the only overhead."""
    size = save(tmp_path, 1, fill=1.0)
    assert size == sum(path.stat().st_size for path in (tmp_path / "step-00000001").iterdir())
    assert 4 * 3 * 60 < size < 4 * 3 * 60 + 4096


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory with little space: a disk of 64 KiB for root, and a limit on the file size for other users."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0:
        yield disk
        subprocess.run(["umount", str(disk)], check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    yield disk
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_reported_and_the_previous_checkpoint_stays_intact(small_disk: Path):
    save(small_disk, 1, fill=1.0)

    class Large(DictOptimizerState):
        def __init__(self) -> None:
            super().__init__(2.0)
            self.tensors = {key: torch.full((100, 100), 2.0) for key in self.tensors}

    with pytest.raises(TrainingFailure, match="the checkpoint of step 2 could not be saved") as error:
        checkpoint.save(small_disk, 2, Large(), {"progress": {"step": 2}}, is_writer=True, keep=1)
    assert "Free some space and repeat the same command" in str(error.value)
    assert [path.name for path in small_disk.iterdir()] == ["step-00000001"]
    assert checkpoint.newest(small_disk, pytest.fail).step == 1
    save(small_disk, 2, fill=2.0)
    assert checkpoint.newest(small_disk, pytest.fail).step == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_state_is_not_saved(bad: float, tmp_path: Path):
    save(tmp_path, 1, fill=1.0)
    optimizer_state = DictOptimizerState(2.0)
    optimizer_state.tensors["c", "exp_avg_sq"][1, 2] = bad
    with pytest.raises(TrainingFailure, match="exp_avg_sq of c"):
        checkpoint.save(tmp_path, 2, optimizer_state, {}, True, 1)
    found = checkpoint.newest(tmp_path, pytest.fail)
    assert found is not None and found.step == 1


def test_a_partial_checkpoint_is_ignored_and_replaced_by_the_next_save(tmp_path: Path):
    save(tmp_path, 1, fill=1.0)
    partial = tmp_path / "step-00000002.partial"
    partial.mkdir()
    (partial / "00000.safetensors").write_bytes(b"cut")
    assert checkpoint.newest(tmp_path, pytest.fail).step == 1
    save(tmp_path, 2, fill=2.0)
    assert checkpoint.newest(tmp_path, pytest.fail).step == 2 and not partial.exists()


def test_a_partial_checkpoint_of_another_step_is_removed_by_the_next_save(tmp_path: Path):
    """A run that is killed while saving after a stop request leaves one; its next attempt saves at other steps."""
    partial = tmp_path / "step-00000007.partial"
    partial.mkdir()
    (partial / "00000.safetensors").write_bytes(b"cut")
    save(tmp_path, 10, fill=1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "shard", "state", "state cut", "state flip"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_is_used(tmp_path: Path, damage: str):
    save(tmp_path, 1, fill=1.0)
    save(tmp_path, 2, fill=2.0)
    shard, state = (tmp_path / "step-00000002" / name for name in ("00000.safetensors", "state.json"))
    if damage == "truncate":
        shard.write_bytes(shard.read_bytes()[:-7])
    elif damage == "flip":
        shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    elif damage == "state cut":
        state.write_text(state.read_text()[:-20])
    elif damage == "state flip":
        state.write_text(state.read_text().replace('"step": 2', '"step": 3'))
    else:
        (shard if damage == "shard" else state).unlink()
    reports: list[str] = []
    assert checkpoint.newest(tmp_path, reports.append).step == 1
    assert len(reports) == 1 and "step-00000002" in reports[0]


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_later_checkpoints_do_not_displace_the_one_being_saved(keep: int, tmp_path: Path):
    """Training resumed before the damaged ones, and was stopped before reaching their steps."""
    for step in (2, 5, 6):
        save(tmp_path, step, fill=step, keep=3)
    for step in (5, 6):
        (tmp_path / checkpoint.directory_name(step) / "00000.safetensors").unlink()
    save(tmp_path, 3, fill=3.0, keep=keep)
    found = checkpoint.newest(tmp_path, pytest.fail)
    assert found is not None and found.step == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in (2, 3)[-keep:]]


def test_a_missing_directory_has_no_checkpoint(tmp_path: Path):
    assert checkpoint.newest(tmp_path / "missing", pytest.fail) is None


def test_no_file_is_a_pickle(tmp_path: Path):
    save(tmp_path, 1, fill=1.0)
    assert {path.suffix for path in Checkpoint(tmp_path / "step-00000001").path.iterdir()} == {".safetensors", ".json"}

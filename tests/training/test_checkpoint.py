import errno
import os
import resource
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import TrainingFailure
from pipeline.files import sha256_file, sha256_json, write_json
from pipeline.training import checkpoint, checkpoint_writer
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.checkpoint_writer import CheckpointWriter
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

    def shape(self, name):
        return tuple(self.tensors[name, "weight"].shape)

    def owned(self, name, key):
        return 0, self.tensors[name, key].flatten()

    def write(self, name, key, value):
        self.tensors[name, key] = value

    def set_step(self, step):
        self.step = step


def save(directory: Path, step: int, fill: float, keep: int = 2) -> None:
    save_state(directory, step, DictOptimizerState(fill), keep)


def save_state(directory: Path, step: int, optimizer_state: DictOptimizerState, keep: int = 2) -> None:
    writer = CheckpointWriter(directory, optimizer_state, keep)
    writer.save(step, {"progress": {"step": step}})
    assert writer.finish() > 0


def test_a_checkpoint_is_restored(tmp_path: Path):
    save(tmp_path, 7, fill=0.3)
    found = checkpoint.newest(tmp_path, pytest.fail)
    assert found is not None and found.step == 7 and found.content()["progress"] == {"step": 7}
    optimizer_state = DictOptimizerState(0.0)
    checkpoint.restore(found, optimizer_state)
    assert optimizer_state.step == 7
    assert all(torch.equal(value, torch.full((3, 5), 0.3)) for value in optimizer_state.tensors.values())
    assert dict(found.tensors()).keys() == set("abcd")


def test_a_checkpoint_of_an_earlier_version_holds_full_tensors_and_is_restored(tmp_path: Path):
    saved = {f"{key}.{name}": torch.randn(3, 5) for name in "abcd" for key in ("weight", *ADAMW_STATE)}
    path = tmp_path / checkpoint.directory_name(9)
    path.mkdir()
    shards = {"a": "00000.safetensors", "b": "00000.safetensors", "c": "00001.safetensors", "d": "00001.safetensors"}
    for shard in set(shards.values()):
        save_file({name: value for name, value in saved.items() if shards[name[-1]] == shard}, path / shard)
    content = {"tensors": shards, "shards": {shard: sha256_file(path / shard) for shard in set(shards.values())}}
    write_json(path / checkpoint.STATE_FILE, {**content, "sha256": sha256_json(content)})
    found = checkpoint.newest(tmp_path, pytest.fail)
    assert found is not None
    optimizer_state = DictOptimizerState(0.0)
    checkpoint.restore(found, optimizer_state)
    assert all(torch.equal(value, saved[f"{key}.{name}"]) for (name, key), value in optimizer_state.tensors.items())


def test_every_file_is_what_safetensors_would_read(tmp_path: Path):
    optimizer_state = DictOptimizerState(0.0)
    for value in optimizer_state.tensors.values():
        value.normal_()
    save_state(tmp_path, 1, optimizer_state)
    stored = load_file(tmp_path / "step-00000001" / "00000.safetensors")
    assert stored.keys() == {f"{key}.{name}" for name, key in optimizer_state.tensors}
    for (name, key), value in optimizer_state.tensors.items():
        assert torch.equal(stored[f"{key}.{name}"], value.flatten())


@pytest.mark.parametrize("last", [False, True], ids=["copied", "read"])
def test_a_state_of_another_dtype_is_written_in_float32(last: bool, tmp_path: Path):
    optimizer_state = DictOptimizerState(0.3)
    optimizer_state.tensors = {each: value.bfloat16() for each, value in optimizer_state.tensors.items()}
    writer = CheckpointWriter(tmp_path, optimizer_state, keep=1)
    writer.save(1, {}, last=last)
    writer.finish()
    stored = load_file(tmp_path / "step-00000001" / "00000.safetensors")
    rounded = torch.full((15,), 0.3).bfloat16().float()
    assert stored and all(value.dtype == torch.float32 and torch.equal(value, rounded) for value in stored.values())


def test_what_changes_after_the_save_is_not_in_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The optimizer changes the state in place while the thread is still waiting to write the copy."""
    changed = threading.Event()
    written = checkpoint_writer._write_tensors
    monkeypatch.setattr(
        checkpoint_writer, "_write_tensors", lambda *arguments: changed.wait(10) and written(*arguments)
    )
    optimizer_state = DictOptimizerState(1.0)
    writer = CheckpointWriter(tmp_path, optimizer_state, keep=1)
    log = tmp_path / "metrics.jsonl"
    log.write_text("1\n")
    writer.save(1, {}, [log])
    log.write_text("1\n2\n")
    for value in optimizer_state.tensors.values():
        value.add_(1.0)
    assert checkpoint.newest(tmp_path, pytest.fail) is None
    changed.set()
    writer.finish()
    found = checkpoint.newest(tmp_path, pytest.fail)
    assert found is not None and all(torch.equal(value, torch.ones(3, 5)) for value in found.tensors().values())
    assert (found.path / log.name).read_text() == "1\n"


def test_the_last_checkpoint_is_written_without_a_copy_of_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Apart from that it equals any other, to the bit."""
    optimizer_state = DictOptimizerState(0.0)
    for value in optimizer_state.tensors.values():
        value.normal_()
    writer = CheckpointWriter(tmp_path, optimizer_state, keep=2)
    writer.save(1, {})
    writer.finish()
    monkeypatch.setattr(checkpoint_writer, "host_memory", pytest.fail)
    writer.save(2, {}, last=True)
    writer.finish()
    copied, read = (sha256_file(tmp_path / f"step-0000000{step}" / "00000.safetensors") for step in (1, 2))
    assert copied == read and writer._copy is None


def test_an_error_of_the_thread_is_raised_by_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    writer = CheckpointWriter(tmp_path, DictOptimizerState(1.0), keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "_write_tensors", fail)
        writer.save(1, {})
        while not writer.has_failed:
            time.sleep(0.001)
    with pytest.raises(TrainingFailure, match="the checkpoint of step 1 could not be saved.*Check the disk"):
        writer.save(2, {})
    assert list(tmp_path.iterdir()) == []
    writer.save(3, {})
    writer.finish()
    assert checkpoint.newest(tmp_path, pytest.fail) == Checkpoint(tmp_path / "step-00000003")


def test_a_checkpoint_is_completed_if_training_fails_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    written = checkpoint_writer._write_tensors
    monkeypatch.setattr(checkpoint_writer, "_write_tensors", lambda *given: time.sleep(0.1) or written(*given))

    def train() -> None:
        with CheckpointWriter(tmp_path, DictOptimizerState(1.0), keep=1) as writer:
            writer.save(1, {})
            raise KeyError

    with pytest.raises(KeyError):
        train()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_parts_that_are_missing_or_overlap_are_noticed(tmp_path: Path):
    class Short(DictOptimizerState):
        def owned(self, name, key):
            return (1, self.tensors[name, key].flatten()[1:]) if name == "c" else super().owned(name, key)

    with pytest.raises(RuntimeError, match="own of c .3, 5. does not add up"):
        save_state(tmp_path, 1, Short(1.0))
    assert checkpoint.newest(tmp_path, pytest.fail) is None


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_newest_checkpoints_are_kept(tmp_path: Path, keep: int):
    for step in range(1, 6):
        save(tmp_path, step, fill=step, keep=keep)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in range(6 - keep, 6)]


def test_a_checkpoint_is_barely_larger_than_the_float32_state(tmp_path: Path):
    """There are four tensors of 60 bytes with two moments each. Headers and state.json are the only overhead."""
    save(tmp_path, 1, fill=1.0)
    size = sum(path.stat().st_size for path in (tmp_path / "step-00000001").iterdir())
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
        save_state(small_disk, 2, Large(), keep=1)
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
        save_state(tmp_path, 2, optimizer_state)
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

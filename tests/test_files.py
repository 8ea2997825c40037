"""Atomic JSON, and real disks that are too small or fill up: one message, and no incomplete files."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from pipeline.__main__ import main
from pipeline.artifacts.task import Metrics, StageTask
from pipeline.driver import run as driver
from pipeline.driver.parallel import MachineShare
from pipeline.errors import EXIT_DONE, EXIT_REQUEST, UserError
from pipeline.files import (
    disk_errors_as_user_errors,
    is_intact,
    merge_nested,
    read_json,
    remove_abandoned,
    seal,
    temporary_path,
    write_json,
)
from pipeline.models.tensors import TensorSpec
from pipeline.models.writing import ShardWriter

MEBIBYTE = 2**20


def test_merging_does_not_modify_its_arguments() -> None:
    base = {"a": {"b": 1}}
    assert merge_nested(base, {"a": {"c": 2}}) == {"a": {"b": 1, "c": 2}}
    assert base == {"a": {"b": 1}}


def test_json_is_replaced_atomically(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": 1})
    write_json(tmp_path / "a.json", {"new": 2})
    assert read_json(tmp_path / "a.json") == {"new": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_only_old_temporary_files_are_abandoned(tmp_path: Path) -> None:
    written, link = temporary_path(tmp_path / "keys.json"), temporary_path(tmp_path / "load")
    young, other = temporary_path(tmp_path / "keys.json"), tmp_path / ".load.notes"
    for path in (written, young, other):
        path.touch()
    link.symlink_to("nowhere")
    for path in (written, link, other):
        os.utime(path, (0, time.time() - 7200.0), follow_symlinks=False)
    remove_abandoned(tmp_path)
    assert set(tmp_path.iterdir()) == {young, other}


@pytest.mark.parametrize("damaged", ["weights", "inner/log", ".sealed"])
def test_damage_to_a_sealed_file_is_noticed(tmp_path: Path, damaged: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "inner").mkdir()
    files = [tmp_path / "weights", tmp_path / "inner" / "log"]
    for file in files:
        file.write_text(f"content of {file.name}")
    assert not is_intact(tmp_path / ".sealed")
    seal(tmp_path / ".sealed", files)
    assert is_intact(tmp_path / ".sealed") and capsys.readouterr().err == ""
    content = bytearray((tmp_path / damaged).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / damaged).write_bytes(content)
    assert not is_intact(tmp_path / ".sealed")
    assert "damaged" in (line := capsys.readouterr().err) or "cannot be used" in line
    (tmp_path / damaged).unlink()
    assert not is_intact(tmp_path / ".sealed")


@pytest.fixture
def disk_of(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """``disk_of(4)`` mounts a disk of 4 MiB and returns its directory."""
    directory = tmp_path / "disk"

    def mount(mebibytes: int) -> Path:
        directory.mkdir()
        if shutil.which("mount") is None or os.geteuid() != 0:
            pytest.skip("only root can mount a small disk")
        command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(directory)]
        if subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("mounting is not permitted on this system")
        return directory

    yield mount
    if os.path.ismount(directory):
        subprocess.run(["umount", "--lazy", directory], check=True)


@pytest.fixture
def small_disk(disk_of: Callable[[int], Path]) -> Path:
    """A disk of 4 MiB."""
    return disk_of(4)


@contextmanager
def _file_size_limit(size: int) -> Iterator[None]:
    """Limits the size of files, like ``ulimit -f``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _specs(mebibytes: int) -> dict[str, TensorSpec]:
    return {f"tensor_{index}": TensorSpec(torch.uint8, (MEBIBYTE,)) for index in range(mebibytes)}


def test_weights_larger_than_the_free_space_are_refused_before_any_is_written(small_disk: Path) -> None:
    free = shutil.disk_usage(small_disk).free
    message = rf"output_dir = {small_disk}: 8,388,608 bytes are needed there and {free:,} are free .*larger disk"
    with pytest.raises(UserError, match=message):
        ShardWriter(small_disk, _specs(8), max_shard_bytes=2 * MEBIBYTE)
    assert not list(small_disk.iterdir())
    assert shutil.disk_usage(small_disk).free == free


def test_file_size_limit_is_reported_like_a_full_disk(tmp_path: Path) -> None:
    with _file_size_limit(2 * MEBIBYTE), pytest.raises(UserError, match=r"3,145,728 bytes are needed"):
        ShardWriter(tmp_path, _specs(3))
    assert not list(tmp_path.iterdir())


def test_weights_have_their_space_reserved(small_disk: Path) -> None:
    """Shards have their final size from the start, so that another process cannot use up the space for the rest."""
    with ShardWriter(small_disk, specs := _specs(3)) as writer:
        with pytest.raises(UserError, match="bytes are needed there"), disk_errors_as_user_errors(small_disk):
            (small_disk / "another").write_bytes(bytes(2 * MEBIBYTE))
        for name, spec in specs.items():
            writer.write(name, torch.ones(spec.shape, dtype=spec.dtype))
    assert (small_disk / "model.safetensors").stat().st_size > 3 * MEBIBYTE


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "x"), OSError(errno.ESTALE, "x"), RuntimeError("I/O error: x (os error 5)")], ids=str
)
def test_failing_disk_is_reported_with_its_directory(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(UserError) as caught, disk_errors_as_user_errors(tmp_path):
        raise error
    assert caught.value.value == tmp_path and "the disk cannot be used now" in caught.value.rule


def test_other_errors_are_not_converted(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), disk_errors_as_user_errors(tmp_path):
        (tmp_path / "missing").read_bytes()


@pytest.mark.parametrize("is_there", [False, True])
def test_disk_that_is_full_before_the_first_stage(
    shrunk: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], is_there: bool
) -> None:
    output_dir = tmp_path / "outputs"
    if is_there:
        output_dir.mkdir()
    with _file_size_limit(0):
        assert main(["+experiment=quickstart", *shrunk, f"output_dir={output_dir}"]) == EXIT_REQUEST
    message = capsys.readouterr().err
    assert f"output_dir = {output_dir}" in message and "bytes are needed there and" in message
    assert "Traceback" not in message


def test_disk_that_fills_up_during_a_stage(
    shrunk: list[str],
    disk_of: Callable[[int], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Other files use up the space after all checks have passed. Once it is free, the same command resumes."""
    disk = disk_of(640)  # the check before the run requires half a GiB
    command = ["+experiment=quickstart", *shrunk, f"output_dir={disk}", "stages=[expand]", "expand=copy"]
    expand = disk / "artifacts" / "expand"
    execute = driver._execute

    def fill_and_execute(task: StageTask, share: MachineShare) -> Metrics:
        if task.name == "expand":
            with open(disk / "other", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - MEBIBYTE // 8)
        return execute(task, share)

    with monkeypatch.context() as patch:
        patch.setattr(driver, "_execute", fill_and_execute)
        assert main(command) == EXIT_REQUEST
    message = capsys.readouterr().err
    assert f"output_dir = {expand}" in message and "bytes are needed there and" in message
    assert "Traceback" not in message
    assert not list(expand.rglob("*model*")) and not list(expand.rglob("manifest.json"))
    (disk / "other").unlink()
    assert main(command) == EXIT_DONE
    assert list(expand.glob("*/manifest.json"))

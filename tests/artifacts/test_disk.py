"""Disks that are too small or fill up on the way: real ones, told in one message, and nothing half-made is left."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from pipeline.__main__ import main
from pipeline.errors import EXIT_DONE, EXIT_REQUEST, UserError
from pipeline.files import disk_full_as_user_error
from pipeline.models.tensors import TensorSpec
from pipeline.models.writing import ShardWriter

MEBIBYTE = 2**20


@pytest.fixture
def disk_of(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """``disk_of(4)``: a disk of four MiB."""
    place = tmp_path / "disk"

    def mount(mebibytes: int) -> Path:
        place.mkdir()
        if shutil.which("mount") is None or os.geteuid() != 0:
            pytest.skip("only root can make a small disk")
        command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("this system does not let its root mount")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture
def small_disk(disk_of: Callable[[int], Path]) -> Path:
    """A disk of four MiB."""
    return disk_of(4)


@contextmanager
def _files_of_at_most(size: int) -> Iterator[None]:
    """As ``ulimit -f`` does it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _specs(mebibytes: int) -> dict[str, TensorSpec]:
    return {f"tensor_{index}": TensorSpec(torch.uint8, (MEBIBYTE,)) for index in range(mebibytes)}


def test_weights_that_a_disk_has_no_room_for_are_refused_before_one_is_written(small_disk: Path) -> None:
    free = shutil.disk_usage(small_disk).free
    says = rf"output_dir = {small_disk}: 8,388,608 bytes are needed there and {free:,} are free .*larger disk"
    with pytest.raises(UserError, match=says):
        ShardWriter(small_disk, _specs(8), max_shard_bytes=2 * MEBIBYTE)
    assert not list(small_disk.iterdir())
    assert shutil.disk_usage(small_disk).free == free


def test_a_limit_on_files_is_a_full_disk_too(tmp_path: Path) -> None:
    with _files_of_at_most(2 * MEBIBYTE), pytest.raises(UserError, match=r"3,145,728 bytes are needed"):
        ShardWriter(tmp_path, _specs(3))
    assert not list(tmp_path.iterdir())


def test_what_has_its_room_cannot_run_out_of_it(small_disk: Path) -> None:
    """Its shards are as long as they will be, so that another's files cannot take what is still to be written."""
    with ShardWriter(small_disk, specs := _specs(3)) as writer:
        with pytest.raises(UserError, match="bytes are needed there"), disk_full_as_user_error(small_disk):
            (small_disk / "another").write_bytes(bytes(2 * MEBIBYTE))
        for name, spec in specs.items():
            writer.write(name, torch.ones(spec.shape, dtype=spec.dtype))
    assert (small_disk / "model.safetensors").stat().st_size > 3 * MEBIBYTE


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), disk_full_as_user_error(tmp_path):
        (tmp_path / "missing").read_bytes()


def test_a_disk_that_fills_up_half_way(
    shrunk: list[str], disk_of: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """After all checks have passed somebody else takes the room; when it is free again the same command goes on."""
    disk = disk_of(640)  # half a GiB is asked for beforehand
    command = ["+experiment=quickstart", *shrunk, f"output_dir={disk}", "stages=[expand]", "expand=copy"]
    expand = disk / "artifacts" / "expand"
    other = threading.Thread(target=_fill_when, args=(disk, lambda: any(expand.glob("*.partial"))))
    other.start()
    assert main(command) == EXIT_REQUEST
    other.join()
    message = capsys.readouterr().err
    assert f"output_dir = {expand}" in message and "bytes are needed there and" in message
    assert "Traceback" not in message
    assert not list(expand.rglob("*model*")) and not list(expand.rglob("manifest.json"))
    (disk / "another's").unlink()
    assert main(command) == EXIT_DONE
    assert list(expand.glob("*/manifest.json"))


def _fill_when(disk: Path, begins: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not begins() and time.monotonic() < deadline:
        time.sleep(0.01)
    with open(disk / "another's", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - MEBIBYTE // 8)

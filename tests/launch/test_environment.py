"""The variables of the processes that the driver starts, and the directories for compiled code that they name."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.launch.environment import (
    child_environment,
    code_cache_faults,
    create_code_caches,
    is_secondary_copy,
    missing_for_compilation,
    other_nodes_fault,
    worker_environment,
)
from pipeline.launch.machine import Placement
from tests.plain_settings import cpu_launch

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = cpu_launch(processes=2)


def test_workers_can_import_this_package_and_run_the_interpreters_tools() -> None:
    inherited = {"PATH": "/usr/bin", "PYTHONPATH": "/mine"}
    environment = worker_environment(LAUNCH, Placement("cpu", 2, 3), inherited)
    assert environment["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    assert environment["PYTHONPATH"].split(":") == [str(ROOT), "/mine"]
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment["DS_ACCELERATOR"] == "cpu" and environment["CUDA_VISIBLE_DEVICES"] == ""


def test_memory_segments_grow_on_gpus_unless_the_user_has_configured_the_allocator() -> None:
    gpu = Placement("cuda", 2, 3)
    assert worker_environment(LAUNCH, gpu, {})["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_ALLOC_CONF" not in worker_environment(LAUNCH, Placement("cpu", 2, 3), {})
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        environment = worker_environment(LAUNCH, gpu, {name: "backend:cudaMallocAsync"})
        assert {value for key, value in environment.items() if "ALLOC_CONF" in key} == {"backend:cudaMallocAsync"}


def test_ranks_on_cpus_keep_freed_memory_unless_the_user_has_configured_malloc() -> None:
    cpu, thresholds = Placement("cpu", 2, 3), ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    environment = worker_environment(LAUNCH, cpu, {})
    assert all(int(environment[name]) >= 10**9 for name in thresholds)
    assert worker_environment(LAUNCH, cpu, {thresholds[0]: "1048576"})[thresholds[0]] == "1048576"
    assert not worker_environment(LAUNCH, Placement("cuda", 2, 3), {}).keys() & set(thresholds)


def test_what_compiling_needs_on_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}" if name in ("clang", "mycc") else None)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    rule, remedy = missing_for_compilation("cuda", {}) or ("", "")
    assert f"{tmp_path}/Python.h was not found" in rule and "python3-dev" in remedy
    (tmp_path / "Python.h").touch()
    assert missing_for_compilation("cuda", {}) is None
    assert missing_for_compilation("cuda", {"CC": "mycc"}) is None
    rule, remedy = missing_for_compilation("cuda", {"CC": "icc"}) or ("", "")
    assert "icc was not found" in rule and "set CC" in remedy
    monkeypatch.setattr("shutil.which", lambda name: None)
    rule, _ = missing_for_compilation("cuda", {}) or ("", "")
    assert "gcc or clang was not found" in rule


def test_ranks_of_one_node_listen_on_the_loopback_interface_only() -> None:
    inherited = {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "ib0"}
    one, two = (worker_environment(LAUNCH, Placement("cpu", 2, 1, nodes), inherited) for nodes in (1, 2))
    assert one["GLOO_SOCKET_IFNAME"] == one["NCCL_SOCKET_IFNAME"] == "lo"
    assert two["GLOO_SOCKET_IFNAME"] == "eth0" and two["NCCL_SOCKET_IFNAME"] == "ib0"


def test_variables_of_other_launchers_are_not_passed_on() -> None:
    dropped = (
        "RANK LOCAL_RANK GROUP_RANK ROLE_RANK NODE_RANK WORLD_SIZE LOCAL_WORLD_SIZE ROLE_WORLD_SIZE MASTER_ADDR "
        "MASTER_PORT PET_NNODES PET_RDZV_ENDPOINT TORCHELASTIC_RUN_ID TORCHELASTIC_USE_AGENT_STORE "
        "ACCELERATE_USE_DEEPSPEED ACCELERATE_MIXED_PRECISION OMPI_COMM_WORLD_RANK PMI_RANK CROSS_RANK"
    ).split()
    kept = ["HF_HOME", "MASTER_PLAN", "PETS", "NCCL_DEBUG", "SLURM_JOB_ID", "CUDA_VISIBLE_DEVICES"]
    environment = child_environment(LAUNCH, dict.fromkeys([*dropped, *kept], "1"))
    assert not environment.keys() & set(dropped) and environment.keys() >= set(kept)


TORCHRUN = {
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip
PYTORCH_JOB = {  # of Kubeflow, for one pod of two
    "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "RANK": "1", "WORLD_SIZE": "2", "PYTHONUNBUFFERED": "1",
}  # fmt: skip
TRAIN_JOB = {
    "PET_NNODES": "2", "PET_NPROC_PER_NODE": "auto", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "job-node-0-0.job",
    "PET_MASTER_PORT": "29400",
}  # fmt: skip


@pytest.mark.parametrize(
    "inherited, setting",
    [
        ({}, None),
        ({"WORLD_SIZE": "8", "RANK": "3"}, None),
        ({"RANK": "", "WORLD_SIZE": "two", "PET_NNODES": "", "MASTER_ADDR": "x"}, None),
        (TORCHRUN, None),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "WORLD_SIZE"),
        (PYTORCH_JOB, "WORLD_SIZE"),
        ({**PYTORCH_JOB, "PET_NNODES": "2", "PET_NPROC_PER_NODE": "4", "WORLD_SIZE": "8"}, "PET_NNODES"),
        ({**PYTORCH_JOB, "RANK": "0", "WORLD_SIZE": "4", "PET_NPROC_PER_NODE": "4"}, None),
        ({**PYTORCH_JOB, "RANK": "0", "WORLD_SIZE": "1"}, None),
        (TRAIN_JOB, "PET_NNODES"),
        ({**TRAIN_JOB, "PET_NNODES": "1:3"}, "PET_NNODES"),
        ({**TRAIN_JOB, "PET_NNODES": "1", "PET_NODE_RANK": "0"}, None),
    ],
)
def test_one_of_several_nodes_without_slurm_is_recognized(inherited: dict[str, str], setting: str | None) -> None:
    fault = other_nodes_fault(inherited)
    assert (None if fault is None else fault.setting) == setting


@pytest.mark.parametrize(
    "inherited, further",
    [
        ({}, False),
        ({"LOCAL_RANK": "1"}, False),
        (TORCHRUN, True),
        ({**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0"}, False),
        (PYTORCH_JOB, False),
        (TRAIN_JOB, False),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "CROSS_SIZE": "1"}, True),
    ],
)
def test_only_the_first_of_several_copies_on_a_node_runs(inherited: dict[str, str], further: bool) -> None:
    assert is_secondary_copy(inherited) == further


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that ``TRITON_CACHE_DIR`` names; the others are in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "shared" / "triton"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    return tmp_path / "shared" / "triton"


def test_directories_for_compiled_code_are_created_for_this_user_only(cache: Path) -> None:
    create_code_caches()
    environment = child_environment(LAUNCH, os.environ)
    for path in (cache, Path(environment["TORCHINDUCTOR_CACHE_DIR"])):
        assert path.stat().st_mode & 0o777 == 0o700 and path.stat().st_uid == os.geteuid()
    assert environment["TRITON_CACHE_DIR"] == str(cache)
    assert environment["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] == "0", "these would be in /tmp"
    create_code_caches()


def _writable(path: Path) -> None:
    path.mkdir()
    path.chmod(0o777)


def _of_another_user(path: Path) -> None:
    path.mkdir(mode=0o700)
    os.chown(path, 12345, -1)


@pytest.mark.parametrize(
    "plant, rule",
    [
        (_writable, "other users can write to it"),
        (lambda path: path.touch(), "it is not a directory"),
        (lambda path: path.symlink_to("/tmp"), "other users can write to it"),
        pytest.param(
            _of_another_user, "it belongs to another user", marks=pytest.mark.skipif(os.geteuid() != 0, reason="chown")
        ),
    ],
)
def test_directories_that_other_users_can_write_to_are_refused(
    plant: Callable[[Path], None], rule: str, cache: Path
) -> None:
    cache.parent.mkdir()
    plant(cache)
    with pytest.raises(UserError, match=rule) as error:
        create_code_caches()
    assert error.value.setting == "TRITON_CACHE_DIR"


def test_directory_that_imports_create_must_be_creatable(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.parent.touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache.parent / "x"))
    assert [fault.setting for fault in code_cache_faults(os.environ, needed=False)] == ["TORCHINDUCTOR_CACHE_DIR"]


def test_only_what_will_be_used_must_be_creatable(cache: Path) -> None:
    cache.parent.touch()
    create_code_caches()
    assert not list(code_cache_faults(os.environ, needed=False))
    assert [fault.setting for fault in code_cache_faults(os.environ, needed=True)] == ["TRITON_CACHE_DIR"]

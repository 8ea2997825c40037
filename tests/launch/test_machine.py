"""Detection of the hardware, and which part of it the workers use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.config import Launch
from pipeline.errors import UserError
from pipeline.launch import machine
from pipeline.launch.machine import Machine, Placement, place
from pipeline.launch.slurm import read_allocation


def _settings(**changes: object) -> Launch:
    return Launch(
        **{
            "device": "auto",
            "processes": "auto",
            "nodes": 1,
            "threads": "auto",
            "collective_timeout_seconds": 900,
            "wait_policy": "passive",
            "utilization": 0.4,
            **changes,
        }
    )


@pytest.mark.parametrize(
    "variables, device, refused",
    [
        ({"SLURM_GPUS_ON_NODE": "8"}, "auto", True),
        ({"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0,1"}, "auto", True),
        ({"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": ""}, "auto", False),  # the user has hidden them
        ({"SLURM_GPUS_ON_NODE": "8"}, "cpu", False),
        ({}, "auto", False),
    ],
)
def test_a_job_with_gpus_that_torch_cannot_use_does_not_fall_back_to_cpus(
    variables: dict[str, str], device: str, refused: bool, monkeypatch: pytest.MonkeyPatch
):
    job = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n1", "SLURMD_NODENAME": "n1"}
    for name in ("SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**job, **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(machine, "current_allocation", lambda: read_allocation(os.environ))
    monkeypatch.setattr(machine, "_torch_has_cuda", lambda: False)
    settings = _settings(device=device)
    if refused:
        with pytest.raises(UserError, match="8 GPUs per node, which torch cannot use"):
            place(settings, machine.detect_machine.__wrapped__())
    else:
        assert place(settings, machine.detect_machine.__wrapped__()).device == "cpu"


@pytest.mark.parametrize(
    "changes, machine, expected",
    [
        ({}, Machine(cores=8, gpus=0), Placement("cpu", 1, 8)),
        ({}, Machine(cores=16, gpus=4), Placement("cuda", 4, 4)),
        ({"device": "cpu"}, Machine(cores=16, gpus=4), Placement("cpu", 1, 16)),
        ({"device": "h100_80gb"}, Machine(cores=16, gpus=4), Placement("cuda", 4, 4)),
        ({"processes": 2}, Machine(cores=2, gpus=0), Placement("cpu", 2, 1)),
        ({"processes": 4, "threads": 3}, Machine(cores=2, gpus=0), Placement("cpu", 4, 3)),
        ({"processes": 2}, Machine(cores=16, gpus=4), Placement("cuda", 2, 8)),
    ],
)
def test_placement_follows_settings_and_machine(changes: dict[str, object], machine: Machine, expected: Placement):
    assert place(_settings(**changes), machine) == expected


@pytest.mark.parametrize(
    "changes, gpus, setting",
    [
        ({"device": "cuda"}, 0, "launch.device"),
        ({"device": "a100_40gb"}, 0, "launch.device"),
        ({"processes": 3}, 2, "launch.processes"),
    ],
)
def test_more_gpus_than_available_are_refused(changes: dict[str, object], gpus: int, setting: str):
    with pytest.raises(UserError) as error:
        place(_settings(**changes), Machine(cores=4, gpus=gpus))
    assert error.value.setting == setting


@pytest.mark.parametrize(
    "visible, gpus",
    [
        ("", 0), ("-1", 0), ("0", 1), ("2,5", 2), ("NoDevFiles", 0), ("none", 0), ("0,-1,2", 1), ("0, 1", 2),
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6,1", 2), ("MIG-GPU-8932f937/1/2", 1),
    ],
)  # fmt: skip
def test_gpus_hidden_from_this_process_are_not_counted(monkeypatch: pytest.MonkeyPatch, visible: str, gpus: int):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine._count_visible_gpus([]) == gpus


@pytest.mark.parametrize(
    "group, mount, limits, cores",
    [
        ("0::/a/b", "/ M rw - cgroup2 cgroup2 rw", {"a/b/cpu.max": "max 100000"}, 8),
        ("0::/a/b", "/ M rw - cgroup2 cgroup2 rw", {"a/b/cpu.max": "250000 100000"}, 2),
        ("0::/a/b", "/ M rw - cgroup2 cgroup2 rw", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        ("0::/", "/ M rw shared:1 - cgroup2 cgroup2 rw", {"cpu.max": "50000 100000"}, 1),
        ("0::/", "/ M rw - cgroup2 cgroup2 rw", {"cpu.max": "2000000 100000"}, 8),
        ("0::/", "/ M rw - cgroup2 cgroup2 rw", {"cpu.max": "unknown"}, 8),
        ("0::/a/b", "/a/b M rw - cgroup2 cgroup2 rw", {"cpu.max": "400000 100000"}, 4),
        ("4:cpu,cpuacct:/host/c", "/host/c M rw - cgroup cgroup rw,cpu,cpuacct", "v1", 3),
        ("4:cpu,cpuacct:/host/c", "/other M rw - cgroup cgroup rw,cpu,cpuacct", "v1", 3),
        ("4:memory:/host/c", "/host/c M rw - cgroup cgroup rw,memory", "v1", 8),
        ("4:cpu:/", "/ M rw - cgroup cgroup rw,cpu", {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, 8),
    ],
)
def test_cores_are_limited_by_the_quota_of_control_groups(
    group: str, mount: str, limits: dict[str, str] | str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    if isinstance(limits, str):
        limits = {"cpu.cfs_quota_us": "300000", "cpu.cfs_period_us": "100000"}
    for name, value in limits.items():
        file = tmp_path / "groups" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(value + "\n")
    (tmp_path / "cgroup").write_text(f"{group}\n")
    (tmp_path / "mountinfo").write_text(f"31 23 0:28 {mount.replace('M', str(tmp_path / 'groups'))}\n")
    assert machine.usable_cores(tmp_path) == cores


def test_cores_are_limited_by_the_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which a cpuset sets."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {2, 3, 5})
    assert machine.usable_cores(tmp_path) == 3

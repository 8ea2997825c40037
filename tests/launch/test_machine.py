"""Detection of the hardware, and which part of it the workers use."""

from __future__ import annotations

import pytest

from pipeline.config import Launch
from pipeline.errors import UserError
from pipeline.launch import machine
from pipeline.launch.machine import Machine, Placement, place


def _settings(**changes: object) -> Launch:
    return Launch(
        **{
            "device": "auto",
            "processes": "auto",
            "nodes": 1,
            "threads": "auto",
            "wait_policy": "passive",
            "utilization": 0.4,
            **changes,
        }
    )


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


@pytest.mark.parametrize("visible, gpus", [("", 0), ("-1", 0), ("0", 1), ("2,5", 2)])
def test_gpus_hidden_from_this_process_are_not_counted(monkeypatch: pytest.MonkeyPatch, visible: str, gpus: int):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine._count_visible_gpus([]) == gpus

"""Models are scored at the same time, each on its own share of the GPUs or cores."""

from __future__ import annotations

import threading
import time

import pytest

from pipeline.__main__ import compose_jobs
from pipeline.config import Settings
from pipeline.driver import parallel
from pipeline.driver.graph import Inputs, Node, build_graph
from pipeline.driver.parallel import MachineShare, StageProcesses, batches, build_all, shares_of
from pipeline.errors import Stopped, UserError, WorkersFailed
from pipeline.launch.machine import Machine

TIMEOUT = 10.0  # seconds
TARGETS = ["evaluate/load", "evaluate/expand", "evaluate/pretrain", "evaluate/sft"]


def settings_with(*overrides: str) -> Settings:
    return compose_jobs(["+experiment=quickstart", *overrides], False, None)[0].settings


@pytest.fixture
def evaluations() -> list[Node]:
    """The evaluations of the four default targets. That of ``expand`` may reuse that of ``load``."""
    nodes = build_graph(settings_with("output_dir=unused"), Inputs("m", "c", "i", "p"))
    (found,) = [batch for batch in batches(nodes) if len(batch) > 1]
    return found


def shares(count: int) -> list[MachineShare]:
    processes = StageProcesses()
    return [MachineShare(processes, settings_with().launch) for _ in range(count)]


def test_only_evaluations_in_sequence_are_built_together(evaluations: list[Node]) -> None:
    assert [node.name for node in evaluations] == TARGETS


def test_as_many_are_built_at_a_time_as_there_are_shares(evaluations: list[Node]) -> None:
    together, seen = threading.Barrier(3), []

    def build(node: Node, share: MachineShare) -> None:
        if node.name != "evaluate/expand":
            together.wait(TIMEOUT)  # raises if the other two do not run now
        seen.append(node.name)

    build_all(evaluations, shares(4), build)
    assert sorted(seen) == sorted(TARGETS)


def test_an_evaluation_comes_after_the_one_whose_scores_it_may_reuse(evaluations: list[Node]) -> None:
    ended: list[str] = []

    def build(node: Node, share: MachineShare) -> None:
        if node.name == "evaluate/load":
            time.sleep(0.1)
        if node.name == "evaluate/expand":
            assert "evaluate/load" in ended
        ended.append(node.name)

    build_all(evaluations, shares(4), build)
    assert len(ended) == 4


def test_a_share_is_used_by_one_at_a_time(evaluations: list[Node]) -> None:
    used: dict[int, int] = {}

    def build(node: Node, share: MachineShare) -> None:
        used[id(share)] = used.get(id(share), 0) + 1
        assert used[id(share)] == 1
        time.sleep(0.02)
        used[id(share)] -= 1

    build_all(evaluations, shares(2), build)
    assert len(used) == 2


def test_after_a_failure_the_others_end(evaluations: list[Node]) -> None:
    ended: list[str] = []
    running = threading.Barrier(2)

    def build(node: Node, share: MachineShare) -> None:
        if node.name == "evaluate/load":
            running.wait(TIMEOUT)
            raise WorkersFailed("stage evaluate/load: it failed")
        if node.name == "evaluate/pretrain":
            running.wait(TIMEOUT)
        with pytest.raises(Stopped):
            share.processes.run(["sleep", "60"], {})
        ended.append(node.name)

    started = time.monotonic()
    with pytest.raises(WorkersFailed, match="evaluate/load"):
        build_all(evaluations, shares(2), build)
    assert time.monotonic() - started < TIMEOUT
    assert "evaluate/pretrain" in ended and "evaluate/expand" not in ended


def test_models_share_the_gpus_or_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    def divided(machine: Machine, models: int, *overrides: str) -> list[tuple[str | None, object, object]]:
        monkeypatch.setattr(parallel, "detect_machine", lambda: machine)
        found = shares_of(settings_with(*overrides), models)
        assert len({id(share.processes) for share in found}) == 1
        devices = [share.variables.get("CUDA_VISIBLE_DEVICES") for share in found]
        return [(gpus, each.launch.processes, each.launch.threads) for gpus, each in zip(devices, found, strict=True)]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus = Machine(cores=64, gpus=8)
    assert divided(gpus, 4) == [("0,1", 2, 8), ("2,3", 2, 8), ("4,5", 2, 8), ("6,7", 2, 8)]
    assert divided(gpus, 3) == [("0,1,2", 3, 8), ("3,4,5", 3, 8), ("6,7", 2, 8)]
    assert divided(gpus, 1) == [(None, 8, "auto")]
    assert divided(gpus, 0) == [(None, "auto", "auto")]
    assert divided(gpus, 4, "evaluate.processes=2", "launch.threads=3") == [("0", 1, 3), ("1", 1, 3)]
    assert divided(gpus, 4, "launch.device=cpu") == [(None, 1, "auto")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-ab12,7")
    assert divided(Machine(cores=6, gpus=3), 4) == [("5", 1, 2), ("GPU-ab12", 1, 2), ("7", 1, 2)]
    cores = Machine(cores=4, gpus=0)
    assert divided(cores, 4) == [(None, 1, "auto")]  # on CPUs the cores are busy with one model
    assert divided(cores, 4, "evaluate.processes=2") == [(None, 1, 2), (None, 1, 2)]
    assert divided(cores, 1, "evaluate.processes=2") == [(None, 2, "auto")]


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "detect_machine", lambda: Machine(cores=8, gpus=2))
    with pytest.raises(UserError, match="each process uses one GPU, and 2 are available"):
        shares_of(settings_with("evaluate.processes=3"), 4)

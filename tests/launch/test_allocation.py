"""What Slurm's variables say about the job around a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.launch import slurm as allocation
from pipeline.launch.machine import Placement
from pipeline.launch.slurm import Allocation, escape_percent, read_allocation
from pipeline.launch.workers import srun_command

BATCH = {
    "SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_CPUS_PER_NODE": "16(x2),8",
    "SLURMD_NODENAME": "n1",
}  # fmt: skip


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"n[1-2]": ["n1", "n2"], "n1": ["n1"]}
    monkeypatch.setattr(allocation, "host_names", lambda node_list: known[node_list])


def test_there_is_none_outside_a_job() -> None:
    assert read_allocation({}) is None


def test_a_batch_job_stands_on_its_first_node() -> None:
    assert read_allocation(BATCH) == Allocation(job=12, nodes=("n1", "n2"), cpus=8, outside=False)


def test_workers_need_srun_on_other_nodes_and_from_a_login_node() -> None:
    one = {**BATCH, "SLURM_JOB_NODELIST": "n1"}
    here = read_allocation(one)
    login = read_allocation({name: value for name, value in one.items() if name != "SLURMD_NODENAME"})
    several = read_allocation(BATCH)
    assert here is not None and login is not None and several is not None
    assert [here.needs_srun, login.needs_srun, several.needs_srun] == [False, True, True]


def test_several_drivers_are_refused() -> None:
    step = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    with pytest.raises(UserError, match="Leave srun out"):
        read_allocation(step)
    assert read_allocation({**step, "SLURM_STEP_NUM_TASKS": "1"}) is not None


def test_jobs_meet_on_ports_of_their_own() -> None:
    ports = [Allocation(job, ("n1",), 1, False).ports() for job in range(100, 200)]
    assert len({tried[0] for tried in ports}) == 100, "jobs that run at once differ"
    for tried in ports:
        assert len(set(tried)) == len(tried) == allocation.PORT_ATTEMPTS
        assert all(20000 <= port < 32768 for port in tried)


def test_one_torchrun_a_node_is_started_by_srun() -> None:
    two = Allocation(12, ("n1", "n2"), cpus=8, outside=False)
    command = srun_command(
        "some.module", Path("/x/job.json"), Placement("cuda", 4, 2, 2), two, Path("/x/100%"), ("n1", 5)
    )
    node = command.index("pipeline.launch.child")
    srun, torchrun = command[: node - 2], command[node + 1 :]
    assert srun[0] == "srun"
    assert {"--nodes=2", "--ntasks=2", "--kill-on-bad-exit=1", "--overlap", "--export=ALL", "--cpus-per-task=8"} <= set(
        srun
    )
    assert "--output=/x/100%%/torchrun-%n.log" in srun
    assert {"--nnodes=2", "--nproc-per-node=4", "--master-addr=n1", "--master-port=5"} <= set(torchrun)
    assert torchrun[-3:] == ["-m", "some.module", "/x/job.json"]


def test_a_percent_sign_in_a_path_means_itself() -> None:
    assert escape_percent(Path("/a/50%")) == "/a/50%%"

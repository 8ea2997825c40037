"""Batch scripts, Slurm's answers, and the allocation around this process. Slurm's commands are replaced by scripts."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import Resources, Slurm
from pipeline.errors import UserError
from pipeline.launch import slurm
from pipeline.launch.slurm import (
    Allocation,
    BatchJob,
    JobInfo,
    SlurmUnreachable,
    batch_script,
    escape_percent,
    host_names,
    job_info,
    node_address,
    read_allocation,
)

RESOURCES = Resources(
    partition=None, nodes=4, gpus=8, cpus=64, memory="0", time="1-00:00:00", options=["--constraint=h100"]
)
ONE_NODE = RESOURCES.model_copy(update={"nodes": 1})
GENERAL = Slurm(
    partition="gpu", account=None, qos="long", environment=["module load cuda"], options=["--mail-type=FAIL"],
    signal_seconds=120, max_requeues_without_progress=3,
    **dict.fromkeys(("load", "expand", "tokenize", "evaluate", "report"), ONE_NODE), pretrain=RESOURCES, sft=RESOURCES,
)  # fmt: skip


def _script(resources: Resources = RESOURCES, command: tuple[str, ...] = ("python", "-m", "x")) -> str:
    job = BatchJob("run/pretrain", command, resources, Path("/home/me/my work"), Path("/logs/pretrain-%j.log"))
    return batch_script(job, GENERAL)


def _options(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_script_requests_the_resources_of_the_settings() -> None:
    assert set(_options(_script())) == {
        "--job-name=run/pretrain", "--chdir='/home/me/my work'", "--output=/logs/pretrain-%j.log",
        "--open-mode=append", "--partition=gpu", "--qos=long", "--nodes=4", "--ntasks-per-node=1",
        "--cpus-per-task=64", "--gpus-per-node=8", "--mem=0", "--time=1-00:00:00", "--signal=B:USR1@120",
        "--kill-on-invalid-dep=yes", "--requeue", "--mail-type=FAIL", "--constraint=h100",
    }  # fmt: skip


def test_options_that_are_not_set_are_left_to_the_cluster() -> None:
    bare = RESOURCES.model_copy(update={"gpus": 0, "memory": None, "partition": "cpu"})
    options = _options(_script(bare))
    assert "--partition=cpu" in options
    assert not [option for option in options if option.startswith(("--gpus", "--mem=", "--account"))]


def test_command_replaces_the_shell_after_the_environment_lines() -> None:
    lines = _script(command=("python", "a b", "$HOME")).splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert lines[-2:] == ["module load cuda", "exec python 'a b' '$HOME'"]


def test_failing_environment_line_ends_the_job(tmp_path: Path) -> None:
    broken = GENERAL.model_copy(update={"environment": ["false"]})
    job = BatchJob("x", ["touch", str(tmp_path / "started")], RESOURCES, tmp_path, tmp_path / "log")
    assert subprocess.run(["bash", "-c", batch_script(job, broken)]).returncode == 1
    assert not (tmp_path / "started").exists()


def test_working_directory_with_a_line_break_is_refused() -> None:
    job = BatchJob("x", ["true"], RESOURCES, Path("/home/me\ntouch started"), Path("/log"))
    with pytest.raises(UserError, match="chdir"):
        batch_script(job, GENERAL)


def test_percent_sign_in_a_path_is_escaped() -> None:
    assert escape_percent(Path("/a/50%")) == "/a/50%%"


# ------------------------------------------------------------------------------------- Slurm's answers


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``program("sbatch", stdout="12")`` puts a script of that name first on ``PATH``.

    The script appends its arguments to ``tmp_path/arguments``.
    """
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def make(name: str, stdout: str = "", stderr: str = "", status: int = 0) -> None:
        lines = [f"printf %s {shlex.quote(stdout)}", f"printf %s {shlex.quote(stderr)} >&2"]
        record = f'printf "%s\\n" "$@" >> {tmp_path}/arguments'
        (tmp_path / name).write_text("\n".join(["#!/bin/sh", *lines, record, f"exit {status}"]))
        (tmp_path / name).chmod(0o755)

    return make


JOB_12 = (
    "JobId=12 JobName=a b=c UserId=me(1000) JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=2 "
    "BatchFlag=1 Reboot=0 ExitCode=0:0 RunTime=00:10:00 TimeLimit=1-00:00:00 NodeList=n[1-2]"
)


def test_job_info_is_parsed(program: Callable[..., None]) -> None:
    program("scontrol", stdout=JOB_12)
    expected = JobInfo(
        12, "RUNNING", "None", 2, batch=True, may_requeue=True, run_time="00:10:00", time_limit="1-00:00:00"
    )
    assert job_info(12) == expected
    assert expected.active


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING", "RESV_DEL_HOLD", "SPECIAL_EXIT", "POWER_UP_NODE", "NEW"])
def test_a_job_is_active_unless_it_is_known_to_have_ended(state: str, program: Callable[..., None]) -> None:
    program("scontrol", stdout=JOB_12.replace("RUNNING", state))
    info = job_info(12)
    assert info is not None and info.active


@pytest.mark.parametrize("state", ["COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL"])
def test_a_job_that_has_ended_is_not_active(state: str, program: Callable[..., None]) -> None:
    program("scontrol", stdout=JOB_12.replace("RUNNING", state))
    info = job_info(12)
    assert info is not None and not info.active


def test_a_task_of_a_job_array_is_told_from_the_others(program: Callable[..., None], tmp_path: Path) -> None:
    """Slurm lists all tasks for the id of the array, which is also that of its last task, and would requeue all."""
    tasks = [
        JOB_12.replace("JobId=12", f"JobId={job} ArrayJobId=12 ArrayTaskId={task}").replace("RUNNING", state)
        for job, task, state in ((12, 2, "RUNNING"), (14, 1, "RUNNING"), (13, 0, "FAILED"))
    ]
    program("scontrol", stdout="\n".join(tasks) + "\n")
    found = {job: job_info(job) for job in (12, 13, 15)}
    last, first = found[12], found[13]
    assert last is not None and first is not None and found[15] is None
    assert (last.state, first.state) == ("RUNNING", "FAILED")
    slurm.requeue(last)
    assert (tmp_path / "arguments").read_text().splitlines()[-2:] == ["requeue", "12_2"]


def test_unknown_job_is_none_and_an_unreachable_controller_is_an_error(program: Callable[..., None]) -> None:
    program("scontrol", stderr="slurm_load_jobs error: Invalid job id specified\n", status=1)
    assert job_info(12) is None
    program("scontrol", stderr="slurm_load_jobs error: Unable to contact slurm controller\n", status=1)
    with pytest.raises(SlurmUnreachable, match="Unable to contact"):
        job_info(12)


def test_without_slurm_submission_is_refused_and_job_states_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="dry_run=true"):
        slurm.require_slurm()
    with pytest.raises(SlurmUnreachable):
        job_info(12)


def test_submitted_job_depends_on_its_parents_and_a_rejection_quotes_sbatch(
    program: Callable[..., None], tmp_path: Path
) -> None:
    program("sbatch", stdout="12;cluster\n")
    assert slurm.submit_script(Path("job.sh"), [3, 4]) == 12
    arguments = (tmp_path / "arguments").read_text().split()
    assert "--dependency=afterok:3:4" in arguments and "--hold" in arguments and arguments[-1] == "job.sh"
    program("sbatch", stderr="sbatch: error: invalid partition specified: x\n", status=1)
    program("scontrol", stdout="Slurmctld(primary) at n1 is UP\n")
    with pytest.raises(UserError, match="invalid partition specified: x"):
        slurm.submit_script(Path("job.sh"), [])
    program("scontrol", stdout="Slurmctld(primary) at n1 is DOWN\n", status=1)
    with pytest.raises(SlurmUnreachable, match="n1 is DOWN"):
        slurm.submit_script(Path("job.sh"), [])


@pytest.mark.parametrize("inside", [True, False])
def test_a_job_does_not_inherit_the_variables_of_the_job_that_submits_it(
    inside: bool, program: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of an interactive session. srun would take the session's memory and GPUs for those of the new job."""
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    access = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_CLUSTERS": "big", "SBATCH_ACCOUNT": "mine", "HF_TOKEN": "x"}
    session = {"SLURM_MEM_PER_CPU": "4096", "SLURM_GPUS": "1", "SLURM_RESTART_COUNT": "2", "CUDA_VISIBLE_DEVICES": "0"}
    for name, value in {**access, **session, **({"SLURM_JOB_ID": "7"} if inside else {})}.items():
        monkeypatch.setenv(name, value)
    program("sbatch", stdout="12\n")
    with open(tmp_path / "sbatch", "r+") as script:
        lines = script.read().replace("\nexit 0", f"\nenv > {tmp_path}/environment\nexit 0")
        script.seek(0)
        script.write(lines)
    slurm.submit_script(Path("job.sh"), [])
    passed = dict(line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines() if "=" in line)
    assert access.items() <= passed.items()
    assert session.keys() & passed.keys() == (set() if inside else session.keys())


def test_held_jobs_are_found_by_their_scripts(program: Callable[..., None]) -> None:
    queue = ["7|JobHeldUser|/a|b.sh", "8|JobHeldUser|/other.sh", "9|Dependency|/a|b.sh", "10_[1-3]|None|wrap"]
    program("squeue", stdout="\n".join(queue) + "\n")
    assert slurm.held_jobs(["/a|b.sh"]) == [7]


def test_node_lists_and_addresses_are_parsed(program: Callable[..., None]) -> None:
    program("scontrol", stdout="n1\nn2\n")
    assert host_names("n[1-2]") == ["n1", "n2"]
    program("scontrol", stdout="NodeName=n1 Arch=x86_64 NodeAddr=10.0.0.1 NodeHostName=n1 Port=6818")
    assert node_address("n1") == "10.0.0.1"


# ------------------------------------------------------------------------------- current allocation

BATCH = {
    "SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_CPUS_PER_NODE": "16(x2),8",
    "SLURMD_NODENAME": "n1",
}  # fmt: skip


@pytest.fixture
def node_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    expanded = {"n[1-2]": ["n1", "n2"], "n1": ["n1"]}
    monkeypatch.setattr(slurm, "host_names", lambda node_list: expanded[node_list])
    monkeypatch.setattr(shutil, "which", lambda program: f"/usr/bin/{program}")


def test_no_allocation_outside_a_job() -> None:
    assert read_allocation({}) is None


@pytest.mark.usefixtures("node_lists")
def test_batch_job_runs_on_its_first_node() -> None:
    assert read_allocation(BATCH) == Allocation(job=12, nodes=("n1", "n2"), cpus=8, outside=False)


@pytest.mark.usefixtures("node_lists")
def test_srun_is_needed_for_several_nodes_and_from_a_login_node() -> None:
    one = {**BATCH, "SLURM_JOB_NODELIST": "n1"}
    here = read_allocation(one)
    login = read_allocation({name: value for name, value in one.items() if name != "SLURMD_NODENAME"})
    several = read_allocation(BATCH)
    assert here is not None and login is not None and several is not None
    assert [here.needs_srun, login.needs_srun, several.needs_srun] == [False, True, True]


@pytest.mark.usefixtures("node_lists")
def test_several_drivers_are_refused() -> None:
    step = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    with pytest.raises(UserError, match="Omit srun"):
        read_allocation(step)
    assert read_allocation({**step, "SLURM_STEP_NUM_TASKS": "1"}) is not None


@pytest.mark.parametrize(
    "changes, cpus",
    [({}, 8), ({"SLURM_JOB_CPUS_PER_NODE": ""}, 1), ({"SLURMD_NODENAME": None, "SLURM_JOB_NODELIST": "HOST"}, 8)],
)
def test_single_node_needs_no_program_of_slurm(
    changes: dict[str, str | None], cpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container without these programs."""
    monkeypatch.setenv("PATH", "")
    host = socket.gethostname().partition(".")[0]
    job = {**BATCH, "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_CPUS_PER_NODE": "8", **changes}
    environment = {name: value.replace("HOST", host) for name, value in job.items() if value is not None}
    allocation = read_allocation(environment)
    assert allocation is not None and not allocation.needs_srun
    assert allocation.cpus == cpus and list(allocation.nodes) == [environment["SLURM_JOB_NODELIST"]]


@pytest.mark.parametrize("changes", [{}, {"SLURM_JOB_NODELIST": "another"}])
def test_other_nodes_without_srun_are_refused(changes: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="srun, which is not installed here"):
        read_allocation({**BATCH, **changes})


@pytest.mark.parametrize("job", ["", "none"])
def test_job_without_a_number_is_none(job: str) -> None:
    assert read_allocation({**BATCH, "SLURM_JOB_ID": job}) is None

"""Batch scripts are what Slurm's manual says; what Slurm answers is understood."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import Resources, Slurm
from pipeline.errors import UserError
from pipeline.launch import slurm
from pipeline.launch.slurm import (
    BatchJob,
    JobInfo,
    SlurmUnreachable,
    batch_script,
    host_names,
    job_info,
    node_address,
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


def test_a_script_asks_for_what_the_settings_say() -> None:
    assert set(_options(_script())) == {
        "--job-name=run/pretrain", "--chdir='/home/me/my work'", "--output=/logs/pretrain-%j.log",
        "--open-mode=append", "--partition=gpu", "--qos=long", "--nodes=4", "--ntasks-per-node=1",
        "--cpus-per-task=64", "--gpus-per-node=8", "--mem=0", "--time=1-00:00:00", "--signal=B:USR1@120",
        "--kill-on-invalid-dep=yes", "--requeue", "--mail-type=FAIL", "--constraint=h100",
    }  # fmt: skip


def test_what_is_not_set_is_left_to_the_cluster() -> None:
    bare = RESOURCES.model_copy(update={"gpus": 0, "memory": None, "partition": "cpu"})
    options = _options(_script(bare))
    assert "--partition=cpu" in options
    assert not [option for option in options if option.startswith(("--gpus", "--mem=", "--account"))]


def test_the_command_takes_the_shells_place_after_the_environment(tmp_path: Path) -> None:
    lines = _script(command=("python", "a b", "$HOME")).splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert lines[-2:] == ["module load cuda", "exec python 'a b' '$HOME'"]


def test_a_failing_environment_line_ends_the_job(tmp_path: Path) -> None:
    broken = GENERAL.model_copy(update={"environment": ["false"]})
    job = BatchJob("x", ["touch", str(tmp_path / "started")], RESOURCES, tmp_path, tmp_path / "log")
    assert subprocess.run(["bash", "-c", batch_script(job, broken)]).returncode == 1
    assert not (tmp_path / "started").exists()


# ------------------------------------------------------------------------------------- Slurm's answers


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``program("sbatch", says="12", fails_with=None)`` puts a program of that name first on the path."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def make(name: str, says: str = "", complains: str = "", status: int = 0) -> None:
        lines = [f"printf %s {shlex.quote(says)}", f"printf %s {shlex.quote(complains)} >&2"]
        record = f'printf "%s\\n" "$@" >> {tmp_path}/asked'
        (tmp_path / name).write_text("\n".join(["#!/bin/sh", *lines, record, f"exit {status}"]))
        (tmp_path / name).chmod(0o755)

    return make


SHOWN = (
    "JobId=12 JobName=a b=c UserId=me(1000) JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=2 "
    "BatchFlag=1 Reboot=0 ExitCode=0:0 RunTime=00:10:00 TimeLimit=1-00:00:00 NodeList=n[1-2]"
)


def test_a_job_is_described(program: Callable[..., None]) -> None:
    program("scontrol", says=SHOWN)
    expected = JobInfo(
        12, "RUNNING", "None", 2, batch=True, may_requeue=True, run_time="00:10:00", time_limit="1-00:00:00"
    )
    assert job_info(12) == expected
    assert expected.active


def test_a_job_that_slurm_forgot_is_none_and_silence_is_an_error(program: Callable[..., None]) -> None:
    program("scontrol", complains="slurm_load_jobs error: Invalid job id specified\n", status=1)
    assert job_info(12) is None
    program("scontrol", complains="slurm_load_jobs error: Unable to contact slurm controller\n", status=1)
    with pytest.raises(SlurmUnreachable, match="Unable to contact"):
        job_info(12)


def test_without_slurm_submission_is_refused_and_jobs_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="dry_run=true"):
        slurm.require_slurm()
    with pytest.raises(SlurmUnreachable):
        job_info(12)


def test_a_job_waits_for_its_parents_and_its_refusal_is_in_slurms_words(
    program: Callable[..., None], tmp_path: Path
) -> None:
    program("sbatch", says="12;cluster\n")
    assert slurm.submit_script(Path("job.sh"), [3, 4]) == 12
    asked = (tmp_path / "asked").read_text().split()
    assert "--dependency=afterok:3:4" in asked and "--hold" in asked and asked[-1] == "job.sh"
    program("sbatch", complains="sbatch: error: invalid partition specified: x\n", status=1)
    with pytest.raises(UserError, match="invalid partition specified: x"):
        slurm.submit_script(Path("job.sh"), [])


def test_nodes_are_named_and_reached(program: Callable[..., None]) -> None:
    program("scontrol", says="n1\nn2\n")
    assert host_names("n[1-2]") == ["n1", "n2"]
    program("scontrol", says="NodeName=n1 Arch=x86_64 NodeAddr=10.0.0.1 NodeHostName=n1 Port=6818")
    assert node_address("n1") == "10.0.0.1"

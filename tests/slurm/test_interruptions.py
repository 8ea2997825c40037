"""Preemption, failing nodes, time limits and dead workers: a job resumes, or reports what happened."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Workplace, final_states, info, resume_node, slurm, wait_until, workers
from tests.slurm.conftest import REPOSITORY, STEPS
from tests.test_pipeline import run


def test_job_that_is_preempted_and_loses_a_node_gives_the_weights_of_an_uninterrupted_run(
    full_run: Workplace, tokenized: Workplace
) -> None:
    job = tokenized.submit("stages=[pretrain]")["pretrain"]

    wait_until(lambda: tokenized.steps_done("pretrain") >= 20)
    slurm("scancel", "--signal=USR1", "--batch", str(job))  # the warning before a preemption or a time limit
    wait_until(lambda: info(job).restarts == 1)
    saved = tokenized.steps_done("pretrain")
    assert 20 <= saved < STEPS
    assert f"job {job} is requeued" in tokenized.log("pretrain")

    wait_until(lambda: tokenized.steps_done("pretrain") >= saved + 10)
    wait_until(lambda: f"resumed after step {saved}" in tokenized.log("pretrain"))
    slurm("scancel", "--signal=USR1", str(job))  # without --batch: to all processes that the job started
    wait_until(lambda: info(job).restarts == 2)
    saved = tokenized.steps_done("pretrain")

    wait_until(lambda: tokenized.steps_done("pretrain") >= saved + 10)
    wait_until(lambda: f"resumed after step {saved}" in tokenized.log("pretrain"))
    slurm("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    wait_until(lambda: info(job).restarts == 3)
    resume_node("n2")

    assert final_states([job]) == {job: "COMPLETED"}, tokenized.log("pretrain")
    assert tokenized.weights("pretrain") == full_run.weights("pretrain")


def test_job_of_scripts_submit_is_requeued_and_resumes_after_its_time_limit(
    full_run: Workplace, tokenized: Workplace
) -> None:
    shutil.rmtree(tokenized.directory / "outputs" / "artifacts" / "expand")
    command = ["+experiment=quickstart", *tokenized.overrides, "stages=[pretrain]"]
    options = ["--nodes=2", "--cpus-per-task=8", "--time=30", "--signal=B:USR1@60", "--chdir", tokenized.directory]
    output = subprocess.run(
        [REPOSITORY / "scripts" / "submit", *options, "--", *command],
        cwd=tokenized.directory, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    job = int(output.split()[-1])
    log = tokenized.directory / f"depth-growth-{job}.log"

    wait_until(lambda: tokenized.steps_done("pretrain") >= 20)
    ranks = workers(tokenized.directory).values()
    for process in ranks:  # so that the warning arrives during training on any machine
        os.kill(process, signal.SIGSTOP)
    minutes = int(info(job).run_time.split(":")[1]) + 2
    slurm("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
    wait_until(lambda: "stopping: the workers finish their step" in log.read_text())
    for process in ranks:
        os.kill(process, signal.SIGCONT)

    wait_until(lambda: info(job).restarts == 1)
    assert f"job {job} is requeued" in log.read_text()
    wait_until(lambda: info(job).state == "PENDING")
    slurm("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    assert final_states([job]) == {job: "COMPLETED"}, log.read_text()
    assert "resumed after step" in log.read_text()
    assert tokenized.weights("pretrain") == full_run.weights("pretrain")


KILL_BEFORE_RELEASE = """#!/bin/sh
[ "$1" != release ] || {{ kill -KILL $PPID; exit 1; }}
exec {scontrol} "$@"
"""


def test_killed_submission_leaves_no_held_jobs(
    overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workplace = Workplace(tmp_path, (*overrides, "stages=[expand]"))
    command = ["+experiment=quickstart", *workplace.overrides, "action=submit"]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(KILL_BEFORE_RELEASE.format(scontrol=shutil.which("scontrol")))
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    for resolve in ("status", "submit"):
        with monkeypatch.context() as patch:
            patch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
            assert run(*command, cwd=tmp_path)[0] == -signal.SIGKILL
        left = [entry["job"] for entry in workplace.jobs().values()]
        assert [info(job).reason for job in left] == ["JobHeldUser"] * 2
        workplace.command(f"action={resolve}")
        assert final_states(left) == dict.fromkeys(left, "CANCELLED")
    assert set(final_states(entry["job"] for entry in workplace.jobs().values()).values()) == {"COMPLETED"}


def test_killed_worker_is_named_and_all_other_workers_exit(full_run: Workplace, tokenized: Workplace) -> None:
    jobs = tokenized.submit("stages=[sft]", "pretrain.steps=100000")
    wait_until(lambda: tokenized.steps_done("pretrain") >= 3)
    ranks = workers(tokenized.directory)
    assert set(ranks) == {0, 1}
    os.kill(ranks[0], signal.SIGSTOP)  # it hangs, like in a collective that waits for a dead rank
    os.kill(ranks[1], signal.SIGKILL)
    killed = time.monotonic()
    wait_until(lambda: not workers(tokenized.directory), seconds=60)
    assert final_states(jobs.values()) == {jobs["pretrain"]: "FAILED", jobs["sft"]: "CANCELLED"}
    assert time.monotonic() - killed < 60
    assert re.search(r"ExitCode=1:0", slurm("scontrol", "show", "job", str(jobs["pretrain"])))
    log = tokenized.log("pretrain")
    message = log[log.index("rank 1 of 2 on node n2: killed by SIGKILL") :]
    assert "rank-1.log" in message and "  | " in message and "Traceback" not in log
    status = tokenized.command("stages=[sft]", "pretrain.steps=100000", "action=status")
    assert "FAILED" in status and "rank 1 of 2 on node n2: killed by SIGKILL" in status and "rank-1.log" in status


def test_run_inside_an_allocation_uses_all_nodes(full_run: Workplace, tokenized: Workplace) -> None:
    shutil.rmtree(tokenized.directory / "outputs" / "artifacts" / "expand")
    command = ["+experiment=quickstart", *tokenized.overrides, "stages=[pretrain]", "pretrain.steps=2"]
    python = str(REPOSITORY / ".venv" / "bin" / "python")
    answer = subprocess.run(
        ["salloc", "--nodes=2", "--cpus-per-task=8", python, "-m", "pipeline", *command],
        cwd=tokenized.directory, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert '"world_size": 2' in (tokenized.results() / "pretrain" / "training.json").read_text()

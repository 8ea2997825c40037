"""Preemption, failing nodes, time limits, dead workers: a job goes on where it was, or says what happened."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time

from tests.slurm.cluster import Workplace, bring_back, ends, info, slurm, wait_until, workers
from tests.slurm.conftest import REPOSITORY, STEPS


def test_preempted_and_bereft_of_a_node_it_ends_with_the_uninterrupted_runs_weights(
    whole: Workplace, tokenized: Workplace
) -> None:
    job = tokenized.submit("stages=[pretrain]")["pretrain"]

    wait_until(lambda: tokenized.steps_done("pretrain") >= 20)
    slurm("scancel", "--signal=USR1", "--batch", str(job))  # as Slurm warns ahead of a preemption or a time limit
    wait_until(lambda: info(job).restarts == 1)
    saved = tokenized.steps_done("pretrain")
    assert 20 <= saved < STEPS
    assert f"job {job} is requeued" in tokenized.log("pretrain")

    wait_until(lambda: tokenized.steps_done("pretrain") >= saved + 10)
    wait_until(lambda: f"resumed after step {saved}" in tokenized.log("pretrain"))
    slurm("scancel", "--signal=USR1", str(job))  # without --batch: to all that the job started on its nodes
    wait_until(lambda: info(job).restarts == 2)
    saved = tokenized.steps_done("pretrain")

    wait_until(lambda: tokenized.steps_done("pretrain") >= saved + 10)
    wait_until(lambda: f"resumed after step {saved}" in tokenized.log("pretrain"))
    slurm("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    wait_until(lambda: info(job).restarts == 3)
    bring_back("n2")

    assert ends([job]) == {job: "COMPLETED"}, tokenized.log("pretrain")
    assert tokenized.weights("pretrain") == whole.weights("pretrain")


def test_a_time_limit_is_survived_in_one_job_of_scripts_submit(whole: Workplace, tokenized: Workplace) -> None:
    shutil.rmtree(tokenized.directory / "outputs" / "artifacts" / "expand")
    command = ["+experiment=quickstart", *tokenized.overrides, "stages=[pretrain]"]
    options = ["--nodes=2", "--cpus-per-task=8", "--time=30", "--signal=B:USR1@60", "--chdir", tokenized.directory]
    said = subprocess.run(
        [REPOSITORY / "scripts" / "submit", *options, "--", *command],
        cwd=tokenized.directory, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    job = int(said.split()[-1])
    log = tokenized.directory / f"depth-growth-{job}.log"

    wait_until(lambda: tokenized.steps_done("pretrain") >= 20)
    ranks = workers(tokenized.directory).values()
    for process in ranks:  # however fast this machine is, the warning comes in the middle of training
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
    assert ends([job]) == {job: "COMPLETED"}, log.read_text()
    assert "resumed after step" in log.read_text()
    assert tokenized.weights("pretrain") == whole.weights("pretrain")


def test_a_killed_worker_takes_all_others_along_and_is_named(whole: Workplace, tokenized: Workplace) -> None:
    jobs = tokenized.submit("stages=[sft]", "pretrain.steps=100000")
    wait_until(lambda: tokenized.steps_done("pretrain") >= 3)
    ranks = workers(tokenized.directory)
    assert set(ranks) == {0, 1}
    os.kill(ranks[0], signal.SIGSTOP)  # it hangs, as in a collective that waits for the dead
    os.kill(ranks[1], signal.SIGKILL)
    killed = time.monotonic()
    wait_until(lambda: not workers(tokenized.directory), seconds=60)
    assert ends(jobs.values()) == {jobs["pretrain"]: "FAILED", jobs["sft"]: "CANCELLED"}
    assert time.monotonic() - killed < 60
    assert re.search(r"ExitCode=1:0", slurm("scontrol", "show", "job", str(jobs["pretrain"])))
    log = tokenized.log("pretrain")
    message = log[log.index("rank 1 of 2 on node n2: killed by SIGKILL") :]
    assert "rank-1.log" in message and "  | " in message and "Traceback" not in log
    told = tokenized.command("stages=[sft]", "pretrain.steps=100000", "action=status")
    assert "FAILED" in told and "rank 1 of 2 on node n2: killed by SIGKILL" in told and "rank-1.log" in told


OCCUPY = """
import os, socket, subprocess, sys
from pipeline.launch.slurm import current_allocation
with socket.create_server(("127.0.0.1", current_allocation().ports()[0])):
    sys.exit(subprocess.run([sys.executable, "-m", "pipeline", *sys.argv[1:]]).returncode)
"""


def test_inside_an_allocation_it_uses_all_nodes_and_finds_a_free_port(whole: Workplace, tokenized: Workplace) -> None:
    shutil.rmtree(tokenized.directory / "outputs" / "artifacts" / "expand")
    command = ["+experiment=quickstart", *tokenized.overrides, "stages=[pretrain]", "pretrain.steps=2"]
    python = str(REPOSITORY / ".venv" / "bin" / "python")
    answer = subprocess.run(
        ["salloc", "--nodes=2", "--cpus-per-task=8", python, "-c", OCCUPY, *command],
        cwd=tokenized.directory, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert answer.stderr.count("the port for the rendezvous is used") == 1
    assert '"world_size": 2' in (tokenized.results() / "pretrain" / "training.json").read_text()

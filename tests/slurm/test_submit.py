"""``action=submit`` on a real Slurm: what becomes a job, in what order, and what comes out of it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.slurm.cluster import Workplace, ends, info, slurm


def test_a_run_of_many_jobs_over_two_nodes_goes_from_load_to_report(whole: Workplace) -> None:
    jobs = {node: entry["job"] for node, entry in whole.jobs().items()}
    assert set(jobs) == {
        "load", "expand", "tokenize/corpus", "tokenize/instructions", "pretrain", "sft", "evaluate/load",
        "evaluate/sft", "report",
    }  # fmt: skip
    assert set(ends(jobs.values()).values()) == {"COMPLETED"}, [whole.log(node) for node in jobs]
    rows = json.loads((whole.results() / "report" / "results.json").read_text())
    assert {row["target"] for row in rows} >= {"load", "sft"}
    for stage in ("pretrain", "sft"):
        assert json.loads((whole.results() / stage / "training.json").read_text())["world_size"] == 2
        assert {path.name for path in (whole.results() / stage / "logs").glob("torchrun-*.log")} == {
            "torchrun-0.log", "torchrun-1.log",
        }  # fmt: skip


def test_what_is_there_is_not_submitted_again(whole: Workplace) -> None:
    ends(entry["job"] for entry in whole.jobs().values())
    assert "nothing was submitted" in whole.command("action=submit")
    before = whole.jobs()
    again = whole.submit("force=[report]")
    assert {node for node in again if again[node] != before[node]["job"]} == {"report"}
    assert ends([again["report"]]) == {again["report"]: "COMPLETED"}
    assert "build  report" in whole.log("report")


def test_a_script_can_be_submitted_again_by_hand(whole: Workplace) -> None:
    ends(entry["job"] for entry in whole.jobs().values())
    script = whole.jobs()["expand"]["script"]
    job = int(slurm("sbatch", "--parsable", script))
    assert ends([job]) == {job: "COMPLETED"}
    assert "everything is there" in (Path(script).parent / f"expand-{job}.log").read_text()


def test_status_knows_every_artifact_and_its_job(whole: Workplace) -> None:
    ends(entry["job"] for entry in whole.jobs().values())
    said = whole.command("action=status")
    for node, entry in whole.jobs().items():
        line = next(line for line in said.splitlines() if f" {node} " in line)
        assert "there" in line and f"job {entry['job']}" in line
    assert "step 300 of 300" in said


def test_a_sweep_submits_what_its_runs_share_once(overrides: tuple[str, ...], tmp_path: Path) -> None:
    place = Workplace(tmp_path, overrides)
    place.command("--multirun", "expand=copy,average,none", "stages=[expand,tokenize]", "action=submit", "name=sweep")
    runs = {name: place.jobs(f"sweep/expand-{name}") for name in ("copy", "average", "none")}
    for shared in ("load", "tokenize/corpus", "tokenize/instructions"):
        assert len({jobs[shared]["job"] for jobs in runs.values()}) == 1
    assert len({jobs["expand"]["job"] for jobs in runs.values()}) == 3
    report = place.jobs("sweep")["report"]["job"]
    jobs = {entry["job"] for run in runs.values() for entry in run.values()} | {report}
    assert len(jobs) == 3 + 3 + 1
    assert set(ends(jobs).values()) == {"COMPLETED"}
    for name in runs:
        assert (place.results(f"sweep/expand-{name}") / "load" / "model.safetensors").exists()
    assert (place.results("sweep") / "report" / "report.md").exists()


def test_two_runs_that_need_one_artifact_build_it_once(overrides: tuple[str, ...], tmp_path: Path) -> None:
    place = Workplace(tmp_path, overrides)
    jobs = [place.submit("stages=[load]", name=name)["load"] for name in ("one", "two")]
    assert set(ends(jobs).values()) == {"COMPLETED"}
    told = [place.log("load", name) for name in ("one", "two")]
    assert sum("done   load" in log for log in told) == 1
    assert sum("is building it" in log or "there  load" in log for log in told) == 1


def test_jobs_that_slurm_refuses_leave_an_empty_queue(overrides: tuple[str, ...], tmp_path: Path) -> None:
    from tests.test_pipeline import run

    arguments = ["+experiment=quickstart", *overrides, "action=submit", "slurm.report.partition=nowhere"]
    status, output = run(*arguments, cwd=tmp_path)
    assert status == 2
    assert "invalid partition" in output
    assert not [name for name in slurm("squeue", "--noheader", "--format=%Z").split() if name == str(tmp_path)]


def test_dry_run_prints_the_scripts_and_leaves_nothing(overrides: tuple[str, ...], tmp_path: Path) -> None:
    said = Workplace(tmp_path, overrides).command("action=submit", "dry_run=true")
    assert said.count("#!/usr/bin/env bash") == 9
    assert "#SBATCH --nodes=2" in said and "--signal=B:USR1@300" in said
    assert list(tmp_path.iterdir()) == []


def test_the_children_of_a_job_that_failed_leave_the_queue(overrides: tuple[str, ...], tmp_path: Path) -> None:
    place = Workplace(tmp_path, overrides)
    jobs = place.submit("stages=[expand]", 'slurm.environment=["exit 3"]')
    assert ends(jobs.values()) == {jobs["load"]: "FAILED", jobs["expand"]: "CANCELLED"}
    assert info(jobs["expand"]).restarts == 0

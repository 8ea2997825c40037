"""``action=submit`` on a real Slurm cluster: which jobs are submitted, their order and their results."""

from __future__ import annotations

import json
from pathlib import Path

from tests.slurm.cluster import Workplace, final_states, info, slurm


def test_run_of_many_jobs_on_two_nodes_completes_from_load_to_report(full_run: Workplace) -> None:
    jobs = {node: entry["job"] for node, entry in full_run.jobs().items()}
    assert set(jobs) == {
        "load", "expand", "tokenize/corpus", "tokenize/instructions", "pretrain", "sft", "evaluate/load",
        "evaluate/sft", "report",
    }  # fmt: skip
    assert set(final_states(jobs.values()).values()) == {"COMPLETED"}, [full_run.log(node) for node in jobs]
    rows = json.loads((full_run.results() / "report" / "results.json").read_text())
    assert {row["target"] for row in rows} >= {"load", "sft"}
    for stage in ("pretrain", "sft"):
        assert json.loads((full_run.results() / stage / "training.json").read_text())["world_size"] == 2
        assert {path.name for path in (full_run.results() / stage / "logs").glob("launcher-*.log")} == {
            "launcher-0.log", "launcher-1.log",
        }  # fmt: skip


def test_existing_artifacts_are_not_submitted_again(full_run: Workplace) -> None:
    final_states(entry["job"] for entry in full_run.jobs().values())
    assert "nothing was submitted" in full_run.command("action=submit")
    before = full_run.jobs()
    again = full_run.submit("force=[report]")
    assert {node for node in again if again[node] != before[node]["job"]} == {"report"}
    assert final_states([again["report"]]) == {again["report"]: "COMPLETED"}
    assert "build  report" in full_run.log("report")


def test_script_can_be_submitted_again_by_hand(full_run: Workplace) -> None:
    final_states(entry["job"] for entry in full_run.jobs().values())
    script = full_run.jobs()["expand"]["script"]
    job = int(slurm("sbatch", "--parsable", script))
    assert final_states([job]) == {job: "COMPLETED"}
    assert "all artifacts are complete" in (Path(script).parent / f"expand-{job}.log").read_text()


def test_status_shows_every_artifact_and_its_job(full_run: Workplace) -> None:
    final_states(entry["job"] for entry in full_run.jobs().values())
    output = full_run.command("action=status")
    for node, entry in full_run.jobs().items():
        line = next(line for line in output.splitlines() if f" {node} " in line)
        assert "complete" in line and f"job {entry['job']}" in line
    assert "step 200 of 200" in output


def test_sweep_submits_shared_artifacts_once(overrides: tuple[str, ...], tmp_path: Path) -> None:
    workplace = Workplace(tmp_path, overrides)
    workplace.command(
        "--multirun", "expand=copy,average,none", "stages=[expand,tokenize]", "action=submit", "name=sweep"
    )
    runs = {name: workplace.jobs(f"sweep/expand-{name}") for name in ("copy", "average", "none")}
    for shared in ("load", "tokenize/corpus", "tokenize/instructions"):
        assert len({jobs[shared]["job"] for jobs in runs.values()}) == 1
    assert len({jobs["expand"]["job"] for jobs in runs.values()}) == 3
    report = workplace.jobs("sweep")["report"]["job"]
    jobs = {entry["job"] for run in runs.values() for entry in run.values()} | {report}
    assert len(jobs) == 3 + 3 + 1
    assert set(final_states(jobs).values()) == {"COMPLETED"}
    for name in runs:
        assert (workplace.results(f"sweep/expand-{name}") / "load" / "model.safetensors").exists()
    assert (workplace.results("sweep") / "report" / "report.md").exists()


def test_two_runs_that_need_the_same_artifact_build_it_once(overrides: tuple[str, ...], tmp_path: Path) -> None:
    workplace = Workplace(tmp_path, overrides)
    jobs = [workplace.submit("stages=[load]", name=name)["load"] for name in ("one", "two")]
    assert set(final_states(jobs).values()) == {"COMPLETED"}
    logs = [workplace.log("load", name) for name in ("one", "two")]
    assert sum("done   load" in log for log in logs) == 1
    assert sum("is building it" in log or "exists load" in log for log in logs) == 1


def test_rejected_job_leaves_no_jobs_in_the_queue(overrides: tuple[str, ...], tmp_path: Path) -> None:
    from tests.test_pipeline import run

    arguments = ["+experiment=quickstart", *overrides, "action=submit", "slurm.report.partition=nowhere"]
    status, output = run(*arguments, cwd=tmp_path)
    assert status == 2
    assert "invalid partition" in output
    assert not [name for name in slurm("squeue", "--noheader", "--format=%Z").split() if name == str(tmp_path)]


def test_dry_run_prints_the_scripts_and_creates_no_files(overrides: tuple[str, ...], tmp_path: Path) -> None:
    output = Workplace(tmp_path, overrides).command("action=submit", "dry_run=true")
    assert output.count("#!/usr/bin/env bash") == 9
    assert "#SBATCH --nodes=2" in output and "--signal=B:USR1@300" in output
    assert list(tmp_path.iterdir()) == []


def test_children_of_a_failed_job_are_cancelled(overrides: tuple[str, ...], tmp_path: Path) -> None:
    workplace = Workplace(tmp_path, overrides)
    jobs = workplace.submit("stages=[expand]", 'slurm.environment=["exit 3"]')
    assert final_states(jobs.values()) == {jobs["load"]: "FAILED", jobs["expand"]: "CANCELLED"}
    assert info(jobs["expand"]).restarts == 0

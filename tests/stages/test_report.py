"""The report stage: roles of several runs in, one report and one table out."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.artifacts.task import StageTask, TrackingTarget
from pipeline.config import Report
from pipeline.report.runs import RunArtifacts
from pipeline.stages.report import directories, run
from tests.plain_settings import NO_TRACKING, cpu_launch
from tests.report.finished_runs import finished_run


def _task(root: Path, runs: list[RunArtifacts]) -> StageTask:
    out = root / "report.partial"
    out.mkdir()
    tracking = NO_TRACKING
    return StageTask(
        name="report",
        settings=Report(runs={run.name: run.method for run in runs}),
        parents={f"{run.name}:{role}": path for run in runs for role, path in run.directories.items()},
        out=out,
        seed=0,
        launch=cpu_launch(),
        tracking=TrackingTarget(tracking, "quickstart", "report", "0" * 16, root / "wandb"),
    )


def test_one_run(tmp_path: Path) -> None:
    task = _task(tmp_path, [finished_run(tmp_path / "runs", "quickstart", "lesa")])
    metrics = run(task)
    rows = json.loads((task.out / "results.json").read_text())
    assert {row["run"] for row in rows} == {"quickstart"} and {row["method"] for row in rows} == {"lesa"}
    assert metrics["rows"] == len(rows) == len(metrics["table"]["rows"])
    assert metrics["table"]["columns"] == list(rows[0])
    assert (task.out / "report.md").is_file() and (task.out / "report.html").is_file()


def test_a_sweep_keeps_its_runs_apart(tmp_path: Path) -> None:
    stages = ["load", "expand"]
    runs = [finished_run(tmp_path / "runs", f"sweep/expand-{m}", m, stages) for m in ("lesa", "copy", "none")]
    metrics = run(_task(tmp_path, runs))
    assert metrics["runs"] == 3
    assert {row[0] for row in metrics["table"]["rows"]} == {run.name for run in runs}


def test_roles_belong_to_the_run_before_the_last_colon() -> None:
    parents = {"a:load": Path("1"), "a:b:load": Path("2"), "a:evaluate/sft": Path("3")}
    assert directories(parents, "a") == {"load": Path("1"), "evaluate/sft": Path("3")}
    assert directories(parents, "a:b") == {"load": Path("2")}


def test_writing_again_over_a_killed_attempt_gives_the_same_report(tmp_path: Path) -> None:
    task = _task(tmp_path, [finished_run(tmp_path / "runs", stages=["load", "expand", "evaluate/load"])])
    (task.out / "results.json").write_text('[{"run": "qui')
    run(task)
    first = {path.name: path.read_bytes() for path in task.out.iterdir()}
    run(task)
    assert {path.name: path.read_bytes() for path in task.out.iterdir()} == first

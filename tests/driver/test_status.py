"""``action=status`` for a run that is in progress or has failed."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.__main__ import compose_jobs, main
from pipeline.config import Settings
from pipeline.driver.graph import Inputs, Node, build_graph
from pipeline.driver.run import FAILURE_FILE
from pipeline.driver.status import print_status
from pipeline.driver.submit import slurm_dir
from pipeline.driver.verify import verify
from pipeline.errors import EXIT_DONE
from pipeline.files import write_json
from pipeline.launch import slurm
from pipeline.launch.slurm import JobInfo

Run = tuple[Settings, dict[str, Node]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    settings = compose_jobs(["+experiment=quickstart", f"output_dir={tmp_path}"], False, None)[0].settings
    return settings, build_graph(settings, Inputs("m", "c", "i", "p"))


def _printed(run: Run) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_status(*run, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _line(run: Run, name: str) -> str:
    return next(line for line in _printed(run).splitlines() if f" {name} " in line)


def _training(run: Run, *lines: dict[str, float]) -> Node:
    """Make pretrain look as if it was running, with its data finished."""
    node = run[1]["pretrain"]
    data = node.parents["data"].artifact
    data.partial.mkdir(parents=True)
    write_json(data.partial / "dataset.json", {"blocks": {"train": 100}})
    data.commit({})
    (node.artifact.partial / "logs").mkdir(parents=True)
    (node.artifact.partial / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut')
    return node


@pytest.mark.parametrize("name", ["sweep/evaluate.tasks-[facts]", "a[/b]"])
@pytest.mark.parametrize("show", [print_status, lambda run, nodes, console: verify([(run, nodes)], console)])
def test_a_name_with_brackets_is_shown_as_it_is(
    name: str, show: Callable[[Settings, dict[str, Node], Console], None], run: Run
) -> None:
    """As a sweep over lists makes them. rich takes what is in brackets for a style."""
    console = Console(file=io.StringIO(), width=200)
    show(run[0].model_copy(update={"name": name}), run[1], console)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines()[0] == name


def test_running_training_shows_its_latest_metrics_and_the_time_left(run: Run) -> None:
    _training(run, {"step": 5, "loss": 3.0, "seconds": 50.0}, {"step": 6, "loss": 2.5, "seconds": 60.0})
    assert "step 6 of 8, loss 2.5, 0:00:20 left" in _line(run, "pretrain")
    assert "absent" in _line(run, "sft")


def test_training_without_its_data_shows_its_latest_metrics(run: Run) -> None:
    node = _training(run, {"step": 6, "loss": 2.5, "seconds": 60.0})
    node.parents["data"].artifact.path.rename(run[0].output_dir + "/removed")
    assert "step 6 of 8, loss 2.5" in _line(run, "pretrain")
    by_epochs = run[0].pretrain.model_copy(update={"steps": None, "epochs": 1.0})
    settings = run[0].model_copy(update={"pretrain": by_epochs})
    nodes = build_graph(settings, Inputs("m", "c", "i", "p"))
    node.artifact.partial.rename(nodes["pretrain"].artifact.partial)
    assert "step 6, loss 2.5" in _line((settings, nodes), "pretrain")


def _job(monkeypatch: pytest.MonkeyPatch, run: Run, state: str, reason: str = "None") -> None:
    info = JobInfo(12, state, reason, 1, batch=True, may_requeue=True, run_time="00:01:00", time_limit="01:00:00")
    monkeypatch.setattr(slurm, "job_info", lambda job: info)
    log = slurm_dir(run[0]) / "pretrain-12.log"
    log.parent.mkdir(parents=True)
    log.write_text("first\nOut of memory\n")
    entry = {"job": 12, "key": run[1]["pretrain"].artifact.key, "log": str(log)}
    write_json(log.parent / "jobs.json", {"pretrain": entry})


def test_a_running_job_is_shown_with_its_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _job(monkeypatch, run, "RUNNING")
    assert "job 12 RUNNING 00:01:00 of 01:00:00, restarts 1" in _line(run, "pretrain")


def test_a_failed_stage_shows_its_error_message(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _job(monkeypatch, run, "FAILED", "NonZeroExitCode")
    node = _training(run, {"step": 1, "loss": 3.0, "seconds": 1.0})
    (node.artifact.partial / FAILURE_FILE).write_text("rank 1 of 2: killed by SIGKILL\n  | boom\n")
    printed = _printed(run)
    assert (
        "job 12 FAILED (NonZeroExitCode)" in printed
        and "rank 1 of 2: killed by SIGKILL" in printed
        and "| boom" in printed
    )
    assert " left" not in printed


def test_a_failed_job_without_an_error_message_shows_the_end_of_its_log(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    _job(monkeypatch, run, "OUT_OF_MEMORY", "OutOfMemory")
    printed = _printed(run)
    assert "| Out of memory" in printed and "pretrain-12.log" in printed


def test_a_job_that_slurm_has_forgotten_shows_the_end_of_its_log(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some minutes after it failed. Not if the artifact has been finished, or something else builds it by now."""
    _job(monkeypatch, run, "FAILED")
    monkeypatch.setattr(slurm, "job_info", lambda job: None)
    printed = _printed(run)
    assert "job 12 ended, and Slurm has forgotten how" in printed and "| Out of memory" in printed
    node = _training(run)
    write_json(node.artifact.partial / "attempts.json", [{"started": 1.0, "seconds": None}])
    log = slurm_dir(run[0]) / "pretrain-12.log"
    for later, shown in ((-1, True), (1, False)):
        os.utime(node.artifact.partial / "attempts.json", (0, log.stat().st_mtime + later))
        assert ("| Out of memory" in _printed(run)) == shown
    os.utime(node.artifact.partial / "attempts.json", (0, 0))
    node.artifact.commit({})
    node.artifact.invalidate()
    assert "| Out of memory" not in _printed(run) and "job 12 ended" in _line(run, "pretrain")


def test_a_job_that_was_submitted_with_other_settings_is_not_shown(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _job(monkeypatch, run, "RUNNING")
    entry = {"job": 12, "key": "another", "log": "x"}
    write_json(slurm_dir(run[0]) / "jobs.json", {"pretrain": entry})
    assert "job" not in _line(run, "pretrain")


def test_watching_repeats_the_status_until_it_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.command.time.sleep", sleep)
    command = ["+experiment=quickstart", f"output_dir={tmp_path}", "action=status", "watch=true"]
    assert main([*command, "stages=[load]"]) == EXIT_DONE
    assert capsys.readouterr().out.count("absent   load") == 3
    assert main([*command, "stages=[]"]) == EXIT_DONE  # all artifacts are complete
    assert len(waits) == 3

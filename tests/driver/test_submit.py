"""Which batch jobs a run is submitted as, and their tasks. tests/slurm runs them on a real Slurm."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.__main__ import compose_jobs
from pipeline.artifacts.store import Artifact
from pipeline.config import Settings
from pipeline.driver import submit
from pipeline.driver.graph import Inputs, Node, build_graph, make_report
from pipeline.driver.status import print_status
from pipeline.driver.submit import StageJob, job_script, job_task, stage_jobs
from pipeline.errors import UserError
from pipeline.launch import slurm
from pipeline.launch.slurm import JobInfo, SlurmUnreachable

INPUTS = Inputs(model="m", corpus="c", instructions="i", interpreter="p")
CONSOLE = Console(quiet=True)


def _runs(tmp_path: Path, *overrides: str, multirun: bool = False) -> list[tuple[Settings, dict[str, Node]]]:
    jobs = compose_jobs(["+experiment=quickstart", f"output_dir={tmp_path}", *overrides], multirun, None)
    return [(job.settings, build_graph(job.settings, INPUTS)) for job in jobs]


def _finish(node: Node) -> None:
    node.artifact.partial.mkdir(parents=True)
    node.artifact.commit({})


def _position(jobs: list[StageJob]) -> dict[str, int]:
    return {job.node.artifact.key: index for index, job in enumerate(jobs)}


def test_each_missing_artifact_is_built_by_one_job_after_its_parents(tmp_path: Path) -> None:
    ((run, nodes),) = _runs(tmp_path)
    _finish(nodes["load"])
    jobs = stage_jobs([(run, nodes)], None)
    assert {job.node.name for job in jobs} == set(nodes) - {"load"}
    position = _position(jobs)
    for job in jobs:
        for parent in job.node.parents.values():
            assert position.get(parent.artifact.key, -1) < position[job.node.artifact.key]


def test_a_sweep_shares_jobs_and_ends_with_one_report(tmp_path: Path) -> None:
    runs = _runs(tmp_path, "expand=copy,average,none", multirun=True)
    whole = runs[0][0].model_copy(update={"name": "quickstart", "stages": ["report"]})
    jobs = stage_jobs(runs, (whole, {"report": make_report(whole, runs)}))
    counts = {name: sum(job.node.name == name for job in jobs) for name in ("load", "tokenize/corpus", "expand")}
    assert counts == {"load": 1, "tokenize/corpus": 1, "expand": 3}
    shared = next(job for job in jobs if job.node.name == "load")
    assert job_task(shared)["linked"] == ["quickstart/expand-average", "quickstart/expand-none"]
    assert jobs[-1].node.name == "report" and jobs[-1].runs == (whole,)
    assert len(job_task(jobs[-1])["sweep"]) == 3


def test_a_sweep_without_conversations_has_no_job_that_tunes(tmp_path: Path) -> None:
    runs = _runs(tmp_path, "expand=copy,none", "data.instructions=null", multirun=True)
    whole = runs[0][0].model_copy(update={"name": "quickstart", "stages": ["report"]})
    jobs = stage_jobs(runs, (whole, {"report": make_report(whole, runs)}))
    names = [job.node.name for job in jobs]
    assert names.count("pretrain") == 2 and {"tokenize/instructions", "sft", "evaluate/sft"}.isdisjoint(names)
    for job in jobs:
        assert Settings.model_validate_json(json.dumps(job_task(job)["run"])).data.instructions is None


def test_the_task_of_a_job_holds_its_settings_without_force(tmp_path: Path) -> None:
    ((run, nodes),) = _runs(tmp_path, "force=[expand]", "action=submit")
    _finish(nodes["load"])
    _finish(nodes["expand"])
    jobs = {job.node.name: job for job in stage_jobs([(run, nodes)], None)}
    assert jobs["expand"].redo and jobs["pretrain"].redo and not jobs["tokenize/corpus"].redo
    values = job_task(jobs["expand"])
    again = Settings.model_validate_json(json.dumps(values["run"]))
    assert build_graph(again, INPUTS)["expand"].artifact.key == values["key"] == nodes["expand"].artifact.key
    assert (again.action, again.force, again.stages) == ("run", [], ["expand"])


def test_each_stage_requests_its_own_resources(tmp_path: Path) -> None:
    ((run, nodes),) = _runs(tmp_path, "slurm=gpu", "slurm.pretrain.nodes=4")
    jobs = {job.node.name: job for job in stage_jobs([(run, nodes)], None)}
    assert "--nodes=4" in job_script(jobs["pretrain"]) and "--gpus-per-node=8" in job_script(jobs["pretrain"])
    assert "--gpus-per-node=1" in job_script(jobs["expand"])
    for cpu_stage in ("tokenize/corpus", "report", "load"):
        assert "--gpus" not in job_script(jobs[cpu_stage])
    assert f"export PYTHONPATH={Path(submit.__file__).resolve().parents[2]}" in job_script(jobs["load"])


@pytest.mark.parametrize("command", [None, "/where the command/was started"])
def test_a_job_finds_the_modules_of_its_environment_lines_too(
    command: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With --export=NONE as well, where the job does not inherit PYTHONPATH."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if command is not None:
        monkeypatch.setenv("PYTHONPATH", command)
    ((run, nodes),) = _runs(tmp_path, 'slurm.environment=["export PYTHONPATH=/shared/code"]')
    *lines, _ = job_script(stage_jobs([(run, nodes)], None)[0]).splitlines()
    script = "\n".join([*lines, "printenv PYTHONPATH"])
    answer = subprocess.run(["bash", "-c", script], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    repository = str(Path(submit.__file__).resolve().parents[2])
    assert answer.stdout.strip().split(":") == [repository, "/shared/code", *([command] if command else [])]


@pytest.mark.parametrize("wrong", ["slurm.evaluate.nodes=2", "slurm.load.time=1:2:3:4", "slurm.pretrain.gpus=-1"])
def test_invalid_resources_are_refused(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(UserError) as error:
        _runs(tmp_path, wrong)
    assert error.value.setting.startswith("slurm")


@pytest.mark.parametrize("time", ["00:06:00", "6", "6:00", "0-0:06"])
def test_a_time_limit_that_slurm_would_signal_at_the_start_is_refused(tmp_path: Path, time: str) -> None:
    """Of every job that would be submitted, the report on a sweep included."""
    limits = ("slurm=cpu", "slurm.signal_seconds=300", f"slurm.report.time='{time}'")
    runs = _runs(tmp_path, "expand=copy,none", "stages=[load]", *limits, multirun=True)
    assert stage_jobs(runs, None)
    whole = runs[0][0].model_copy(update={"name": "quickstart", "stages": ["report"]})
    with pytest.raises(UserError, match="must exceed 360 seconds") as refused:
        stage_jobs(runs, (whole, {"report": make_report(whole, runs)}))
    assert refused.value.setting == "slurm.report.time" and "at least 7 (minutes)" in refused.value.remedy


@pytest.mark.parametrize("time", ["00:06:01", "7", "6:01", "0-1", "1-00:00:00", "0"])
def test_a_longer_time_limit_or_none_is_accepted(tmp_path: Path, time: str) -> None:
    limits = ("slurm=cpu", "slurm.signal_seconds=300", f"slurm.load.time='{time}'")
    assert stage_jobs(_runs(tmp_path, "stages=[load]", *limits), None)


class FakeSlurm:
    """Records the requests; rejects the job whose script has the name ``refused``, or answers nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refused: str = "") -> None:
        self.parents: dict[str, list[int]] = {}
        self.released: list[int] = []
        self.cancelled: list[int] = []
        self.active: set[int] = set()
        self.held: dict[int, str] = {}  # job -> script
        self.answers_until_release = False
        self.answers = True
        self._refused = refused
        self._numbers = itertools.count(1)
        monkeypatch.setattr(slurm, "submit_script", self._submit)
        monkeypatch.setattr(slurm, "release", self._release)
        monkeypatch.setattr(slurm, "cancel", self._cancel)
        monkeypatch.setattr(slurm, "held_jobs", self._held_jobs)
        monkeypatch.setattr(slurm, "job_info", self._info)

    def _require_answer(self) -> None:
        if not self.answers:
            raise SlurmUnreachable("connect failure")

    def _submit(self, path: Path, parents: list[int]) -> int:
        assert os.access(path, os.X_OK)
        if path.stem == self._refused:
            raise UserError(setting="slurm", value=path, rule="no", remedy="none")
        self.parents[path.stem] = list(parents)
        self.held[number := next(self._numbers)] = str(path)
        return number

    def _release(self, jobs: list[int]) -> None:
        self.answers &= not self.answers_until_release
        self._require_answer()
        for job in jobs:
            del self.held[job]
        self.released += jobs

    def _cancel(self, jobs: list[int]) -> None:
        for job in jobs:
            del self.held[job]
        self.cancelled += jobs

    def _held_jobs(self, scripts: list[str]) -> list[int]:
        self._require_answer()
        return [job for job, script in self.held.items() if script in scripts]

    def _info(self, job: int) -> JobInfo | None:
        self._require_answer()
        state = "RUNNING" if job in self.active else "COMPLETED"
        return JobInfo(job, state, "None", 0, batch=True, may_requeue=True, run_time="", time_limit="")


def test_jobs_depend_on_the_jobs_of_their_parents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeSlurm(monkeypatch)
    ((run, nodes),) = _runs(tmp_path)
    _finish(nodes["load"])
    submit.submit_jobs(stage_jobs([(run, nodes)], None), CONSOLE)
    number = {name: index for index, name in enumerate(fake.parents, start=1)}
    assert fake.parents["expand"] == []
    assert fake.parents["pretrain"] == [number["expand"], number["tokenize-corpus"]]
    assert sorted(fake.released) == sorted(number.values())
    assert submit.submitted_jobs(run)["sft"]["job"] == number["sft"]


def test_no_job_is_queued_if_one_is_rejected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeSlurm(monkeypatch, refused="sft")
    ((run, nodes),) = _runs(tmp_path, "force=[load]")
    _finish(nodes["load"])
    with pytest.raises(UserError):
        submit.submit_jobs(stage_jobs([(run, nodes)], None), CONSOLE)
    assert fake.cancelled == list(range(1, len(fake.parents) + 1))
    assert not fake.released and nodes["load"].artifact.is_complete()


def test_jobs_left_held_are_cancelled_by_the_next_submission_or_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = FakeSlurm(monkeypatch)
    ((run, nodes),) = _runs(tmp_path, "stages=[expand]")
    jobs = stage_jobs([(run, nodes)], None)
    for resolve in (
        lambda: submit.submit_jobs(jobs, CONSOLE),
        lambda: print_status(run, nodes, CONSOLE),
    ):
        fake.answers_until_release = True  # as if the command was killed there: it can neither release nor cancel
        with pytest.raises(SlurmUnreachable, match="the next action=submit or action=status cancels them"):
            submit.submit_jobs(jobs, CONSOLE)
        left = [*fake.held]
        held_by_the_user = 100
        fake.held[held_by_the_user] = str(tmp_path / "other.sh")
        print_status(run, nodes, CONSOLE)  # without an answer it only says so
        fake.answers, fake.answers_until_release = True, False
        resolve()
        assert len(left) == 2 and fake.cancelled[-2:] == left
        assert [*fake.held] == [held_by_the_user]
        fake.held.clear()
    assert len(fake.released) == 2 and not [*tmp_path.glob("artifacts/submission-*.json")]


def test_scripts_and_settings_are_only_for_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    FakeSlurm(monkeypatch)
    ((run, nodes),) = _runs(tmp_path, "stages=[load]")
    before = os.umask(0o200)
    try:
        submit.submit_jobs(stage_jobs([(run, nodes)], None), CONSOLE)
    finally:
        os.umask(before)
    (task,) = submit.slurm_dir(run).glob("load-*.json")
    modes = [path.stat().st_mode & 0o777 for path in (submit.slurm_dir(run) / "load.sh", task)]
    assert modes == [0o500, 0o400]


def test_a_job_that_is_still_queued_is_not_submitted_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeSlurm(monkeypatch)
    ((run, nodes),) = _runs(tmp_path, "stages=[expand]")
    submit.submit_jobs(stage_jobs([(run, nodes)], None), CONSOLE)
    first = submit.submitted_jobs(run)["expand"]["job"]
    fake.active, fake.parents = {first}, {}
    _finish(nodes["load"])
    ((wider, wider_nodes),) = _runs(tmp_path, "stages=[pretrain]")
    submit.submit_jobs(stage_jobs([(wider, wider_nodes)], None), CONSOLE)
    assert "expand" not in fake.parents
    assert first in fake.parents["pretrain"]


def test_a_waiting_job_keeps_its_task_if_the_run_is_submitted_with_other_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Otherwise it would build what the second submission asks for, and nobody what the jobs that wait for it need."""
    fake = FakeSlurm(monkeypatch)
    scripts = []  # Slurm keeps a copy
    for rate in ("1.0e-4", "2.0e-4"):
        ((run, nodes),) = _runs(tmp_path, "stages=[pretrain]", f"pretrain.learning_rate={rate}")
        submit.submit_jobs(stage_jobs([(run, nodes)], None), CONSOLE)
        fake.active |= {entry["job"] for entry in submit.submitted_jobs(run).values()}
        scripts.append((nodes["pretrain"].artifact.key, (submit.slurm_dir(run) / "pretrain.sh").read_text()))
    for key, script in scripts:
        task = shlex.split(script.splitlines()[-1])[-1]
        assert json.loads(Path(task).read_text())["key"] == key


def test_forced_artifacts_are_invalidated_when_their_jobs_are_queued(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    FakeSlurm(monkeypatch)
    ((run, nodes),) = _runs(tmp_path, "force=[load]", "stages=[load]")
    _finish(nodes["load"])
    (job,) = stage_jobs([(run, nodes)], None)
    submit.submit_jobs([job], CONSOLE)
    artifact: Artifact = nodes["load"].artifact
    assert not artifact.is_complete() and artifact.path.exists()
    assert job.redo is not None and job.redo.is_interrupted(), "the same command would submit what is missing"
    _finish(nodes["load"])
    assert not job.redo.is_interrupted()

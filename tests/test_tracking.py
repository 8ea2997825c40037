"""Metrics are written to the JSONL and to W&B's files, and survive a restart."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from matplotlib.image import imsave

from pipeline.artifacts.task import TrackingTarget
from pipeline.config import Tracking
from pipeline.trackers import login_fault, not_installed, wandb_mode
from pipeline.tracking import Tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient


def _target(tmp_path: Path, wandb: str = "disabled", **changes: object) -> TrackingTarget:
    values = {"backend": "wandb", "log_model": False, "notify": None, "project": "depth-growth", "entity": None}
    settings = Tracking.model_validate({**values, "wandb": wandb, **changes})
    return TrackingTarget(settings, "quickstart", "pretrain", "0123456789abcdef", tmp_path / "runs")


def _picture(tmp_path: Path) -> Path:
    file = tmp_path / "loss.png"
    imsave(file, np.zeros((2, 3, 4)))
    return file


def _weights(tmp_path: Path) -> Path:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"the weights")
    return file


def _lines(tmp_path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def _read_with_wandb(file: Path) -> list[dict[str, Any]]:
    """Reads the records of a .wandb file with W&B's command line."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    answer = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in answer.stdout.splitlines()]


def test_offline_files_contain_metrics_settings_and_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    with Tracker(_target(tmp_path, "offline"), tmp_path, {"learning_rate": 0.001}) as tracker:
        tracker.log({"loss": 2.5}, step=1)
        tracker.log({"loss": 1.5}, step=7)
        tracker.table("results", ["metric", "value"], [["perplexity", 9.0]])
        tracker.images([_picture(tmp_path)])
        tracker.model("quickstart-sft", [_weights(tmp_path)])
    (file,) = (tmp_path / "runs").rglob("*.wandb")
    records = _read_with_wandb(file)
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert {item["_step"]: item["loss"] for item in history if "loss" in item} == {1: 2.5, 7: 1.5}
    (run,) = [record["run"] for record in records if record["type"] == "run"]
    assert (run["run_group"], run["job_type"], run["run_id"]) == ("quickstart", "pretrain", "0123456789abcdef")
    assert run["config"]["update"]["learning_rate"] == 0.001
    shown = {key for item in history for key in item}
    assert any(key.startswith("results") for key in shown) and any(key.startswith("plots/loss") for key in shown)
    (artifact,) = [record["artifact"] for record in records if record.get("artifact", {}).get("type") == "model"]
    assert artifact["name"] == "quickstart-sft"
    (content,) = artifact["manifest"]["contents"]
    assert content["ref"] == (tmp_path / "model.safetensors").as_uri()  # a reference, and not the weights
    texts = [path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert not any(b"the weights" in text for text in texts)
    assert not any(b"a" * 40 in text for text in texts), "the API key is in W&B's files"


@pytest.mark.parametrize(
    "setting, environment, expected",
    [
        ("offline", {}, "offline"),
        ("online", {"WANDB_MODE": "disabled"}, "disabled"),
        ("offline", {"WANDB_MODE": "online"}, "online"),
        ("online", {"WANDB_MODE": "dryrun"}, "offline"),
        ("online", {"WANDB_DISABLED": "true"}, "disabled"),
        ("online", {"WANDB_DISABLED": "false"}, "online"),
        ("disabled", {"WANDB_MODE": "online"}, "disabled"),
    ],
)
def test_the_environment_decides_the_mode_but_does_not_enable_wandb(
    setting: str, environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(_target(tmp_path, setting).settings) == expected


def test_a_disabled_environment_does_not_start_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with Tracker(_target(tmp_path, "online"), tmp_path, {}) as tracker:
        tracker.summary({"a": 1})
    assert not (tmp_path / "runs").exists()


def test_keys_that_wandb_rejects_are_refused(tmp_path: Path) -> None:
    nowhere = {"NETRC": str(tmp_path / "netrc")}
    for key in ("a" * 40, "local-" + "a" * 40, "wandb_v1_" + "a" * 40, "a.b.c"):
        assert login_fault({**nowhere, "WANDB_API_KEY": key}) is None
    for key in ("abc", "a" * 39, "a" * 40 + "\n", "a" * 40 + "!"):
        fault = login_fault({**nowhere, "WANDB_API_KEY": key})
        assert fault is not None and fault.setting == "WANDB_API_KEY" and key not in str(fault)
    fault = login_fault(nowhere)
    assert fault is not None and "wandb login" in fault.remedy


def test_a_login_on_a_server_of_ones_own_is_found(tmp_path: Path) -> None:
    """Its name need not contain "wandb". ``wandb login --host`` stores it in the settings."""
    nowhere = {"NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path)}
    (tmp_path / "netrc").write_text("machine ml.company.com\n  login user\n  password x\n")
    assert login_fault(nowhere) is not None
    assert login_fault({**nowhere, "WANDB_BASE_URL": "https://other.com:8080/api"}) is not None
    assert login_fault({**nowhere, "WANDB_BASE_URL": "https://ml.company.com:8080/api"}) is None
    (tmp_path / "settings").write_text("[default]\nbase_url = https://ml.company.com\n")
    assert login_fault(nowhere) is None
    assert login_fault({"NETRC": "/none", "WANDB_IDENTITY_TOKEN_FILE": "/token"}) is None


def test_jsonl_contains_the_logged_metrics(tmp_path: Path) -> None:
    with Tracker(_target(tmp_path), tmp_path, {}) as tracker:
        tracker.log({"loss": 2.5}, step=1)
    assert _lines(tmp_path) == [{"step": 1, "loss": 2.5}]


def test_restart_drops_lines_after_the_checkpoint_and_an_incomplete_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    with Tracker(_target(tmp_path), tmp_path, {}, resume_after=1) as tracker:
        tracker.log({"loss": 2.0}, step=2)
    assert _lines(tmp_path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]


def test_disabled_tracking_does_not_start_wandb(tmp_path: Path) -> None:
    with Tracker(_target(tmp_path), tmp_path, {}) as tracker:
        tracker.table("results", ["a"], [[1]])
        tracker.summary({"a": 1})
    assert not (tmp_path / "runs").exists()


def _log_twice(tmp_path: Path, backend: str) -> None:
    """A stage that is killed after step 3 and resumes after step 2."""
    target = _target(tmp_path, backend=backend)
    with suppress(KeyboardInterrupt), Tracker(target, tmp_path, {"learning_rate": 0.001}) as tracker:
        for step in (1, 2, 3):
            tracker.log({"loss": 4.0 - step}, step=step)
        raise KeyboardInterrupt
    with Tracker(target, tmp_path, {"learning_rate": 0.001}, resume_after=2) as tracker:
        tracker.log({"loss": 1.5}, step=3)
        tracker.table("results", ["metric", "value"], [["perplexity", 9.0]])
        tracker.summary({"best": 1.5})
        tracker.images([_picture(tmp_path)])
        tracker.model("quickstart-sft", [_weights(tmp_path)])


def test_tensorboard_shows_one_curve_with_tables_and_plots(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _log_twice(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "runs" / "tensorboard" / "pretrain" / "0123456789abcdef"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 3.0), (2, 2.0), (3, 1.5)]
    (image,) = events.Images("plots/loss")
    assert image.encoded_image_string == (tmp_path / "loss.png").read_bytes() and (image.width, image.height) == (3, 2)
    texts = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "| perplexity | 9.0 |" in texts["results/text_summary"]
    assert '"learning_rate": 0.001' in texts["settings/text_summary"]
    assert str(tmp_path / "model.safetensors") in texts["models/quickstart-sft/text_summary"]


def test_tensorboard_shows_no_step_of_an_attempt_without_a_checkpoint(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    target = _target(tmp_path, backend="tensorboard")
    for losses in ({0: 5.0, 1: 4.0, 2: 3.0}, {0: 5.5, 1: 4.5}):  # the first attempt is killed before its checkpoint
        with Tracker(target, tmp_path, {}) as tracker:
            for step, loss in losses.items():
                tracker.log({"loss": loss}, step=step)
    with Tracker(
        replace(target, run_id="f" * 16), tmp_path, {}
    ) as tracker:  # other settings, and therefore another key
        tracker.log({"loss": 9.0}, step=1)
    curves = {}
    for place in (tmp_path / "runs" / "tensorboard" / "pretrain").iterdir():
        events = EventAccumulator(str(place))
        events.Reload()
        curves[place.name] = [(event.step, event.value) for event in events.Scalars("loss")]
    assert curves == {target.run_id: [(0, 5.5), (1, 4.5)], "f" * 16: [(1, 9.0)]}


@pytest.fixture
def local_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """A client of the store in files that ``_target`` logs to."""
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return MlflowClient(tracking_uri=(tmp_path / "runs" / "mlruns").as_uri())


@pytest.mark.parametrize("uploads", [False, True])
def test_mlflow_continues_the_run_of_the_same_artifact(
    uploads: bool, tmp_path: Path, local_mlflow: MlflowClient
) -> None:
    _log_twice(tmp_path, "mlflow")
    if uploads:
        with Tracker(_target(tmp_path, backend="mlflow", log_model=True), tmp_path, {}, resume_after=3) as tracker:
            tracker.model("quickstart-sft", [_weights(tmp_path)])
    experiment = local_mlflow.get_experiment_by_name("depth-growth")
    (run,) = local_mlflow.search_runs([experiment.experiment_id])
    assert (run.info.status, run.info.run_name, run.data.params) == (
        "FINISHED", "quickstart/pretrain", {"learning_rate": "0.001"},
    )  # fmt: skip
    assert [(m.step, m.value) for m in local_mlflow.get_metric_history(run.info.run_id, "loss")][-1] == (3, 1.5)
    stored = tmp_path / "runs" / "mlruns"
    files = {path.name: path for path in stored.rglob("artifacts/**/*") if path.is_file()}
    assert json.loads(files["results.json"].read_text())["data"] == [["perplexity", 9.0]]
    assert files["loss.png"].read_bytes() == (tmp_path / "loss.png").read_bytes()
    assert ("model.safetensors" in files) == uploads and "quickstart-sft.json" in files


def test_mlflow_gets_metrics_whose_names_it_would_reject(tmp_path: Path, local_mlflow: MlflowClient) -> None:
    with Tracker(_target(tmp_path, backend="mlflow"), tmp_path, {}) as tracker:
        tracker.log({"sft/gsm8k/exact_match (strict-match)": 0.25, "loss": 2.0}, step=3)
    experiment = local_mlflow.get_experiment_by_name("depth-growth")
    (run,) = local_mlflow.search_runs([experiment.experiment_id])
    assert run.data.metrics == {"sft/gsm8k/exact_match _strict-match_": 0.25, "loss": 2.0}
    assert _lines(tmp_path) == [{"step": 3, "sft/gsm8k/exact_match (strict-match)": 0.25, "loss": 2.0}]


def test_mlflow_completes_the_run_of_an_attempt_that_was_killed_while_it_started(
    tmp_path: Path, local_mlflow: MlflowClient
) -> None:
    experiment = local_mlflow.create_experiment("depth-growth")
    run_id = local_mlflow.create_run(experiment, tags={"depth_growth_run": "0123456789abcdef"}).info.run_id
    local_mlflow.log_param(run_id, "workers", "1")
    with Tracker(_target(tmp_path, backend="mlflow"), tmp_path, {"workers": 2, "learning_rate": 0.001}):
        run = local_mlflow.get_run(run_id)
        assert (run.info.status, run.info.end_time) == ("RUNNING", None)
        assert run.data.params == {"workers": "1", "learning_rate": "0.001"}  # MLflow refuses to change a value
    assert local_mlflow.get_run(run_id).info.status == "FINISHED"


def test_mlflow_uses_an_experiment_that_another_stage_creates_at_the_same_time(
    tmp_path: Path, local_mlflow: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = type(local_mlflow).create_experiment

    def created_before(client: MlflowClient, name: str) -> str:
        create(local_mlflow, name)
        return str(create(client, name))

    monkeypatch.setattr(type(local_mlflow), "create_experiment", created_before)
    with Tracker(_target(tmp_path, backend="mlflow"), tmp_path, {}) as tracker:
        tracker.log({"loss": 2.0}, step=1)
    experiment = local_mlflow.get_experiment_by_name("depth-growth")
    assert len(local_mlflow.search_runs([experiment.experiment_id])) == 1


def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in ("wandb", "tensorboard", "mlflow", "none"):
        assert not_installed(_target(tmp_path, backend=backend).settings) is None
    monkeypatch.setattr("pipeline.trackers.find_spec", lambda name: None)
    fault = not_installed(_target(tmp_path, backend="mlflow").settings)
    assert fault is not None and fault.setting == "tracking.backend" and "pip install mlflow-skinny" in fault.remedy

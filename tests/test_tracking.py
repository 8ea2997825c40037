"""Metrics are written to the JSONL and to W&B's files, and survive a restart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts.task import TrackingTarget
from pipeline.config import Tracking
from pipeline.tracking import Tracker, login_fault, wandb_mode


def _target(tmp_path: Path, wandb: str = "disabled") -> TrackingTarget:
    settings = Tracking.model_validate({"wandb": wandb, "project": "depth-growth", "entity": None})
    return TrackingTarget(settings, "quickstart", "pretrain", "0123456789abcdef", tmp_path / "runs")


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
    (file,) = (tmp_path / "runs").rglob("*.wandb")
    records = _read_with_wandb(file)
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert {item["_step"]: item["loss"] for item in history if "loss" in item} == {1: 2.5, 7: 1.5}
    (run,) = [record["run"] for record in records if record["type"] == "run"]
    assert (run["run_group"], run["job_type"], run["run_id"]) == ("quickstart", "pretrain", "0123456789abcdef")
    assert run["config"]["update"]["learning_rate"] == 0.001
    texts = [path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()]
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

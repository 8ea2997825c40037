"""Build an artifact with a function in place of the stage."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.__main__ import compose_jobs
from pipeline.artifacts.task import Metrics, StageTask
from pipeline.driver.graph import Inputs, build_graph
from pipeline.driver.parallel import MachineShare
from pipeline.driver.run import run_graph
from pipeline.errors import WorkersFailed

CONSOLE = Console(quiet=True)
HOUR = 3600.0


def test_the_time_between_a_failed_attempt_and_the_next_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["+experiment=quickstart", f"output_dir={tmp_path}", "stages=[load]"]
    settings = compose_jobs(command, False, None)[0].settings
    nodes = build_graph(settings, Inputs("m", "c", "i", "p"))

    def fail(task: StageTask, share: MachineShare) -> Metrics:
        (task.out / "weights").write_text("some")
        raise WorkersFailed("killed")

    def succeed(task: StageTask, share: MachineShare) -> Metrics:
        for name in ("config.json", "model.safetensors"):
            (task.out / name).write_text("content")
        return {}

    monkeypatch.setattr("pipeline.driver.run._execute", fail)
    with pytest.raises(WorkersFailed):
        run_graph(settings, nodes, CONSOLE)
    _move_back_in_time(nodes["load"].artifact.partial, HOUR)
    monkeypatch.setattr("pipeline.driver.run._execute", succeed)
    run_graph(settings, nodes, CONSOLE)
    manifest = nodes["load"].artifact.manifest()
    assert manifest["attempts"] == 2 and manifest["seconds"] < HOUR / 2


def _move_back_in_time(partial: Path, seconds: float) -> None:
    """Make the last attempt look as if it started and ended that long ago."""
    file = partial / "attempts.json"
    attempts = json.loads(file.read_text())
    attempts[-1]["started"] -= seconds
    file.write_text(json.dumps(attempts))
    for path in partial.rglob("*"):
        status = path.stat()
        os.utime(path, (status.st_atime - seconds, status.st_mtime - seconds))

"""``force`` rebuilds each artifact once, and an interrupted command continues when it is repeated.

A function replaces the stages.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from pipeline import command
from pipeline.__main__ import compose_jobs
from pipeline.artifacts.store import Artifact
from pipeline.artifacts.task import Metrics, StageTask
from pipeline.driver.graph import STAGES
from pipeline.driver.parallel import MachineShare
from pipeline.errors import Stopped

CONSOLE = Console(quiet=True)


class Stages:
    """Takes the place of all stages.

    Attributes:
        stop_at: the stage that is stopped after it has saved a checkpoint.
        built: the stages that were finished since the last look, "resumed" if they had a checkpoint.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stop_at = ""
        self.built: list[str] = []
        monkeypatch.setattr("pipeline.driver.run._execute", self._execute)
        monkeypatch.setattr(command, "closing_table", lambda place: "")

    def _execute(self, task: StageTask, share: MachineShare) -> Metrics:
        checkpoint = task.out / "checkpoint"
        if task.name == self.stop_at:
            checkpoint.touch()
            raise Stopped("SIGTERM")
        self.built.append(f"{task.name} resumed" if checkpoint.exists() else task.name)
        for pattern in STAGES[task.name.partition("/")[0]].files:
            (task.out / pattern.replace("*", "")).write_text(f"written {len(self.built)}")
        return {}

    def run(self, *arguments: str, sweep: bool = False) -> list[str]:
        """Carries out a command, and returns what it built."""
        self.built.clear()
        command.execute(compose_jobs(["+experiment=quickstart", *arguments], sweep, None), CONSOLE)
        return [*self.built]

    def run_until(self, stage: str, *arguments: str, sweep: bool = False) -> list[str]:
        """Carries out a command that is stopped in one of the stages, and returns what it built."""
        self.stop_at = stage
        with pytest.raises(Stopped):
            self.run(*arguments, sweep=sweep)
        self.stop_at = ""
        return [*self.built]


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    return Stages(monkeypatch)


@pytest.fixture
def base(shrunk: list[str], tmp_path: Path) -> list[str]:
    return [*shrunk, "stages=[pretrain]", f"output_dir={tmp_path / 'out'}"]


BEFORE = ["load", "expand", "tokenize/corpus"]


def test_a_stopped_rebuild_continues_and_a_finished_one_begins_again(base: list[str], stages: Stages) -> None:
    forced = [*base, "force=[expand]"]
    assert stages.run_until("pretrain", *forced) == BEFORE  # nothing existed
    assert stages.run(*forced) == ["pretrain resumed"]
    assert stages.run(*forced) == ["expand", "pretrain"]
    assert stages.run_until("pretrain", *forced) == ["expand"]
    assert stages.run_until("pretrain", *forced) == []
    assert stages.run(*base) == ["pretrain resumed"], "another command completes it too"
    assert stages.run(*base) == []
    assert stages.run(*forced) == ["expand", "pretrain"]


def test_another_rebuild_discards_what_was_begun(base: list[str], stages: Stages) -> None:
    """A setting that is in no key, such as one that takes less memory, does not make it another."""
    assert stages.run_until("pretrain", *base) == BEFORE
    assert stages.run(*base, "force=[pretrain]") == ["pretrain"]
    assert stages.run_until("pretrain", *base, "force=[pretrain]") == []
    assert stages.run_until("pretrain", *base, "force=[pretrain]", "pretrain.micro_batch=1") == []
    assert stages.run(*base, "force=[pretrain]") == ["pretrain resumed"]
    assert stages.run_until("pretrain", *base, "force=[pretrain]") == []
    assert stages.run(*base, "force=[expand]") == ["expand", "pretrain"]


def test_a_command_killed_before_everything_was_invalidated_begins_again(
    base: list[str], stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced = [*base, "force=[expand]"]
    stages.run(*base)
    invalidate = Artifact.invalidate

    def killed(artifact: Artifact, rebuild: str = "") -> None:
        invalidate(artifact, rebuild)
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr(Artifact, "invalidate", killed)
        with pytest.raises(KeyboardInterrupt):
            stages.run(*forced)
    assert stages.run(*forced) == ["expand", "pretrain"]


def test_a_sweep_rebuilds_what_its_jobs_share_once(base: list[str], stages: Stages) -> None:
    """The report on the sweep depends on what is rebuilt."""
    forced = [*base, "force=[load]", "pretrain.ema_decay=0.99,null"]
    for _ in range(2):
        assert stages.run(*forced, sweep=True) == [*BEFORE, "pretrain", "pretrain", "report"]
    assert stages.run_until("expand", *forced, sweep=True) == ["load"]
    assert stages.run_until("report", *forced, sweep=True) == ["expand resumed", *BEFORE[2:], "pretrain", "pretrain"]
    assert stages.run(*forced, sweep=True) == ["report resumed"]

"""The command of ``tracking.notify`` runs when a run has ended or failed, and cannot change how it ended."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipeline.__main__ import compose_jobs, main
from pipeline.config import Settings
from pipeline.driver.notify import notified
from pipeline.errors import EXIT_REQUEST, Stopped, WorkersFailed


@pytest.fixture
def run(tmp_path: Path) -> Settings:
    """Notifies by appending its arguments to the file ``told``."""
    script = tmp_path / "tell"
    script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n')
    script.chmod(0o755)
    command = ["+experiment=quickstart", f"output_dir={tmp_path}", f"tracking.notify={script} me"]
    return compose_jobs(command, False, None)[0].settings


def _told(tmp_path: Path) -> list[str]:
    file = tmp_path / "told"
    return file.read_text().splitlines() if file.exists() else []


def test_the_end_of_a_run_is_told_with_its_report(run: Settings, tmp_path: Path) -> None:
    with notified(run, tmp_path / "report.md"):
        assert not _told(tmp_path)
    assert _told(tmp_path) == [f"me done {tmp_path}/report.md"]


def test_a_failure_is_told_and_raised(run: Settings, tmp_path: Path) -> None:
    with pytest.raises(WorkersFailed), notified(run, None):
        raise WorkersFailed("killed")
    assert _told(tmp_path) == [f"me failed {tmp_path}/quickstart"]


def test_a_stopped_run_and_a_part_of_one_are_not_told(run: Settings, tmp_path: Path) -> None:
    for stopped in (Stopped, KeyboardInterrupt):
        with pytest.raises(stopped), notified(run, tmp_path):
            raise stopped
    with notified(run, None):
        pass
    assert not _told(tmp_path)


def test_a_failing_command_is_reported_and_changes_nothing(
    run: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tell").write_text("#!/bin/sh\nexit 3\n")
    with notified(run, tmp_path):
        pass
    assert "tracking.notify failed" in capsys.readouterr().err


def test_a_command_that_has_vanished_does_not_hide_why_the_run_failed(
    run: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tell").unlink()
    with pytest.raises(WorkersFailed, match="killed"), notified(run, None):
        raise WorkersFailed("killed")
    assert "tracking.notify failed" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["no-such-program-4711", "'unclosed", sys.executable + "-missing"])
def test_a_command_that_does_not_exist_is_refused_before_anything_starts(
    command: str, shrunk: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quoted = command.replace("'", "\\'")
    status = main(["+experiment=quickstart", *shrunk, f"output_dir={tmp_path}/o", f"tracking.notify='{quoted}'"])
    message = capsys.readouterr().err
    assert status == EXIT_REQUEST and message.startswith("tracking.notify ="), message

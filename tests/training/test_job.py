from pathlib import Path

import pytest

from pipeline.files import write_json
from pipeline.training.job import LOGS, START_FILE, ProgressWatcher, last_logged


class SpyBar:
    """A substitute for a progress bar."""

    def __init__(self) -> None:
        self.moves: list[tuple[float, dict[str, float]]] = []

    def move_to(self, completed: float, note: str = "", **numbers: float) -> None:
        self.moves.append((completed, numbers))


def test_last_logged_ignores_an_incomplete_line(tmp_path: Path):
    metrics = tmp_path / "metrics.jsonl"
    assert last_logged(metrics, "loss") is None
    metrics.write_text('{"step": 1, "loss": 3.0}\n{"step": 1, "held_out_loss": 4.0}\n{"step": 2, "loss": 2.')
    assert last_logged(metrics, "loss") == {"step": 1, "loss": 3.0}


def test_last_logged_reads_the_end_of_a_long_file(tmp_path: Path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(50_000)))
    assert last_logged(metrics, "loss") == {"step": 49_999, "loss": 1.0}


def test_the_watcher_announces_once_and_then_follows_the_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bar = SpyBar()
    watcher = ProgressWatcher(tmp_path, bar)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 3, "loss": 9.0, "tokens_per_second": 1.0}\n')  # of an earlier attempt
    watcher()
    assert bar.moves == []
    (tmp_path / LOGS).mkdir()
    write_json(tmp_path / LOGS / START_FILE, {"summary": "the table", "notes": ["a note"], "resumed_after": 2})
    watcher()
    with open(metrics, "a") as stream:
        stream.write('{"step": 4, "loss": 1.5, "tokens_per_second": 20.0}\n')
    watcher()
    assert [completed for completed, _ in bar.moves] == [3, 4]
    assert bar.moves[-1][1] == {"loss": 1.5, "tokens_per_second": 20.0}
    assert capsys.readouterr().err == "resumed after step 2\na note\nthe table\n"

"""Progress in logs. Bars on terminals are drawn by rich."""

from __future__ import annotations

import io

import pytest

from pipeline.progress import progress


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stream = io.StringIO()
    monkeypatch.setattr("pipeline.progress._stream", stream)
    return stream


def test_log_lines_show_completed_units_note_and_numbers(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.progress.LINE_SECONDS", 0.0)
    monkeypatch.setattr("pipeline.progress.time.monotonic", lambda: 0.0)
    with progress("expand", total=8) as bar:
        bar.move_to(2)
        bar.advance(2, note="mlp.up_proj predictor 3/10", loss=0.5)
    first, second = log.getvalue().splitlines()
    assert first == "expand 2/8  0:00:00 elapsed"  # units of an earlier attempt do not affect the speed
    assert second == "expand 4/8  0:00:00 elapsed, 0:00:00 left  mlp.up_proj predictor 3/10  loss 0.5"


def test_log_lines_are_a_minute_apart(log: io.StringIO) -> None:
    with progress("copy", total=1000) as bar:
        for _ in range(1000):
            bar.advance()
    assert log.getvalue() == ""


def test_time_left_is_estimated_from_this_attempt_alone(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 100.0])
    monkeypatch.setattr("pipeline.progress.time.monotonic", lambda: next(clock, 100.0))
    with progress("expand", total=8) as bar:
        bar.move_to(4)
        bar.advance(1)
    assert log.getvalue() == "expand 5/8  0:01:40 elapsed, 0:05:00 left\n"

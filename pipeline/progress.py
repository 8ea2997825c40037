"""A progress bar for long work: rate, loss, time left. Where the output is no terminal, a line a minute instead."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeftColumn

LINE_SECONDS = 60.0  # between lines in a log
FORETELLABLE = 0.01  # of the work must be done before the rest's time means anything
SPEED_SECONDS = 3600.0  # over which a bar looks back: some work comes in pieces of minutes

_stream: TextIO | None = None  # None: standard error


def set_stream(stream: TextIO) -> None:
    """Bars go there from now on; for a process whose standard error is its log."""
    global _stream
    _stream = stream


class Bar:
    """One running bar."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task = bar, task
        self._started = self._told = time.monotonic()
        self._begun_at: float | None = None  # units that an earlier attempt had done

    def advance(self, amount: float = 1, note: str = "", **numbers: float) -> None:
        """Moves the bar on by ``amount`` and shows ``note`` and the named numbers after it."""
        self._begun_at = self._begun_at or 0.0
        self._bar.update(self._task, advance=amount, note=_note(note, numbers))
        self._tell()

    def move_to(self, completed: float, note: str = "", **numbers: float) -> None:
        """Sets the bar to ``completed``, at first to where the work begins; for work that reports where it stands."""
        self._begun_at = completed if self._begun_at is None else self._begun_at
        self._bar.update(self._task, completed=completed, note=_note(note, numbers))
        self._tell()

    def _tell(self) -> None:
        """A line, where there is no bar and the last one is a while ago."""
        now = time.monotonic()
        if self._bar.console.is_terminal or now - self._told < LINE_SECONDS:
            return
        self._told = now
        task = self._bar.tasks[self._task]
        left = _left(task, self._begun_at or 0.0, now - self._started)
        line = f"{task.description} {task.completed:,.0f}/{task.total or 0:,.0f}  {left}"
        print(f"{line}  {task.fields['note']}".rstrip(), file=self._bar.console.file, flush=True)


def _left(task: Task, begun_at: float, seconds: float) -> str:
    """Time gone and, where the work goes on as evenly as so far, left."""
    gone = f"{timedelta(seconds=round(seconds))} gone"
    done = task.completed - begun_at
    if not task.total or done < FORETELLABLE * task.total:
        return gone
    return f"{gone}, {timedelta(seconds=round(seconds * (task.total - task.completed) / done))} left"


def _note(note: str, numbers: dict[str, float]) -> str:
    shown = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers.items())
    return "  ".join(part for part in (note, shown) if part)


@contextmanager
def progress(description: str, total: float) -> Iterator[Bar]:
    """A bar over ``total`` units; lines where the output is no terminal."""
    console = Console(file=_stream or sys.stderr)
    columns = (
        TextColumn("{task.description:>18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeLeftColumn(),
        TextColumn("{task.fields[note]}"),
    )
    bar = Progress(
        *columns,
        console=console,
        disable=not console.is_terminal,
        transient=True,
        speed_estimate_period=SPEED_SECONDS,
    )
    with bar:
        yield Bar(bar, bar.add_task(description, total=total, note=""))

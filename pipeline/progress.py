"""Progress bars with metrics and the remaining time. If the output is not a terminal, prints a line per minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_SECONDS = 60.0  # between two lines in a log
MIN_FRACTION = 0.01  # fraction of the work that must be done before the remaining time is estimated
SPEED_SECONDS = 3600.0  # window over which a bar averages its speed; some work advances only every few minutes

_stream: TextIO | None = None  # None: standard error


def set_stream(stream: TextIO) -> None:
    """Sets the stream on which progress is shown, for a process whose standard error is redirected to a log."""
    global _stream
    _stream = stream


class ProgressBar:
    """A running progress bar, as yielded by ``progress``."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task = bar, task
        self._started = self._last_line = time.monotonic()
        self._initial: float | None = None  # units that an earlier attempt completed

    def advance(self, amount: float = 1, note: str = "", **numbers: float) -> None:
        """Advances the bar by ``amount`` and shows ``note`` and the named numbers."""
        self._initial = self._initial or 0.0
        self._bar.update(self._task, advance=amount, note=_format_note(note, numbers))
        self._print_line()

    def move_to(self, completed: float, note: str = "", **numbers: float) -> None:
        """Sets the bar to ``completed`` units and shows ``note`` and the named numbers.

        The units of the first call count as completed by an earlier attempt, and do not affect the remaining time.
        """
        self._initial = completed if self._initial is None else self._initial
        self._bar.update(self._task, completed=completed, note=_format_note(note, numbers))
        self._print_line()

    def _print_line(self) -> None:
        now = time.monotonic()
        if self._bar.console.is_terminal or now - self._last_line < LINE_SECONDS:
            return
        self._last_line = now
        task = self._bar.tasks[self._task]
        times = _format_times(task, self._initial or 0.0, now - self._started)
        line = f"{task.description} {task.completed:,.0f}/{task.total or 0:,.0f}  {times}"
        print(f"{line}  {task.fields['note']}".rstrip(), file=self._bar.console.file, flush=True)


def _format_times(task: Task, initial: float, seconds: float) -> str:
    """Returns the elapsed time and, once it can be estimated, the remaining time at the same speed."""
    elapsed = f"{timedelta(seconds=round(seconds))} elapsed"
    done = task.completed - initial
    if not task.total or done < MIN_FRACTION * task.total:
        return elapsed
    return f"{elapsed}, {timedelta(seconds=round(seconds * (task.total - task.completed) / done))} left"


def _format_note(note: str, numbers: dict[str, float]) -> str:
    shown = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers.items())
    return "  ".join(part for part in (note, shown) if part)


@contextmanager
def progress(description: str, total: float) -> Iterator[ProgressBar]:
    """Shows a progress bar over ``total`` units, or prints lines if the output is not a terminal."""
    console = Console(file=_stream or sys.stderr)
    columns = (
        TextColumn("{task.description:>18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
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
        yield ProgressBar(bar, bar.add_task(description, total=total, note=""))

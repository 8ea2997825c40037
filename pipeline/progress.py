"""A progress bar for long work: rate, loss, time left. Silent when the output is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeftColumn

_stream: TextIO | None = None  # None: standard error


def draw_on(stream: TextIO) -> None:
    """Bars go there from now on; for a process whose standard error is its log."""
    global _stream
    _stream = stream


class Bar:
    """One running bar."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def advance(self, amount: float = 1, note: str = "", **numbers: float) -> None:
        """Moves the bar on by ``amount`` and shows ``note`` and the named numbers after it."""
        self._bar.update(self._task, advance=amount, note=_note(note, numbers))

    def move_to(self, completed: float, note: str = "", **numbers: float) -> None:
        """Sets the bar to ``completed``; for work that reports where it stands."""
        self._bar.update(self._task, completed=completed, note=_note(note, numbers))


def _note(note: str, numbers: dict[str, float]) -> str:
    shown = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers.items())
    return "  ".join(part for part in (note, shown) if part)


@contextmanager
def progress(description: str, total: float) -> Iterator[Bar]:
    """A bar over ``total`` units; it draws nothing where the output is not a terminal."""
    console = Console(file=_stream or sys.stderr)
    columns = (
        TextColumn("{task.description:>18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeLeftColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        yield Bar(bar, bar.add_task(description, total=total, note=""))

"""Runs the user's command when a run has ended or failed, so that nobody has to watch it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.config import Settings
from pipeline.errors import Stopped, UserError, one_line

NOTIFY_SECONDS = 60.0  # after which a notification is given up


def notification(command: str) -> list[str]:
    """Returns the words of ``tracking.notify``.

    Raises:
        UserError: it is not a valid command, or its program does not exist.
    """
    try:
        words = shlex.split(command)
        problem = None if words and shutil.which(words[0]) else "there is no such program"
    except ValueError as error:  # an unclosed quotation
        problem = one_line(error).lower()
    if problem is not None:
        raise UserError(
            setting="tracking.notify",
            value=command,
            rule=f"this command is run when the run ends, and {problem}",
            remedy="Set it to a program on the PATH with its arguments; outcome and report path are added to them.",
        )
    return words


@contextmanager
def notified(run: Settings, report: Path | None) -> Iterator[None]:
    """Runs ``tracking.notify`` with ``done`` or ``failed`` and a path when what is inside ends.

    A run that a signal stops has not ended: the same command resumes it.

    Args:
        run: the settings.
        report: what has been built when all is done; None if other jobs complete the run.
    """
    try:
        yield
    except (Stopped, KeyboardInterrupt):
        raise
    except BaseException:
        _notify(run, "failed", Path(run.output_dir) / run.name)
        raise
    if report is not None:
        _notify(run, "done", report)


def _notify(run: Settings, outcome: str, path: Path) -> None:
    """Runs the command. Its failure is reported and changes nothing else."""
    if run.tracking.notify is None:
        return
    try:
        command = [*notification(run.tracking.notify), outcome, str(path.absolute())]
        subprocess.run(command, stdin=subprocess.DEVNULL, timeout=NOTIFY_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError, UserError) as error:  # also if the program has been removed meanwhile
        print(f"tracking.notify failed: {one_line(error)}", file=sys.stderr)

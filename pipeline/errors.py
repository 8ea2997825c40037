"""Exceptions that end a run without a result, and the exit codes of the command line.

The command line prints the messages of these exceptions without a traceback. Any other exception is a bug: its
traceback is printed, and the exit code is 1.
"""

from __future__ import annotations

from collections.abc import Sequence

EXIT_DONE, EXIT_FAILED, EXIT_REQUEST, EXIT_STOPPED = 0, 1, 2, 75
EXIT_INTERRUPTED = 130  # of the process that chats, after Ctrl-C while it loads the models


class UserError(Exception):
    """The request cannot be carried out: a setting, an input or the disk is not as it must be. Exit code 2.

    Nearly all are raised before anything is started, and the others by the stage that finds them.

    Args:
        setting: the dotted name that a user types, such as ``pretrain.sequence_length``.
        value: its current value.
        rule: what the value must be, and why.
        remedy: what to type or do instead.
    """

    def __init__(self, *, setting: str, value: object, rule: str, remedy: str) -> None:
        self.setting, self.rule, self.remedy = map(printable, (setting, rule, remedy))
        self.value = value if printable(str(value)) == str(value) else printable(str(value))
        super().__init__(f"{self.setting} = {self.value!s}: {self.rule}. {self.remedy}")

    def parts(self) -> dict[str, str]:
        """Returns the four parts as JSON values, to send to another process. ``UserError(**parts)`` is the inverse."""
        return {"setting": self.setting, "value": str(self.value), "rule": self.rule, "remedy": self.remedy}


def bad_model(where: object, rule: str, remedy: str) -> UserError:
    """Returns the error for a base model that cannot be used."""
    return UserError(setting="model.path", value=where, rule=rule, remedy=remedy)


class Stopped(Exception):
    """A signal stopped the run after its state was saved. The same command resumes it. Exit code 75."""


class TrainingFailure(Exception):
    """A rank cannot continue for a known reason: the loss diverged, a disk is full, or memory ran out.

    The message says what to do about it. The rank reports it to the driver, which raises ``WorkersFailed``.
    """


class Diverged(TrainingFailure):
    """The loss or a gradient is not finite. With the same settings, every attempt ends like this."""


class WorkersFailed(RuntimeError):
    """A process of a stage died. The message names the process, the cause, its last output and its log. Exit code 1."""


class OutOfMemory(WorkersFailed):
    """A process of a stage died because a GPU or the host ran out of memory."""


class NoProgress(RuntimeError):
    """A batch job was requeued several times without making progress. Exit code 1."""


class DamagedArtifacts(RuntimeError):
    """``action=verify`` found files that differ from what was committed. Exit code 1."""


def printable(text: str) -> str:
    """Returns a text with escapes for characters that a terminal would act on or cannot show.

    Messages quote what is in files and on the command line, such as a byte of a path that is not UTF-8.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def first_few(items: Sequence[str], count: int = 3, separator: str = ", ") -> str:
    """Joins the first items, and says how many more there are, such as ``a, b, c and 2 more``."""
    more = len(items) - count
    joint = " " if separator == ", " else separator
    return separator.join(items[:count]) + (f"{joint}and {more} more" if more > 0 else "")


def one_line(error: object) -> str:
    """Returns the beginning of a library's message, which may have many lines, for use inside another message."""
    return " ".join(str(error).split())[:300]

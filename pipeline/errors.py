"""The ways a run ends without a result, each with its exit code.

A fault of the user's is one sentence in four parts, and a dead worker or stage is told by its own last words; neither
shows the driver's traceback. Everything else is a defect of ours and keeps it (exit code 1).
"""

from __future__ import annotations


class UserError(Exception):
    """The request is wrong: exit code 2, nothing was started, nothing was lost.

    Args:
        setting: the dotted name a user can type, such as ``pretrain.sequence_length``.
        value: what it is now.
        rule: what it must be, and why.
        remedy: what to type or do instead.
    """

    def __init__(self, *, setting: str, value: object, rule: str, remedy: str) -> None:
        self.setting, self.value, self.rule, self.remedy = setting, value, rule, remedy
        super().__init__(f"{setting} = {value!s}: {rule}. {remedy}")

    def parts(self) -> dict[str, str]:
        """As JSON values, to be told across processes; ``UserError(**parts)`` is the inverse."""
        return {"setting": self.setting, "value": str(self.value), "rule": self.rule, "remedy": self.remedy}


class Stopped(Exception):
    """A signal stopped the run after its state was saved: exit code 75, the same command goes on."""


class NamedFailure(Exception):
    """What ended the work and can be said in a sentence, with what to do about it: exit code 1, no traceback."""


class WorkersFailed(RuntimeError):
    """A process of a stage died: exit code 1; the message says which, how, its last lines and where its log is."""


class OutOfMemory(WorkersFailed):
    """It died because it, or the system, had no more memory to give."""


class NoProgress(RuntimeError):
    """A batch job was requeued again and again and got nowhere: exit code 1."""


EXIT_DONE, EXIT_FAILED, EXIT_REQUEST, EXIT_STOPPED = 0, 1, 2, 75

"""``action=chat``: starts the process that talks to finished models in this terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.config import Settings
from pipeline.driver.target import FinishedModel
from pipeline.errors import EXIT_INTERRUPTED, UserError, WorkersFailed
from pipeline.files import write_json
from pipeline.launch.child import wait_or_terminate
from pipeline.launch.environment import child_environment
from pipeline.launch.failure import describe_exit
from pipeline.launch.workers import OUTCOME_FILE, load_outcome, raise_refusal
from pipeline.models.source import chat_template_of


def chat(run: Settings, models: list[FinishedModel]) -> None:
    """Lets the user talk to the models until the input ends.

    Raises:
        UserError: a model has no chat template, or cannot be loaded.
        WorkersFailed: the process died.
    """
    for model in models:
        if not chat_template_of(model.source, keep=False)[0]:
            raise _no_template(model, run)
    with TemporaryDirectory(prefix="chat-") as folder:
        request = Path(folder, "request.json")
        directories = {name: str(model.directory.absolute()) for name, model in _labels(models).items()}
        settings = {"chat": run.chat.model_dump(mode="json"), "launch": run.launch.model_dump(mode="json")}
        write_json(request, {"models": directories, **settings})
        status = _wait([sys.executable, "-m", "pipeline.chat", str(request), str(Path(folder, OUTCOME_FILE))], run)
        outcome = load_outcome(Path(folder))
    raise_refusal(outcome)
    if outcome["status"] != "done" and status != EXIT_INTERRUPTED:
        raise WorkersFailed(f"the chat {describe_exit(status)}")


def _labels(models: list[FinishedModel]) -> dict[str, FinishedModel]:
    """Returns the models by what precedes their answers: the name of a stage or directory, or paths if names repeat."""
    short = {Path(model.name).name: model for model in models}
    return short if len(short) == len(models) else {model.name: model for model in models}


def _wait(command: list[str], run: Settings) -> int:
    """Runs a command with this terminal, in which Ctrl-C stops an answer rather than this process."""
    process = subprocess.Popen(command, env=child_environment(run.launch, os.environ))
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return wait_or_terminate(process)
    finally:
        signal.signal(signal.SIGINT, previous)


def _no_template(model: FinishedModel, run: Settings) -> UserError:
    use_tuned = "Set target=sft" if run.tunes else "Set data.instructions to conversations, and target=sft"
    return UserError(
        setting=model.setting,
        value=model.name,
        rule="the model has no chat template, so it does not know how turns of a conversation are written",
        remedy=f"{use_tuned}: a tuned model has the template of the conversations that it was tuned on.",
    )

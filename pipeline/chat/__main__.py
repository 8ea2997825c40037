"""Talks to models: ``python -m pipeline.chat REQUEST.json OUTCOME.json``, in the terminal of the driver.

The request is ``{"models": {name: directory}, "chat": settings, "launch": settings}``. The outcome file has the form of
those of stages (see ``pipeline.stages.__main__``).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.config import Launch
from pipeline.config.actions import Chat
from pipeline.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_REQUEST, UserError
from pipeline.files import read_json, write_json
from pipeline.launch.child import end_with_parent, exit_process, importing


def main(request_file: Path, outcome_file: Path) -> int:
    """Runs the conversation, writes the outcome file and returns the exit code."""
    try:
        _run(read_json(request_file))
    except UserError as error:
        write_json(outcome_file, {"status": "refused", **error.parts()})
        return EXIT_REQUEST
    write_json(outcome_file, {"status": "done"})
    return EXIT_DONE


def _run(request: dict[str, Any]) -> None:
    # Imported here, so that the process watches its parent before it does anything that takes time.
    with importing():
        import torch
        from transformers.utils import logging

        from pipeline.chat.model import ChatModel
        from pipeline.chat.terminal import COMMANDS, converse, questions
        from pipeline.launch.environment import create_code_caches
        from pipeline.launch.machine import place_one_process

    create_code_caches()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    launch = Launch.model_validate_json(json.dumps(request["launch"]))
    placement = place_one_process(launch)
    torch.set_num_threads(placement.threads)
    settings = Chat.model_validate_json(json.dumps(request["chat"]))
    console = Console(highlight=False, soft_wrap=True)
    models = [
        ChatModel.load(name, Path(directory), placement.device, settings)
        for name, directory in request["models"].items()
    ]
    console.print(f"{', '.join(model.name for model in models)}: {COMMANDS}", markup=False)
    converse(models, questions(), console)


if __name__ == "__main__":
    end_with_parent(has_pipe=False)  # standard input is the user's
    try:
        status = main(Path(sys.argv[1]), Path(sys.argv[2]))
    except KeyboardInterrupt:  # while the models are loaded
        status = EXIT_INTERRUPTED
    exit_process(status)

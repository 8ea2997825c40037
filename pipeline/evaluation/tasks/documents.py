"""Documents of a bundled task, as written beside its scores; read into memory, nothing is cached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset


def read(documents: str, task: str, **metadata: Any) -> dict[str, Dataset]:
    """The one split of the task.

    Args:
        documents: the folder that has ``<task>.jsonl``; comes from the task manager.
        task: comes from the task's file.
        metadata: what else lm-eval knows about the task.
    """
    with open(Path(documents) / f"{task}.jsonl", encoding="utf-8") as stream:
        return {"test": Dataset.from_list([json.loads(line) for line in stream])}

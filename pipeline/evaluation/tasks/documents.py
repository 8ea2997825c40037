"""What the bundled tasks' YAML files name: how documents are read, into memory and without a cache, and aggregated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from pipeline.evaluation.scores import word_perplexity

__all__ = ["read", "word_perplexity"]


def read(documents: str, task: str, **metadata: Any) -> dict[str, Dataset]:
    """Returns the only split of a task.

    Args:
        documents: the directory that holds ``<task>.jsonl``. The task manager passes it.
        task: the name of the task. Its YAML file passes it.
        metadata: whatever else lm-eval passes about the task.
    """
    with open(Path(documents) / f"{task}.jsonl", encoding="utf-8") as stream:
        return {"test": Dataset.from_list([json.loads(line) for line in stream])}

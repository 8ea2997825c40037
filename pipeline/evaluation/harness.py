"""Scores one model on lm-eval tasks, one atomic file a task, so that a killed evaluation loses one task at most."""

from __future__ import annotations

import importlib.metadata
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported; there is a bar of ours

import numpy as np
import torch
from huggingface_hub.errors import HTTPError
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from pipeline.config import Evaluate
from pipeline.errors import UserError
from pipeline.evaluation.catalogue import BUNDLED, HELD_OUT_TEXT, PREFETCH
from pipeline.evaluation.lm import Judge
from pipeline.evaluation.scores import by_source, kept_samples, scores_of, text_scores
from pipeline.evaluation.task_documents import write_documents
from pipeline.files import read_json, write_json
from pipeline.launch.machine import Placement
from pipeline.models.tensors import DTYPES
from pipeline.models.vector_math import settle_vector_math

TASK_FILES = Path(__file__).parent / "tasks"
BOOTSTRAP_ITERATIONS = 1_000  # for metrics without a formula for their standard error
SEED = 1234  # of few-shot examples; lm-eval's own default


@dataclass(frozen=True)
class Target:
    """A model to score.

    Attributes:
        name: for the bar, ``evaluate/sft``.
        model: a Hugging Face directory.
        corpus: the tokenize/corpus artifact, for its held-out text.
        out: where ``tasks/`` and ``documents/`` go.
    """

    name: str
    model: Path
    corpus: Path
    out: Path
    placement: Placement  # one process is used


def score(target: Target, settings: Evaluate) -> dict[str, Any]:
    """Scores the tasks that have no file yet and gathers all of them.

    Raises:
        UserError: a task's data cannot be had, or a chat format is asked for that the model has not.
    """
    folder = target.out / "tasks"
    folder.mkdir(exist_ok=True)
    files = {task: folder / f"{task}.json" for task in settings.tasks}
    missing = [task for task, file in files.items() if not file.exists()]
    dtype = dtype_of(settings.dtype, target.placement.device)
    if missing:
        torch.set_num_threads(target.placement.threads)
        settle_vector_math()
        loaded = _load_tasks(missing, target, settings)  # data first: a model takes longer to load
        judge = Judge(target.model, DTYPES[dtype], target.placement.device, settings.batch_size)
        _check_chat_template(judge, target, settings)
        for task in missing:
            judge.start(f"{target.name} {task}")
            write_json(files[task], _score_task(task, loaded.pop(task), judge, settings))
    scored = {task: read_json(file) for task, file in files.items()}
    return {
        "rows": [row for answer in scored.values() for row in answer["rows"]],
        "prompt_format": settings.prompt_format,
        "dtype": dtype,
        "device": target.placement.device,
        "first_tokens": [{"task": task, "ids": answer["first_tokens"]} for task, answer in scored.items()],
        "seconds": {task: answer["seconds"] for task, answer in scored.items()},
        "lm_eval": importlib.metadata.version("lm-eval"),
    }


def dtype_of(dtype: str, device: str) -> str:
    """``auto`` is bfloat16 on a GPU and float32 on a CPU, where bfloat16 is slower unless the processor has it."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if device == "cuda" else "float32"


def _load_tasks(names: list[str], target: Target, settings: Evaluate) -> dict[str, Any]:
    """lm-eval's tasks with their data, by the name that was asked for."""
    documents = target.out / "documents"
    documents.mkdir(exist_ok=True)
    bundled = TaskManager(include_path=str(TASK_FILES), include_defaults=False, metadata={"documents": str(documents)})
    # lm-eval's own index takes many seconds to read, so it is read only when it is needed.
    others = TaskManager() if set(names) - set(BUNDLED) else None
    loaded = {}
    for name in names:
        if name in BUNDLED:
            write_documents(name, target.corpus, documents, settings.held_out_characters)
            loaded[name] = bundled.load([name])
        else:
            assert others is not None
            loaded[name] = _load_fetched(name, others)
        _set_fewshot(name, loaded[name]["tasks"], settings)
    return loaded


def _load_fetched(name: str, manager: TaskManager) -> Any:
    try:
        return manager.load([name])
    except (OSError, HTTPError) as error:
        raise UserError(
            setting="evaluate.tasks", value=name, rule=f"its data cannot be fetched ({error})", remedy=PREFETCH
        ) from error
    except (RuntimeError, ValueError) as error:  # datasets: a loading script, another format, no such split
        raise UserError(
            setting="evaluate.tasks", value=name, rule=f"its data cannot be read ({error})", remedy="Leave it out."
        ) from error


def _set_fewshot(name: str, tasks: Mapping[str, Any], settings: Evaluate) -> None:
    """As lm-eval's command line: a task that fixes zero examples keeps that."""
    asked = settings.num_fewshot
    wanted = asked.get(name) if isinstance(asked, dict) else asked
    for task in tasks.values():
        fixed = task.get_config("num_fewshot")
        if wanted is not None and fixed != 0:
            task.set_config(key="num_fewshot", value=wanted)
        elif fixed is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)


def _score_task(name: str, loaded: Any, judge: Judge, settings: Evaluate) -> dict[str, Any]:
    started = time.monotonic()
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    results = evaluate(
        lm=judge,
        task_dict=loaded,
        limit=settings.limit,
        bootstrap_iters=BOOTSTRAP_ITERATIONS,
        apply_chat_template=settings.prompt_format == "chat",
    )
    assert results is not None, "there is one process, and it has rank 0"
    sources = by_source(name, results) if name == HELD_OUT_TEXT else {}
    return {
        "task": name,
        "versions": results["versions"],
        "num_fewshot": results["n-shot"],
        "rows": [*scores_of(name, results), *text_scores(sources)],
        "first_tokens": judge.first_tokens,
        "seconds": round(time.monotonic() - started, 2),
        "samples": kept_samples({**results["samples"], **sources}),
    }


def _check_chat_template(judge: Judge, target: Target, settings: Evaluate) -> None:
    if settings.prompt_format == "chat" and not judge.tokenizer.chat_template:
        raise UserError(
            setting="evaluate.prompt_format",
            value="chat",
            rule=f"{target.name}: this model carries no chat template, and all targets share one prompt format",
            remedy="Say evaluate.prompt_format=plain.",
        )

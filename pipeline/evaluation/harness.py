"""Scores one model with lm-eval.

Each task's result is a separate file that is written atomically, so a killed evaluation loses at most one task.
"""

from __future__ import annotations

import importlib.metadata
import os
import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported; this package draws its own progress bar

import numpy as np
import torch
from huggingface_hub.errors import HTTPError
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory

from pipeline.config import Evaluate
from pipeline.errors import UserError
from pipeline.evaluation.catalogue import BUNDLED, HELD_OUT_TEXT, PREFETCH
from pipeline.evaluation.custom_tasks import CustomTasks, resolve_data_paths
from pipeline.evaluation.lm import LanguageModel
from pipeline.evaluation.scores import by_source, kept_samples, scores_of, text_scores
from pipeline.evaluation.sharing import ScoringRanks
from pipeline.evaluation.task_documents import write_documents
from pipeline.files import is_intact, read_json, seal, write_json
from pipeline.launch.machine import Placement
from pipeline.models.tensors import DTYPES, dtype_of
from pipeline.models.vector_math import initialize_vector_math

BUNDLED_TASK_FILES = Path(__file__).parent / "tasks"
BOOTSTRAP_ITERATIONS = 1_000  # for metrics without a closed form for their standard error
FEWSHOT_SEED = 1234  # lm-eval's default


@dataclass(frozen=True)
class ScoringJob:
    """One model to score.

    Attributes:
        name: the label of the progress bar, such as ``evaluate/sft``.
        model: a Hugging Face directory.
        corpus: the tokenize/corpus artifact, whose held-out text is scored.
        out: the directory that receives ``tasks/`` and ``documents/``.
        placement: the device and the number of threads. Processes are started elsewhere.
    """

    name: str
    model: Path
    corpus: Path
    out: Path
    placement: Placement


def score(job: ScoringJob, settings: Evaluate, ranks: ScoringRanks | None = None) -> None:
    """Scores the tasks that have no result file yet.

    Args:
        ranks: the processes that do this together. Rank 0 writes the files.

    Raises:
        UserError: a task's data cannot be read, or ``prompt_format=chat`` for a model without a chat template.
    """
    ranks = ranks or ScoringRanks()
    missing = missing_tasks(job, settings)
    if not missing:
        return
    torch.set_num_threads(job.placement.threads)
    initialize_vector_math()
    # The data comes first: it may be unreadable, and a model takes longer to load.
    loaded = _load_tasks(missing, job, settings) if ranks.rank == 0 else {}
    ranks.wait("loading the tasks")  # which downloads data, and writes the documents of bundled tasks
    loaded = loaded or _load_tasks(missing, job, settings, writes=False)
    dtype = dtype_of(settings.dtype, job.placement.device)
    if settings.backend == "vllm":
        # Once no task needs transformers' model any more, vLLM gets its memory.
        missing.sort(key=lambda name: _share_of_generation(loaded[name]))
    generates = settings.backend == "vllm" and _share_of_generation(loaded[missing[-1]]) > 0
    lm = _model_class(generates)(job.model, DTYPES[dtype], job.placement.device, settings.batch_size, ranks)
    _check_chat_template(lm, job, settings)
    for task in missing:
        if _share_of_generation(loaded[task]) == 1:
            lm.release_weights()
        lm.start(f"{job.name} {task}")
        print(f"{job.name}: scoring {task}", flush=True)  # in the log, whose last lines a failure message shows
        result = _score_task(task, loaded.pop(task), lm, settings, ranks.rank == 0)
        if result is not None:
            write_json(_result_file(job, task), result)
            seal(_seal_of(job, task), [_result_file(job, task)])
    ranks.wait("scoring")


def _share_of_generation(loaded: Any) -> float:
    """Returns the share of a group's tasks that generate text."""
    kinds = [task.OUTPUT_TYPE == "generate_until" for task in loaded["tasks"].values()]
    return sum(kinds) / len(kinds)


def _model_class(by_vllm: bool) -> type[LanguageModel]:
    if not by_vllm:
        return LanguageModel
    from pipeline.evaluation.vllm import VllmLanguageModel  # which imports vLLM

    return VllmLanguageModel


def missing_tasks(job: ScoringJob, settings: Evaluate) -> list[str]:
    """Returns the tasks that no attempt has completed."""
    (job.out / "tasks").mkdir(exist_ok=True)
    return [task for task in settings.tasks if not is_intact(_seal_of(job, task))]


def read_evaluation(job: ScoringJob, settings: Evaluate) -> dict[str, Any]:
    """Returns the results of all tasks, which have been scored: the contents of ``evaluation.json``.

    They are ``rows`` (see ``scores.Score``) and how they were obtained.
    """
    scored = {task: read_json(_result_file(job, task)) for task in settings.tasks}
    return {
        "rows": [row for result in scored.values() for row in result["rows"]],
        "prompt_format": settings.prompt_format,
        "dtype": dtype_of(settings.dtype, job.placement.device),
        "device": job.placement.device,
        "first_tokens": [{"task": task, "ids": result["first_tokens"]} for task, result in scored.items()],
        "seconds": {task: result["seconds"] for task, result in scored.items()},
        "lm_eval": importlib.metadata.version("lm-eval"),
    }


def _result_file(job: ScoringJob, task: str) -> Path:
    return job.out / "tasks" / f"{task}.json"


def _seal_of(job: ScoringJob, task: str) -> Path:
    return job.out / "tasks" / f".{task}.sha256"


def _score_task(
    name: str, loaded: Any, lm: LanguageModel, settings: Evaluate, writes: bool = True
) -> dict[str, Any] | None:
    """Scores one task and returns the contents of its result file.

    Args:
        loaded: what ``TaskManager.load`` returned for the task, group or tag.
        writes: whether this process writes the file. If not, it only takes part in scoring.
    """
    started = time.monotonic()
    # Few-shot examples and bootstrap samples must not depend on which tasks were scored before.
    random.seed(FEWSHOT_SEED)
    np.random.seed(FEWSHOT_SEED)
    torch.manual_seed(FEWSHOT_SEED)
    results = evaluate(
        lm=lm,
        task_dict=loaded,
        samples=documents_within(settings.limit, loaded["tasks"]),
        bootstrap_iters=BOOTSTRAP_ITERATIONS if writes else 0,
        apply_chat_template=settings.prompt_format == "chat",
    )
    assert results is not None, "lm-eval takes every process for the only one"
    if not writes:
        return None
    sources = by_source(name, results) if name == HELD_OUT_TEXT else {}
    # lm-eval reports nothing under the name of a tag, which only stands for its tasks.
    is_tag = name not in {*loaded["tasks"], *loaded["groups"]}
    rows = [
        *(row for each in (loaded["tasks"] if is_tag else [name]) for row in scores_of(each, results)),
        *text_scores(sources),
    ]
    return {
        "task": name,
        "versions": results["versions"],
        "num_fewshot": results["n-shot"],
        "rows": [{**row, "backend": _backend(row["task"], loaded, lm)} for row in rows],
        "first_tokens": lm.first_tokens,
        "seconds": round(time.monotonic() - started, 2),
        "samples": kept_samples({**results["samples"], **sources}, results),
    }


def documents_within(limit: int | None, tasks: Mapping[str, Any]) -> dict[str, list[int]] | None:
    """Returns the numbers of at most ``limit`` documents of every task, at equal distances, or None for all documents.

    lm-eval's own limit takes the first documents, which in many data sets are of one kind or source.
    """
    if limit is None:
        return None
    sizes = {name: len(task.eval_docs) for name, task in tasks.items()}
    return {name: [n * size // min(limit, size) for n in range(min(limit, size))] for name, size in sizes.items()}


def _backend(row: str, loaded: Any, lm: LanguageModel) -> str:
    """Returns the program that computed a row, with its version. That of a group is the one of any task with text."""
    tasks = loaded["tasks"]
    generates = _share_of_generation({"tasks": {row: tasks[row]}} if row in tasks else loaded) > 0
    return lm.generating_backend if generates else lm.scoring_backend


def _check_chat_template(lm: LanguageModel, job: ScoringJob, settings: Evaluate) -> None:
    if settings.prompt_format == "chat" and not lm.tokenizer.chat_template:
        raise UserError(
            setting="evaluate.prompt_format",
            value="chat",
            rule=f"the model of {job.name} has no chat template, and all targets share one prompt format",
            remedy="Set evaluate.prompt_format=plain.",
        )


# ------------------------------------------------------------------------------------- loading tasks


def _load_tasks(names: list[str], job: ScoringJob, settings: Evaluate, writes: bool = True) -> dict[str, Any]:
    """Loads lm-eval's tasks with their data, by requested name.

    Args:
        writes: whether this process writes the documents of bundled tasks.
    """
    documents = job.out / "documents"
    documents.mkdir(exist_ok=True)
    bundled = TaskManager(
        include_path=str(BUNDLED_TASK_FILES), include_defaults=False, metadata={"documents": str(documents)}
    )
    custom = CustomTasks(settings.include_path)
    others = _other_tasks([name for name in names if name not in BUNDLED], custom)
    loaded = {}
    for name in names:
        if name in BUNDLED:
            if writes:
                write_documents(name, job.corpus, documents, settings.held_out_characters)
            loaded[name] = bundled.load([name])
        elif name in custom.names:
            loaded[name] = _load_custom(name, others, custom)
        else:
            loaded[name] = _load_downloaded(name, others)
        _set_fewshot(name, loaded[name]["tasks"], settings)
    return loaded


def _other_tasks(names: Iterable[str], custom: CustomTasks) -> TaskManager:
    """Returns a task manager for everything but the bundled tasks."""
    # lm-eval's own index takes many seconds to read, so it is read only when it is needed.
    needs_defaults = any(name not in custom.names or custom.outside_names(name) for name in names)
    manager = TaskManager(include_path=list(custom.directories), include_defaults=needs_defaults)
    manager._factory = _CustomTaskFactory(custom.directories)
    return manager


class _CustomTaskFactory(TaskFactory):
    """Builds tasks with the data paths of user-defined YAML files resolved against the files' directories."""

    def __init__(self, directories: list[Path]) -> None:
        super().__init__()
        self._directories = directories

    def _load_full_config(self, entry: Any, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        config: dict[str, Any] = super()._load_full_config(entry, overrides)
        path = entry.yaml_path
        if path is None or not any(path.is_relative_to(directory) for directory in self._directories):
            return config
        resolved: dict[str, Any] = resolve_data_paths(config, path.parent)
        return resolved


def _load_custom(name: str, manager: TaskManager, custom: CustomTasks) -> Any:
    """Loads a user-defined task and renders its first document, so that mistakes show before a model is loaded."""
    try:
        loaded = manager.load([name])
        for task in loaded["tasks"].values():
            document = next(iter(task.eval_docs), None)
            if document is None:
                raise ValueError("its data is empty")
            task.doc_to_text(document)
            task.doc_to_target(document)
            if task.OUTPUT_TYPE == "multiple_choice":
                task.doc_to_choice(document)
            if (cluster := (task.get_config("metadata") or {}).get("cluster")) is not None:
                document[cluster]  # a KeyError if the data have no such field
    except (OSError, HTTPError) as error:
        raise _unfetched(name, error) from error
    except Exception as error:  # any exception may come from the user's YAML, templates or functions
        raise UserError(
            setting="evaluate.include_path",
            value=", ".join(str(file.path) for file in custom.files_of(name)),
            rule=f"lm-eval cannot build {name} from it ({type(error).__name__}: {error})",
            remedy="Correct the task. The fields that the YAML file uses must be columns of the data.",
        ) from error
    return loaded


def _load_downloaded(name: str, manager: TaskManager) -> Any:
    try:
        return manager.load([name])
    except (OSError, HTTPError) as error:
        raise _unfetched(name, error) from error
    except (RuntimeError, ValueError) as error:  # datasets: a loading script, an unknown format, a missing split
        raise UserError(
            setting="evaluate.tasks", value=name, rule=f"its data cannot be read ({error})", remedy="Leave it out."
        ) from error


def _unfetched(name: str, error: Exception) -> UserError:
    return UserError(
        setting="evaluate.tasks", value=name, rule=f"its data cannot be fetched ({error})", remedy=PREFETCH
    )


def _set_fewshot(name: str, tasks: Mapping[str, Any], settings: Evaluate) -> None:
    """Sets the number of few-shot examples as lm-eval's command line does: a task that fixes zero keeps zero."""
    requested = settings.num_fewshot
    wanted = requested.get(name) if isinstance(requested, dict) else requested
    for task in tasks.values():
        fixed = task.get_config("num_fewshot")
        if wanted is not None and fixed != 0:
            task.set_config(key="num_fewshot", value=wanted)
        elif fixed is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)

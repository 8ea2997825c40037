"""Checks which tasks exist and whether the requested ones can be scored. Imports neither torch nor lm-eval."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from pipeline.artifacts.fingerprints import Fingerprints
from pipeline.config import Evaluate
from pipeline.data.hub_datasets import check_reachable, find_dataset, is_offline
from pipeline.errors import UserError
from pipeline.evaluation.custom_tasks import CustomTasks, HubDataset
from pipeline.evaluation.installed_tasks import installed_datasets, installed_files
from pipeline.models.hub import PARALLEL_REQUESTS

HELD_OUT_TEXT = "held_out_text"
BUNDLED = (HELD_OUT_TEXT, "python_docs_mcq", "minimal_pairs")

# The tasks that conf/evaluate/ names. Their numbers of few-shot examples may stay when evaluate.tasks changes.
SUITE_TASKS = frozenset(
    "piqa winogrande arc_easy wikitext mmlu commonsense_qa boolq arc_challenge hellaswag truthfulqa_mc2 gsm8k "
    "openbookqa social_iqa race sciq lambada_openai".split()
)
# Tasks that have no few-shot examples, of the bundled ones and the suites. A number for them would have no effect.
ZERO_SHOT = frozenset({*BUNDLED, "truthfulqa_mc2"})

PREFETCH = (
    "Go online; or fetch them once on a machine with a network (there, with 'stages=[evaluate]' "
    "'evaluate.targets=[load]' evaluate.limit=1) and set HF_HUB_OFFLINE=1 here to use the cache; "
    "or use evaluate=bundled."
)


def validate_evaluation(evaluate: Evaluate) -> None:
    """Checks that every task exists and that its data can be read or downloaded.

    Raises:
        UserError: a task is unknown, a custom task file is invalid, a number of few-shot examples would have no effect,
            the Hub cannot be reached, or a dataset cannot be read there or, offline, is not in the cache.
    """
    if not evaluate.tasks:
        raise UserError(
            setting="evaluate.tasks",
            value="[]",
            rule="there is nothing to score",
            remedy=f"Bundled tasks: {', '.join(BUNDLED)}.",
        )
    custom = CustomTasks(evaluate.include_path)
    _check_collisions(custom)
    downloaded = [task for task in evaluate.tasks if _needs_hub(task, custom)]
    _check_fewshot(evaluate, custom)
    if downloaded:
        _check_datasets(downloaded, custom)


def fingerprint_tasks(evaluate: Evaluate, fingerprints: Fingerprints) -> dict[str, str]:
    """Returns a content hash for every requested task that is the user's own, by name.

    Raises:
        UserError: a custom task file is missing or is not valid YAML.
    """
    custom = CustomTasks(evaluate.include_path)
    return {task: custom.fingerprint(task, fingerprints) for task in evaluate.tasks if task in custom.names}


def _check_collisions(custom: CustomTasks) -> None:
    for task in BUNDLED:
        if task in custom.names:
            raise UserError(
                setting="evaluate.include_path",
                value=", ".join(map(str, custom.directories)),
                rule=f"it defines {task}, which is the name of a bundled task",
                remedy="Rename the task.",
            )


def _check_fewshot(evaluate: Evaluate, custom: CustomTasks) -> None:
    """Checks that every number of few-shot examples applies to a task. Names of other tasks of the suites may stay."""
    asked = evaluate.num_fewshot
    numbers = asked if isinstance(asked, dict) else dict.fromkeys(evaluate.tasks, asked)
    for name in numbers:
        if name not in {*evaluate.tasks, *SUITE_TASKS, *BUNDLED}:
            near = difflib.get_close_matches(name, evaluate.tasks, n=1)
            raise UserError(
                setting=f"evaluate.num_fewshot.{name}",
                value=numbers[name],
                rule="it is not one of evaluate.tasks",
                remedy=f"Did you mean {near[0]}?" if near else f"Choose from {', '.join(evaluate.tasks)}.",
            )
    fixed = [name for name in evaluate.tasks if numbers.get(name) and _is_zero_shot(name, custom)]
    if fixed:
        others = [name for name in evaluate.tasks if numbers.get(name) and name not in fixed]
        kept = ",".join(f"{name}:{numbers[name]}" for name in others)
        raise UserError(
            setting="evaluate.num_fewshot",
            value=asked,
            rule=f"it would have no effect on {', '.join(fixed)}: scored without examples, whatever the number",
            remedy=f"Set 'evaluate.num_fewshot={{{kept}}}'." if others else "Set evaluate.num_fewshot=null.",
        )


def _is_zero_shot(name: str, custom: CustomTasks) -> bool:
    """Returns whether a task, or every task of a group of the user's, has no few-shot examples."""
    if name not in custom.names:
        return name in ZERO_SHOT
    own = [file.config.get("num_fewshot") == 0 for file in custom.files_of(name) if "group" not in file.config]
    return bool(own) and all([*own, *(outside in ZERO_SHOT for outside in custom.outside_names(name))])


def _needs_hub(task: str, custom: CustomTasks) -> bool:
    """Returns whether a task reads a dataset on the Hub. Also checks its name, or the files of a custom task."""
    if task not in custom.names:
        _check_name(task, custom)
        return task not in BUNDLED
    custom.check(task)
    outside = [_needs_hub(member, custom) for member in custom.outside_names(task)]
    return any(outside) or bool(custom.hub_datasets(task))


def _check_name(task: str, custom: CustomTasks) -> None:
    if task in BUNDLED or task in installed_files():
        return
    near = difflib.get_close_matches(task, sorted({*BUNDLED, *installed_files(), *custom.names}), n=3)
    where = ", nor in evaluate.include_path" if custom.directories else ""
    raise UserError(
        setting="evaluate.tasks",
        value=task,
        rule=f"there is no such task among the bundled tasks and lm-eval's own{where}",
        remedy=f"Did you mean {' or '.join(near)}?" if near else f"Bundled tasks: {', '.join(BUNDLED)}.",
    )


def _check_datasets(tasks: Sequence[str], custom: CustomTasks) -> None:
    """Checks that the datasets of tasks can be read from the Hub or, offline, from the cache."""
    offline = is_offline()
    if not offline:
        check_reachable("evaluate.tasks", ", ".join(tasks), PREFETCH)
    first_reader: dict[HubDataset, str] = {}
    for task in tasks:
        for dataset in sorted(_datasets(task, custom), key=str):
            # Each configuration is cached on its own, but the Hub is asked once per dataset.
            first_reader.setdefault(dataset if offline else HubDataset(dataset.repo, None), task)
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        list(pool.map(_check_cached if offline else _check_on_hub, first_reader, first_reader.values()))


def _datasets(task: str, custom: CustomTasks) -> set[HubDataset]:
    if task not in custom.names:
        return installed_datasets(task)
    return custom.hub_datasets(task).union(*(installed_datasets(name) for name in custom.outside_names(task)))


def _check_on_hub(dataset: HubDataset, task: str) -> None:
    find_dataset(dataset.repo, None, partial(_refuse, dataset, task), PREFETCH)


def _check_cached(dataset: HubDataset, task: str) -> None:
    from datasets import load_dataset_builder
    from datasets.utils import logging

    logging.set_verbosity_error()  # that a dataset comes from the cache is what is asked for here
    try:
        load_dataset_builder(dataset.repo, dataset.config)
    except (OSError, ValueError) as error:  # ConnectionError is an OSError
        which = "it" if dataset.config is None else f"its configuration {dataset.config}"
        rule = f"{which} is not in the cache, and an environment variable (such as HF_HUB_OFFLINE) forbids downloads"
        raise _refuse(dataset, task, rule, PREFETCH) from error


def _refuse(dataset: HubDataset, task: str, rule: str, remedy: str) -> UserError:
    return UserError(setting="evaluate.tasks", value=f"{task}, which reads {dataset.repo}", rule=rule, remedy=remedy)

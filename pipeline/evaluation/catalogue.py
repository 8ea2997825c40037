"""Which tasks there are, and whether a request for some can work. Neither torch nor lm-eval is imported.

lm-eval's own task index costs 13 seconds and torch; the names alone are read from its YAML files, and only when a name
is neither bundled nor in a paper's suite.
"""

from __future__ import annotations

import difflib
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from pipeline.config import Evaluate
from pipeline.data.hub_datasets import check_reachable, is_offline
from pipeline.errors import UserError

HELD_OUT_TEXT = "held_out_text"
BUNDLED = (HELD_OUT_TEXT, "python_docs_mcq", "minimal_pairs")

# What conf/evaluate/ names, so that a paper's suite is accepted without reading thousands of files.
PUBLISHED = frozenset(
    "piqa winogrande arc_easy wikitext mmlu commonsense_qa boolq arc_challenge hellaswag truthfulqa_mc2 gsm8k "
    "openbookqa social_iqa race sciq lambada_openai".split()
)
# Those of lm-eval's best-known tasks of which this is known (its issue 3171); others are named when they are loaded.
SCRIPTED = frozenset({"logiqa", "logiqa2", "logieval", "arithmetic", "mc_taco", "prost", "pubmedqa"})
NAME_LINE = re.compile(r"^[\"']?(?:task|group|tag)[\"']?\s*:\s*[\"']?([\w.+-]+)[\"']?\s*$", re.MULTILINE)


def validate(evaluate: Evaluate) -> None:
    """Every task exists, and what must be fetched can be.

    Raises:
        UserError: an unknown task, or tasks of the hub without a way to it.
    """
    if not evaluate.tasks:
        raise UserError(
            setting="evaluate.tasks",
            value="[]",
            rule="there is nothing to score",
            remedy=f"Bundled: {', '.join(BUNDLED)}.",
        )
    for task in evaluate.tasks:
        _check_name(task)
    fetched = [task for task in evaluate.tasks if task not in BUNDLED]
    if fetched and not is_offline():  # offline, what was fetched before is used
        check_reachable("evaluate.tasks", ", ".join(fetched), PREFETCH)


PREFETCH = (
    "Go online; or fetch them once where there is a network (there, with 'stages=[evaluate]' 'evaluate.targets=[load]' "
    "evaluate.limit=1), and set HF_HUB_OFFLINE=1 here to use the cache; or say evaluate=bundled."
)


def _check_name(task: str) -> None:
    if task in SCRIPTED:
        raise UserError(
            setting="evaluate.tasks",
            value=task,
            rule="its data set is a loading script, which the datasets library runs no more",
            remedy="Leave it out.",
        )
    if task in BUNDLED or task in PUBLISHED or task in installed_names():
        return
    near = difflib.get_close_matches(task, [*BUNDLED, *PUBLISHED, *sorted(installed_names())], n=3)
    raise UserError(
        setting="evaluate.tasks",
        value=task,
        rule="neither bundled nor known to lm-eval",
        remedy=f"Did you mean {' or '.join(near)}?" if near else f"Bundled are {', '.join(BUNDLED)}.",
    )


@cache
def installed_names() -> frozenset[str]:
    """Names of tasks, groups and tags in the installed lm-eval's YAML files."""
    package = find_spec("lm_eval")
    assert package is not None and package.origin is not None, "lm-eval is a dependency"
    files = (Path(package.origin).parent / "tasks").rglob("*.y*ml")
    return frozenset(name for file in files for name in NAME_LINE.findall(file.read_text(encoding="utf-8")))

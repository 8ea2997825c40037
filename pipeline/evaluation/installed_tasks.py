"""lm-eval's own tasks, read from its YAML files. Imports neither torch nor lm-eval.

lm-eval's own index takes 13 seconds and imports torch. Names are therefore found with regular expressions, and only the
files of the tasks that are asked for are parsed. Tasks that are defined in Python name no dataset in their file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from pipeline.evaluation.custom_tasks import (
    HubDataset,
    TaskFile,
    collect_files,
    hub_datasets,
    read_task_file,
    yaml_files,
)

_KEY = r"^[\"']?({})[\"']?[ \t]*:[ \t]*"
# ``task: NAME``, ``group: NAME`` or ``tag: NAME``, possibly with quotes or a comment.
_ENTRY = re.compile(_KEY.format("task|group|tag") + r"[\"']?(\w[^\s\"'#]*)[\"']?[ \t]*(?:#.*)?$", re.MULTILINE)
# A list of tags: ``[NAME, NAME]``, or one NAME per line.
_TAG_LIST = re.compile(_KEY.format("tag") + r"(?:\[([^\]]*)\]|((?:\n[ \t]*-[^\n]*)+))", re.MULTILINE)
_LISTED = re.compile(r"\w[^\s\"',#]*")
_INCLUDE = re.compile(_KEY.format("include") + r"[\"']?([^\s\"'#]+)", re.MULTILINE)


@cache
def installed_files() -> Mapping[str, tuple[Path, ...]]:
    """Returns the files that define a task or group, by its name, and those of a tag's tasks, by the tag."""
    package = find_spec("lm_eval")
    assert package is not None and package.origin is not None, "lm-eval is a dependency"
    files = yaml_files(Path(package.origin).parent / "tasks")
    found: dict[str, list[Path]] = {}
    for file in files:
        for name in _names(file):
            found.setdefault(name, []).append(file)
    return {name: tuple(paths) for name, paths in found.items()}


def installed_datasets(name: str) -> set[HubDataset]:
    """Returns the datasets on the Hub that a task, or the tasks of a group or tag, read."""
    files, _ = collect_files(name, _named)
    return {dataset for file in files for dataset in hub_datasets(file.config)}


def _named(name: str) -> list[TaskFile]:
    files = (read_task_file(path) for path in installed_files().get(name, ()))
    return [file for file in files if file is not None]


def _names(file: Path) -> set[str]:
    """Returns the name and tags of a task, or the name of a group."""
    text = file.read_text(encoding="utf-8")
    entries = _ENTRY.findall(text)
    tasks = {name for key, name in entries if key == "task"}
    return tasks | _tags(text, file.parent) if tasks else {name for key, name in entries if key == "group"}


def _tags(text: str, directory: Path) -> set[str]:
    """Returns the tags of a task, which may be in a file that its own includes."""
    tags = {name for key, name in _ENTRY.findall(text) if key == "tag"}
    for _, inline, lines in _TAG_LIST.findall(text):
        tags |= {name for line in (inline or lines).split("\n") for name in _LISTED.findall(line.partition("#")[0])}
    include = _INCLUDE.search(text)
    return tags or (_inherited_tags(directory / include[2]) if include else set())


@cache
def _inherited_tags(file: Path) -> set[str]:
    return _tags(file.read_text(encoding="utf-8"), file.parent) if file.is_file() else set()

"""User-defined benchmarks: the lm-eval task YAMLs in the directories that ``evaluate.include_path`` names.

The driver reads the files without importing lm-eval or torch and without executing any ``!function``. It lists the
tasks, groups and tags, refuses files that could not be loaded, and hashes what each task depends on: its YAML file, the
files that it includes, the Python files beside the functions that it references, and its local data files.

A relative data path is relative to the YAML file of the task, not to the working directory. A file that only a Python
function reads is not hashed, unless ``dataset_kwargs.data_files`` names it.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pipeline.artifacts.fingerprints import Fingerprints
from pipeline.errors import UserError

SETTING = "evaluate.include_path"
IGNORED_DIRECTORIES = {"__pycache__", ".ipynb_checkpoints"}  # the same as lm-eval's
# Values of dataset_path that specify how data_files are read. Any other is a local directory or a dataset on the Hub.
FILE_BUILDERS = {"json", "csv", "parquet", "arrow", "text", "xml", "hdf5", "webdataset", "imagefolder", "audiofolder"}


@dataclass(frozen=True)
class FunctionReference:
    """A ``!function module.name`` tag, not executed. ``directory`` is that of the YAML file that holds the tag."""

    directory: Path
    name: str

    @property
    def module_file(self) -> Path:
        """The module as a file beside the YAML, which lm-eval prefers to an installed module."""
        return self.directory / f"{self.name.rpartition('.')[0].replace('.', '/')}.py"


class HubDataset(NamedTuple):
    """A dataset on the Hub, and the name of its configuration if the task gives one."""

    repo: str
    config: str | None


@dataclass(frozen=True)
class TaskFile:
    """One user-defined task or group.

    Attributes:
        path: the YAML file that defines it.
        config: its contents, with the included files merged in and data paths made absolute.
        yaml_files: ``path`` and the files that it includes.
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    yaml_files: tuple[Path, ...]


class CustomTasks:
    """The tasks, groups and tags that one or more directories define.

    Args:
        include_path: the value of ``evaluate.include_path``.

    Raises:
        UserError: a directory does not exist or defines no task, a file is not valid YAML, or a name is defined twice.
    """

    def __init__(self, include_path: str | Sequence[str] | None) -> None:
        paths = [include_path] if isinstance(include_path, str) else include_path or []
        self.directories = [Path(path).expanduser().absolute() for path in paths]
        self._files: dict[str, TaskFile] = {}
        self._tags: dict[str, list[str]] = {}
        for directory in self.directories:
            self._read_directory(directory)

    @property
    def names(self) -> list[str]:
        """All tasks, groups and tags."""
        return [*self._files, *self._tags]

    def files_of(self, name: str) -> list[TaskFile]:
        """Returns the task files that scoring a task, group or tag involves, each once and parents first."""
        return collect_files(name, self._named)[0]

    def outside_names(self, name: str) -> list[str]:
        """Returns the tasks of a group that its directories do not define, so that they must be lm-eval's own."""
        return sorted(collect_files(name, self._named)[1])

    def check(self, name: str) -> None:
        """Checks that the functions and data files of a task, or of a group's tasks, exist.

        Raises:
            UserError: one does not exist. The message names the YAML file and what it refers to.
        """
        for file in self.files_of(name):
            for reference in _functions(file.config):
                _check_function(file, reference)
            data_files(file)

    def fingerprint(self, name: str, fingerprints: Fingerprints) -> str:
        """Returns one hash over the contents, not the paths, of every file that a task, group or tag depends on.

        Raises:
            UserError: a data file does not exist.
        """
        return fingerprints.of_files(path for file in self.files_of(name) for path in _dependencies(file))

    def hub_datasets(self, name: str) -> set[HubDataset]:
        """Returns the datasets on the Hub that a task, or a group's tasks, read."""
        return {dataset for file in self.files_of(name) for dataset in hub_datasets(file.config)}

    def _read_directory(self, directory: Path) -> None:
        if not directory.is_dir():
            raise UserError(
                setting=SETTING,
                value=directory,
                rule="there is no such directory",
                remedy="Set evaluate.include_path to a directory with lm-eval task YAML files.",
            )
        found = [file for path in yaml_files(directory) if (file := read_task_file(path)) is not None]
        if not found:
            raise UserError(
                setting=SETTING,
                value=directory,
                rule="it contains no .yaml file that defines a task or a group",
                remedy="A task file is named *.yaml and has a line 'task: NAME'.",
            )
        for file in found:
            self._add(file)

    def _add(self, file: TaskFile) -> None:
        if file.name in self._files:
            rule = f"it defines {file.name}, which {self._files[file.name].path} defines too"
            raise UserError(setting=SETTING, value=file.path, rule=rule, remedy="Rename one of the two.")
        if "/" in file.name:
            rule = f"the name {file.name} contains a slash, and scores are stored in files named after tasks"
            raise UserError(setting=SETTING, value=file.path, rule=rule, remedy="Rename the task.")
        self._files[file.name] = file
        if "group" not in file.config:
            for tag in _as_list(file.config.get("tag")):
                self._tags.setdefault(tag, []).append(file.name)

    def _named(self, name: str) -> list[TaskFile]:
        """Returns the file of a task or group, or those of a tag's tasks."""
        names = [name] if name in self._files else self._tags.get(name, [])
        return [self._files[each] for each in names]


def collect_files(name: str, named: Callable[[str], Iterable[TaskFile]]) -> tuple[list[TaskFile], set[str]]:
    """Returns the files that scoring a task, group or tag involves, and the names that have none.

    Args:
        named: returns the file of a task or group, or those of a tag's tasks.

    Returns:
        The files, each once and parents first, and the names.
    """
    found: dict[Path, TaskFile] = {}
    unknown: set[str] = set()

    def collect(name: str) -> None:
        files = list(named(name))
        if not files:
            unknown.add(name)
        for file in files:
            if file.path not in found:
                found[file.path] = file
                for member in member_names(file.config):
                    collect(member)

    collect(name)
    return list(found.values()), unknown


# ---------------------------------------------------------------------------------------- YAML files


def read_task_file(path: Path) -> TaskFile | None:
    """Reads one YAML file; None for a file that defines neither a task nor a group, such as a shared base.

    Raises:
        UserError: the file, or one that it includes, is not valid YAML.
    """
    files: list[Path] = []
    config = _load(path, files)
    if not isinstance(config, dict):
        return None
    name = config.get("group", config.get("task"))
    if not isinstance(name, str):
        return None
    return TaskFile(name, path, resolve_data_paths(config, path.parent), tuple(files))


def yaml_files(directory: Path) -> list[Path]:
    """Returns the files in which lm-eval looks for tasks: ``*.yaml`` at any depth."""
    return sorted(path for path in directory.rglob("*.yaml") if not IGNORED_DIRECTORIES & {*path.parts})


def _load(path: Path, files: list[Path]) -> Any:
    """Returns the contents of a YAML file, with ``include`` merged as lm-eval does: the including file's own keys win.

    Args:
        files: the files read so far. This file and those that it includes are added.
    """
    if path.resolve() in {file.resolve() for file in files}:
        raise _bad_yaml(path, "it includes itself")
    files.append(path)
    try:
        config = yaml.load(path.read_bytes(), Loader=_loader(path.parent))
    except yaml.YAMLError as error:
        raise _bad_yaml(path, f"it is not valid YAML: {_where(error)}") from error
    except OSError as error:
        raise _bad_yaml(path, f"it cannot be read ({error.strerror})") from error
    if not isinstance(config, dict) or "include" not in config:
        return config
    merged: dict[str, Any] = {}
    for included in _as_list(config.pop("include")):
        base = path.parent / included
        if not base.is_file():
            raise _bad_yaml(path, f"it includes {included}, and there is no file at {base}")
        inherited = _load(base, files)
        if not isinstance(inherited, dict):
            raise _bad_yaml(base, f"{path.name} includes it, and it is not a mapping")
        inherited.pop("task_list", None)
        merged |= inherited
    return merged | config


def _loader(directory: Path) -> Any:
    """Returns a safe loader that keeps ``!function`` tags as references instead of importing what they name."""
    base = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C is ten times faster but optional
    loader: Any = type("Loader", (base,), {})

    def reference(_: Any, node: yaml.Node) -> FunctionReference:
        return FunctionReference(directory, str(node.value))

    loader.add_constructor("!function", reference)
    return loader


def _where(error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f"line {mark.line + 1}: {problem}" if mark and problem else str(error).replace("\n", " ")


def _bad_yaml(path: Path, rule: str) -> UserError:
    return UserError(setting=SETTING, value=path, rule=rule, remedy="Correct the file, or move it elsewhere.")


def member_names(config: Mapping[str, Any]) -> Iterator[str]:
    """Yields the names in a group's list of tasks. Tasks that the group defines inline are part of its own config."""
    members = config.get("task") if "group" in config else None
    for member in members if isinstance(members, list) else []:
        if isinstance(member, str):
            yield member
        elif isinstance(member, dict) and isinstance(member.get("task"), list):
            yield from member_names(member)
        elif isinstance(member, dict) and not {"dataset_path", "custom_dataset"} & member.keys():
            yield str(member.get("group", member.get("task")))


def _walk(config: Any) -> Iterator[Any]:
    """Yields a config's mappings, lists and values at any depth, inner ones first. A group may contain its tasks."""
    for value in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        yield from _walk(value)
    yield config


def _mappings(config: Any) -> Iterator[dict[str, Any]]:
    return (node for node in _walk(config) if isinstance(node, dict))


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


# ---------------------------------------------------------------------------------------- functions


def _functions(config: Any) -> Iterator[FunctionReference]:
    return (node for node in _walk(config) if isinstance(node, FunctionReference))


def _check_function(file: TaskFile, reference: FunctionReference) -> None:
    module = reference.name.rpartition(".")[0]
    if not module:
        raise _bad_yaml(file.path, f"'!function {reference.name}' names no module: it must be MODULE.FUNCTION")
    package = module.partition(".")[0]
    if not reference.module_file.is_file() and (not package or find_spec(package) is None):
        rule = f"'!function {reference.name}' needs {reference.module_file}, which does not exist"
        raise _bad_yaml(file.path, rule)


# --------------------------------------------------------------------------------------- local data


def resolve_data_paths(config: Any, directory: Path) -> Any:
    """Returns the config with local data paths made absolute, at any depth: a group may hold the configs of its tasks.

    Args:
        directory: what relative paths are relative to.
    """
    if isinstance(config, list):
        return [resolve_data_paths(item, directory) for item in config]
    if not isinstance(config, dict):
        return config
    resolved = {name: resolve_data_paths(value, directory) for name, value in config.items()}
    path, arguments = config.get("dataset_path"), resolved.get("dataset_kwargs")
    if isinstance(path, str) and _is_local(path, directory):
        resolved["dataset_path"] = _absolute(path, directory)
    if isinstance(arguments, dict) and _reads_files(config):
        for name in {"data_files", "data_dir"} & arguments.keys():
            arguments[name] = _absolute(arguments[name], directory)
    return resolved


def _is_local(path: str, directory: Path) -> bool:
    """Returns whether a ``dataset_path`` is a directory, rather than a way of reading files or a dataset on the Hub."""
    return path not in FILE_BUILDERS and (path.startswith((".", "/", "~")) or (directory / path).is_dir())


def _reads_files(config: Mapping[str, Any]) -> bool:
    """Returns whether ``data_files`` are files on this machine, rather than files of a dataset on the Hub."""
    return config.get("dataset_path") is None or config["dataset_path"] in FILE_BUILDERS


def _absolute(value: Any, directory: Path) -> Any:
    """Makes one path or pattern absolute, a list of them, or several by split."""
    if isinstance(value, dict):
        return {split: _absolute(paths, directory) for split, paths in value.items()}
    if isinstance(value, list):
        return [_absolute(path, directory) for path in value]
    return value if "://" in str(value) else str(directory / Path(str(value)).expanduser())


def data_files(file: TaskFile) -> list[Path]:
    """Returns the local data files that a task, or a group's inline tasks, read.

    Raises:
        UserError: a path names no file.
    """
    found: list[Path] = []
    for path in _local_paths(file.config):
        matches = _files_at(path)
        if not matches:
            raise UserError(
                setting=SETTING,
                value=file.path,
                rule=f"the task {file.name} reads {path}, and there is no such file",
                remedy=f"Correct the path in the YAML file; relative paths start from {file.path.parent}.",
            )
        found += matches
    return found


def _files_at(path: str) -> list[Path]:
    """Returns the files that a path, a directory or a pattern names, sorted."""
    if Path(path).is_dir():
        return sorted(file for file in Path(path).rglob("*") if file.is_file() and file.name[0] != ".")
    matches = [path] if Path(path).exists() else glob.glob(path, recursive=True)
    return sorted(Path(match) for match in matches if Path(match).is_file())


def _local_paths(config: Any) -> Iterator[str]:
    """Yields every local data path in a config whose paths are absolute."""
    for node in _mappings(config):
        path, arguments = node.get("dataset_path"), node.get("dataset_kwargs")
        if isinstance(path, str) and Path(path).is_absolute():
            yield path
        if isinstance(arguments, dict) and _reads_files(node):
            for name in sorted({"data_files", "data_dir"} & arguments.keys()):
                texts = (str(leaf) for leaf in _walk(arguments[name]) if not isinstance(leaf, (dict, list)))
                yield from (text for text in texts if "://" not in text)


def hub_datasets(config: Any) -> Iterator[HubDataset]:
    """Yields the datasets on the Hub that a config whose paths are absolute names."""
    for node in _mappings(config):
        path, name = node.get("dataset_path"), node.get("dataset_name")
        if isinstance(path, str) and path not in FILE_BUILDERS and not Path(path).is_absolute():
            yield HubDataset(path, name if isinstance(name, str) else None)


def _dependencies(file: TaskFile) -> list[Path]:
    """Returns every file that the scores of a task depend on, each once, in a fixed order."""
    modules = [reference.module_file for reference in _functions(file.config)]
    # A module may import its neighbors, so all Python files beside it count.
    python_files = [path for module in modules if module.is_file() for path in sorted(module.parent.glob("*.py"))]
    return list(dict.fromkeys([*file.yaml_files, *python_files, *data_files(file)]))

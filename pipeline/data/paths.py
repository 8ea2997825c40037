"""Finds the data files that a path, directory or glob refers to.

Hidden files and directories inside a directory are left out: editors, notebooks and macOS put copies and caches there.
Links to directories are followed. In a directory that ``datasets`` saved, only the files that its ``state.json`` lists
are read.
"""

from __future__ import annotations

import glob
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from pipeline.data.files import READERS, file_format
from pipeline.errors import UserError

RESOURCE_FOLDER = "__MACOSX"  # in ZIP archives made on macOS: one file of attributes for every file
SAVED_DATASET, SAVED_SPLITS = "state.json", "dataset_dict.json"  # written by Dataset and DatasetDict.save_to_disk


def find_files(path: str, split: str | None, setting: str) -> list[Path]:
    """Returns the files of supported formats at a path, in a directory (recursively) or matching a glob, sorted.

    Args:
        path: the value of the setting.
        split: which split of a saved ``DatasetDict``; None if it has only one, and for all other files.
        setting: dotted name of the path's setting.

    Raises:
        UserError: there are none, one of them cannot be read as a file, or there is nothing to choose a split of.
    """
    path = os.path.expanduser(path)
    # An existing path is taken literally even if it contains glob characters.
    names = [path] if os.path.lexists(path) else _matches(path)
    if not names:
        raise UserError(
            setting=setting,
            value=path,
            rule="there is no such file or directory, and no file matches it as a glob",
            remedy=f"Set {setting} to an existing file, directory or glob.",
        )
    walk = _Walk(split, setting)
    found = sorted(file for name in sorted(map(Path, names)) for file in walk.data_files(name))
    if not found:
        others = f" ({len(walk.left_out)} left out, such as {walk.left_out[0]})" if walk.left_out else ""
        raise UserError(
            setting=setting,
            value=path,
            rule=f"it contains no file of a supported format{others}",
            remedy=f"Provide files ending in {', '.join(READERS)}; .txt, .json and .jsonl may be followed by .gz or "
            ".zst.",
        )
    if split is not None and not walk.has_splits:
        source = setting.removesuffix(".path")
        raise UserError(
            setting=f"{source}.split",
            value=split,
            rule=f"{path} is not a saved DatasetDict, so all of its files would be read, whatever their split",
            remedy=f"Set {source}.split=null, and {setting} to the files of that split.",
        )
    return found


def _matches(pattern: str) -> list[str]:
    """Returns what matches a glob. Unlike ``glob.glob``, it ends where links to directories form a loop."""
    recursive = re.search(r"(?:^|(?<=/))\*\*(?:/|$)", pattern)
    if recursive is None:
        return glob.glob(pattern)
    before, rest = pattern[: recursive.start()], pattern[recursive.end() :]
    roots = glob.glob(before) if before else ["."]
    if not rest:
        return roots
    places = [glob.escape(place) for root in roots for place in _directories(root)]
    return [found for place in places for found in _matches(f"{place}/{rest}")]


def _directories(root: str) -> Iterator[str]:
    """Yields a directory and those in it, without hidden ones, and each once."""
    seen = set()
    for directory, names, _ in os.walk(root, followlinks=True):
        real = os.path.realpath(directory)
        names[:] = [] if real in seen else sorted(name for name in names if not _is_hidden(name))
        if real not in seen:
            seen.add(real)
            yield directory


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == RESOURCE_FOLDER


class _Walk:
    """Collects files, every directory and file once, however many links lead there.

    Attributes:
        left_out: the files that were not collected.
        has_splits: whether a split of a saved ``DatasetDict`` was chosen.
    """

    def __init__(self, split: str | None, setting: str) -> None:
        self._split, self._setting = split, setting
        self._seen: set[tuple[str, str]] = set()  # directory without links, and name in it
        self.left_out: list[Path] = []
        self.has_splits = False

    def data_files(self, path: Path) -> list[Path]:
        """Returns the files at a path that the user wrote, or that matches a glob.

        In a directory with files of other formats, those in .json describe them.
        """
        if not path.is_dir() and path.exists():
            self._check(path)  # whatever its suffix, such as /dev/stdin
        found = list(self._files(path))
        others = [file for file in found if file_format(file) != ".json"]
        if path.is_dir() and others:
            self.left_out += [file for file in found if file_format(file) == ".json"]
            return others
        return found

    def _files(self, path: Path) -> Iterator[Path]:
        if path.is_dir():
            if self._is_new(path.resolve(), ""):
                yield from self._directory(path)
        elif file_format(path) not in READERS:
            self.left_out.append(path)
        elif self._is_new(path.parent.resolve(), path.name):
            self._check(path)
            yield path

    def _is_new(self, directory: Path, name: str) -> bool:
        key = (str(directory), name)
        known = key in self._seen
        self._seen.add(key)
        return not known

    def _directory(self, directory: Path) -> Iterator[Path]:
        try:
            names = sorted(os.listdir(directory))
        except OSError as error:
            raise self._refuse(directory, f"the directory cannot be read ({error.strerror})") from error
        if SAVED_SPLITS in names and (splits := _listed(directory / SAVED_SPLITS, "splits")):
            self.has_splits = True
            yield from self._files(directory / self._chosen(splits, directory))
        elif SAVED_DATASET in names and (saved := _listed(directory / SAVED_DATASET, "_data_files")):
            for name in saved:  # others next to them are caches of the dataset's transformations
                if Path(name).name != name or file_format(Path(name)) not in READERS:
                    raise self._refuse(directory / SAVED_DATASET, f"it lists {name}, which is not a data file")
                self._check(directory / name)
                yield directory / name
        else:
            for name in names:
                if _is_hidden(name):
                    self.left_out.append(directory / name)
                else:
                    yield from self._files(directory / name)

    def _chosen(self, splits: list[str], directory: Path) -> str:
        chosen = self._split or (splits[0] if len(splits) == 1 else None)
        if chosen in splits:
            return chosen
        rule = f"it is a DatasetDict with the splits {', '.join(splits)}"
        raise self._refuse(directory, rule if chosen is None else f"{rule}, and has no split {chosen}", splits)

    def _check(self, path: Path) -> None:
        try:
            mode = path.stat().st_mode
        except OSError as error:
            what = "it is a link to a file that does not exist" if path.is_symlink() else str(error.strerror)
            raise self._refuse(path, what) from error
        if not stat.S_ISREG(mode):
            kinds = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
            kind = next((name for test, name in kinds if test(mode)), "a device")
            raise self._refuse(path, f"it is {kind}, which cannot be read twice; data must be in files")
        if not os.access(path, os.R_OK):
            raise self._refuse(path, "this process has no permission to read it")

    def _refuse(self, path: Path, rule: str, splits: list[str] | None = None) -> UserError:
        source = self._setting.removesuffix(".path")
        remedy = f"Correct or remove it, or set {self._setting} to other files."
        if splits:
            remedy = f"Set {source}.split to one of them, or {self._setting} to {path}/{splits[0]}."
        return UserError(setting=self._setting, value=path, rule=rule, remedy=remedy)


def _listed(file: Path, key: str) -> list[str]:
    """Returns the names that a JSON file of a saved dataset lists; none if it is another file of the same name."""
    try:
        value = json.loads(file.read_bytes())
        return [entry if isinstance(entry, str) else str(entry["filename"]) for entry in value[key]]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []

"""``action=clean``: lists, and with ``confirm=true`` removes, what no run in ``output_dir`` refers to.

A run refers to an artifact by a link, by the keys that it recorded when it was last started (``driver.run``), by a
submitted job, or as a parent of such an artifact. What an interrupted run would resume is therefore kept until the run
is started with other settings. Whatever a living process holds the lock of is kept too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from pipeline.artifacts.store import Artifact, parent_keys
from pipeline.driver.run import KEYS_FILE
from pipeline.driver.submit import JOBS_FILE
from pipeline.errors import UserError
from pipeline.files import gib, read_record

KEY = re.compile(r"[0-9a-f]{64}")
KINDS = {None: "artifact", ".partial": "partial", ".old": "old", ".redo": "temporary", ".builder": "lock"}
ENTRY = re.compile(rf"(\.?)({KEY.pattern})(\.partial|\.old|\.redo|\.builder)?(\.[0-9a-f]{{32}})?")


@dataclass
class Leftovers:
    """What can be removed of one key.

    Attributes:
        unreferenced: no run refers to the key, so that everything can be removed.
        found: kinds of what can be removed: ``artifact``, ``partial``, ``old``, ``temporary`` or ``lock``.
        size: in bytes.
        holder: the process that holds the lock, so that nothing can be removed; empty if there is none.
    """

    artifact: Artifact
    unreferenced: bool
    found: list[str] = field(default_factory=list)
    size: int = 0
    holder: str = ""


class _InUse(Exception):
    """Another process holds the lock."""


def clean(output_dir: Path, confirm: bool, console: Console) -> None:
    """Lists what can be removed, and removes it if ``confirm`` is set.

    Raises:
        UserError: the references of a run cannot be read.
    """
    root = output_dir.absolute() / "artifacts"
    if not root.is_dir():
        return console.print(f"{root} does not exist", markup=False)
    items = _find(root)
    for item in items:
        if item.found != ["lock"]:
            state = f"in use by {item.holder}" if item.holder else ", ".join(item.found)
            console.print(f"  {item.artifact.stage:<9} {item.artifact.key[:12]} {gib(item.size):>11}  {state}")
    free = [item for item in items if not item.holder]
    locks = sum("lock" in item.found for item in free)
    summary = f"{gib(sum(item.size for item in free))} in {sum(item.found != ['lock'] for item in free)} entries, and "
    summary += f"{locks} unused locks"
    if not confirm:
        return console.print(f"{root}: {summary} can be removed; add confirm=true to remove them", markup=False)
    removed = sum([_remove(item, console) for item in free])
    return console.print(f"{root}: removed {removed} of {len(free)} ({summary})", markup=False)


# ----------------------------------------------------------------------------------------- what is there


def _find(root: Path) -> list[Leftovers]:
    referenced = _references(root)
    items: dict[str, Leftovers] = {}
    for entry in sorted(root.glob("*/*")) + sorted(root.glob("*/.*")):
        match = ENTRY.fullmatch(entry.name)
        if match is None:
            continue
        hidden, key, suffix, _ = match.groups()
        artifact = Artifact(root, entry.parent.name, key)
        item = items.setdefault(key, Leftovers(artifact, key not in referenced))
        kind = "temporary" if hidden else KINDS[suffix]
        if _is_left_over(kind, item):
            item.found.append(kind)
            item.size += _size(entry)
    for item in items.values():
        lock = item.artifact.lock()
        holder = lock.holder()
        if holder is not None and not holder.is_dead(lock.me):
            item.holder = str(holder)
    return [item for item in items.values() if item.found]


def _is_left_over(kind: str, item: Leftovers) -> bool:
    if item.unreferenced or kind == "lock":
        return True
    # A commit that was killed between its two renames leaves the artifact as .old only; the next run restores it.
    return kind == "old" and item.artifact.path.exists()


def _size(entry: Path) -> int:
    size = 0
    inner = (Path(directory, name) for directory, _, files in os.walk(entry) for name in files)
    for file in [entry] if entry.is_file() else inner:
        with suppress(FileNotFoundError):  # a process that builds the artifact has removed it
            size += file.lstat().st_size
    return size


# ------------------------------------------------------------------------------------------- references


def _references(root: Path) -> set[str]:
    """Returns the keys that runs refer to, and those of all that was used to make them."""
    keys = set(_own_references(root))
    pending = [*keys]
    while pending:
        key = pending.pop()
        for place in root.glob(f"*/{key}"):
            parents = parent_keys(place) - keys
            keys |= parents
            pending += parents
    return keys


def _own_references(root: Path) -> Iterator[str]:
    for directory, names, files in os.walk(root.parent, onerror=_unreadable):
        if Path(directory) == root.parent and root.name in names:
            names.remove(root.name)
        for name in (*names, *files):
            path = Path(directory, name)
            if path.is_symlink():
                yield from KEY.findall(os.path.realpath(path))
            elif name == KEYS_FILE:
                yield from _read(path).values()
            elif name == JOBS_FILE:
                yield from (entry["key"] for entry in _read(path).values())


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] | None = read_record(path, lambda value: isinstance(value, dict))
    if found is None:
        raise UserError(
            setting="action",
            value="clean",
            rule=f"{path} lists artifacts that a run refers to, but cannot be read",
            remedy="Repeat the run, which writes the file again, or remove the file if the run is not needed.",
        )
    return found


def _unreadable(error: OSError) -> NoReturn:
    raise UserError(
        setting="action",
        value="clean",
        rule=f"{error.filename} cannot be read ({error.strerror}), so runs in it may refer to any artifact",
        remedy="Let a user clean the directory who can read all of it.",
    )


# --------------------------------------------------------------------------------------------- removal


def _remove(item: Leftovers, console: Console) -> bool:
    """Removes what was found, unless a process or a run has begun to use it in the meantime."""
    artifact, lock = item.artifact, item.artifact.lock()
    try:
        with lock.held(_refuse_to_wait):
            artifact.tidy()
            if item.unreferenced and artifact.key not in _references(artifact.root):
                artifact.remove()
            lock.remove()
    except (_InUse, UserError, OSError) as error:
        console.print(f"  kept {artifact.stage} {artifact.key[:12]}: {error}", markup=False)
        return False
    return True


def _refuse_to_wait(message: str) -> None:
    if message.endswith("is building it"):
        raise _InUse(message)

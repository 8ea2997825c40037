"""Artifacts: directories named by what they were made from, which are either complete or absent.

An artifact's key is the SHA-256 of its stage's name and version, its settings, the keys of its parents and the content
of its external inputs. A stage writes into ``<key>.partial``. The file ``manifest.json`` is written last, and one
rename commits the directory. A lock beside it lets one process build while others wait (see ``lock``).

Hidden files never belong to an artifact. They are temporary files, and a commit removes those of killed writers.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from pipeline.artifacts.lock import Holder, Lock
from pipeline.errors import WorkersFailed
from pipeline.files import (
    exchange,
    fsync,
    fsync_directory,
    read_json,
    read_record,
    sha256_file,
    sha256_json,
    temporary_path,
    write_json,
)

MANIFEST = "manifest.json"
ATTEMPTS_FILE = "attempts.json"
SHARED_FILE = ".shared"


@dataclass(frozen=True)
class Artifact:
    """The artifact in the directory ``<root>/<stage>/<key>``, which may not exist yet."""

    root: Path
    stage: str
    key: str

    @property
    def path(self) -> Path:
        """The directory of the complete artifact."""
        return self.root / self.stage / self.key

    @property
    def partial(self) -> Path:
        """The directory in which it is built."""
        return self.path.with_name(f"{self.key}.partial")

    @property
    def _rebuild_marker(self) -> Path:
        return self.path.with_name(f"{self.key}.redo")

    @property
    def _old(self) -> Path:
        return self.path.with_name(f"{self.key}.old")

    def is_complete(self) -> bool:
        """Whether the manifest is this artifact's and every file it lists has the recorded size.

        Contents are not read; see ``damage``.
        """
        manifest = self._readable_manifest()
        if manifest is None or self._is_invalidated():
            return False
        return all(_size_of(self.path / name) == entry["bytes"] for name, entry in manifest["files"].items())

    def damage(self) -> list[str]:
        """Reads and hashes every file. Returns what differs from the manifest, or nothing if all is as committed."""
        manifest = self._readable_manifest()
        if manifest is None:
            return [f"{MANIFEST} is missing, cannot be read, or belongs to another artifact"]
        found = []
        for name, entry in manifest["files"].items():
            size = _size_of(self.path / name)
            if size is None:
                found.append(f"{name} is missing")
            elif size != entry["bytes"]:
                found.append(f"{name} has {size:,} bytes instead of {entry['bytes']:,}")
            elif sha256_file(self.path / name) != entry["sha256"]:
                found.append(f"{name} does not match its recorded hash")
        return [*found, *(f"{name} was added" for name in _files_of(self.path) if name not in manifest["files"])]

    def manifest(self) -> dict[str, Any]:
        """Reads the manifest of a complete artifact."""
        manifest: dict[str, Any] = read_json(self.path / MANIFEST)
        return manifest

    def commit(
        self,
        manifest: Mapping[str, Any],
        expected: Sequence[str] = (),
        confirm: Callable[[], None] = lambda: None,
    ) -> None:
        """Makes the partial directory the complete artifact, replacing an older one.

        Args:
            manifest: the content of the manifest. The key, and the size and SHA-256 of every file, are added to it.
            expected: glob patterns, relative to the directory. Each must match a file that is not empty.
            confirm: called just before the rename. It raises an exception if this process may not commit any more.

        Raises:
            WorkersFailed: an expected file is missing. Nothing was committed.
        """
        source = self.partial
        if (self.partial / SHARED_FILE).exists():
            # The process that began the artifact may still have files open for writing. It has none of the copies.
            source = temporary_path(self.partial)
            shutil.copytree(self.partial, source)
        _remove_hidden(source)
        if missing := _missing_files(source, expected):
            raise WorkersFailed(
                f"stage {self.stage} ended without writing {', '.join(missing)} in {self.partial}; it was not "
                f"committed. Add force=[{self.stage}] to build it from the beginning."
            )
        files = {
            name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for name, path in _files_of(source).items()
        }
        write_json(source / MANIFEST, {**manifest, "key": self.key, "files": files})
        # The data must be on disk before the rename that declares it complete.
        fsync_directory(source)
        confirm()
        if not self.path.exists():
            os.replace(source, self.path)
        elif not exchange(source, self.path):
            # A rename cannot replace a directory that is not empty. If the machine fails between the two renames,
            # ``tidy`` restores the old artifact.
            _discard(self._old)
            os.replace(self.path, self._old)
            os.replace(source, self.path)
        fsync(self.path.parent)
        for outdated in {source, self.partial, self._old}:
            _discard(outdated)
        self._rebuild_marker.unlink(missing_ok=True)

    def invalidate(self, rebuild: str = "") -> None:
        """Marks the artifact to be rebuilt from the beginning. Only the holder of the lock may call this.

        The old files stay until the new ones replace them, but the artifact counts as missing.

        Args:
            rebuild: identifies the rebuild that the artifact is part of, for ``awaits``.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Names what is invalid, so that a marker which a killed commit leaves does not apply to the new artifact.
        replaced = sha256_file(self.path / MANIFEST) if (self.path / MANIFEST).is_file() else None
        write_json(self._rebuild_marker, {"manifest": replaced, "rebuild": rebuild})
        _discard(self.partial)

    def awaits(self, rebuild: str) -> bool:
        """Whether the artifact was invalidated for this rebuild and has not been built since."""
        marker = self._read_marker()
        return marker is not None and marker.get("rebuild") == rebuild and not self.is_complete()

    def mark_shared(self) -> None:
        """Records that another process may still write to the partial directory. See ``Lock.held``."""
        if self.partial.exists():
            (self.partial / SHARED_FILE).touch()

    def tidy(self) -> None:
        """Repairs what a process that was killed while committing or invalidating left. Only for the lock's holder."""
        if self._old.exists() and not self.path.exists():
            os.replace(self._old, self.path)
        _discard(self._old)
        for replaced in (self._old, self.partial, self._rebuild_marker):
            _remove_all(self.path.parent.glob(f".{replaced.name}.*"))

    def remove(self) -> None:
        """Removes the artifact and what is left of attempts to build it. Only for the lock's holder."""
        for directory in (self.path, self.partial, self._old):
            _discard(directory)
        self._rebuild_marker.unlink(missing_ok=True)
        _remove_all(self.path.parent.glob(f".{self.key}.*"))

    def _readable_manifest(self) -> dict[str, Any] | None:
        manifest: dict[str, Any] | None = read_record(self.path / MANIFEST, _lists_files)
        return manifest if manifest is not None and manifest["key"] == self.key else None

    def _is_invalidated(self) -> bool:
        marker = self._read_marker()
        if marker is None:
            return False
        # A marker that cannot be read, like those of earlier versions, applies to whatever is there.
        return "manifest" not in marker or marker["manifest"] == sha256_file(self.path / MANIFEST)

    def _read_marker(self) -> dict[str, Any] | None:
        """Reads the marker of ``invalidate``. None if there is none, and empty if it cannot be read."""
        if not self._rebuild_marker.exists():
            return None
        marker: dict[str, Any] = read_record(self._rebuild_marker, lambda value: isinstance(value, dict)) or {}
        return marker

    def lock(self) -> Lock:
        """Returns the lock that a process must hold while it builds this artifact."""
        return Lock(self.path.with_name(f"{self.key}.builder"), Holder.current(os.environ))


def parent_keys(directory: Path) -> set[str]:
    """Returns the keys of what an artifact was made from; nothing if its manifest cannot be read."""
    manifest = read_record(directory / MANIFEST, lambda value: isinstance(value["parents"], dict))
    return set() if manifest is None else set(manifest["parents"].values())


def is_artifact(directory: Path) -> bool:
    """Whether a directory is a complete artifact, judging by its path and its manifest."""
    return directory.parent.parent.name == "artifacts" and os.path.isfile(directory / MANIFEST)


def _lists_files(manifest: Any) -> bool:
    return "key" in manifest and all(isinstance(entry["bytes"], int) for entry in manifest["files"].values())


def _discard(directory: Path) -> None:
    """Removes a directory. It is renamed first, so that an interruption leaves no part of it under its name."""
    aside = temporary_path(directory)
    with suppress(FileNotFoundError):
        os.replace(directory, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _remove_hidden(directory: Path) -> None:
    _remove_all(sorted(directory.rglob(".*"), reverse=True))  # children before their parents


def _remove_all(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):  # on NFS, a file that is still open reappears; ``_files_of`` ignores it
                path.unlink()


def _files_of(directory: Path) -> dict[str, Path]:
    """All files but the manifest and hidden ones, by their relative path."""
    relative = {path.relative_to(directory): path for path in sorted(directory.rglob("*")) if path.is_file()}
    return {
        str(name): path
        for name, path in relative.items()
        if str(name) != MANIFEST and not any(part.startswith(".") for part in name.parts)
    }


def _missing_files(directory: Path, expected: Sequence[str]) -> list[str]:
    """Expected patterns without a file that is not empty, and files that an index of weights lists but do not exist."""
    listed = {
        name
        for index in directory.glob("*.safetensors.index.json")
        for name in read_json(index)["weight_map"].values()
    }  # fmt: skip
    return [
        pattern
        for pattern in (*expected, *sorted(listed))
        if not any(path.is_file() and path.stat().st_size for path in directory.glob(pattern))
    ]


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


# ------------------------------------------------------------------------------------------- keys


def make_key(
    stage: str, version: int, settings: Mapping[str, Any], parents: Mapping[str, str], inputs: Mapping[str, str]
) -> str:
    """Returns the key of an artifact, as 64 hexadecimal digits.

    Args:
        stage: the stage's name.
        version: the stage's version, which is raised when its output changes.
        settings: the settings that influence the output.
        parents: the parents' keys, by role.
        inputs: fingerprints of external inputs, by name.
    """
    return sha256_json({"stage": stage, "version": version, "settings": settings, "parents": parents, "inputs": inputs})


# ----------------------------------------------------------------------------------------- attempts
# How long an artifact took to build, over all attempts. A killed attempt cannot record when it ended, so the time of
# the newest file that it wrote counts as its end.

Attempt = dict[str, float | None]  # "started": seconds since the epoch; "seconds": None while it runs


def begin_attempt(partial: Path) -> list[Attempt]:
    """Records in a partial directory that an attempt begins, and how long the previous one took.

    Call this before anything else is written there.

    Returns:
        All attempts, for ``finish_attempts``.
    """
    attempts = [*_finished_attempts(partial), {"started": time.time(), "seconds": None}]
    write_json(partial / ATTEMPTS_FILE, attempts)
    return attempts


def finish_attempts(partial: Path, attempts: Sequence[Attempt]) -> tuple[int, float]:
    """Removes the record of the attempts, which need not be readable any more.

    Returns:
        The number of attempts and their total duration in seconds.
    """
    (partial / ATTEMPTS_FILE).unlink(missing_ok=True)
    *earlier, last = attempts
    return len(attempts), sum(attempt["seconds"] or 0.0 for attempt in earlier) + time.time() - _started(last)


def _finished_attempts(partial: Path) -> list[Attempt]:
    attempts: list[Attempt] = read_record(partial / ATTEMPTS_FILE, _are_attempts) or []
    if not attempts:
        return []
    last_write = max(path.stat().st_mtime for path in partial.rglob("*"))
    return [*attempts[:-1], {**attempts[-1], "seconds": max(0.0, last_write - _started(attempts[-1]))}]


def _are_attempts(value: Any) -> bool:
    # The last one has no duration yet, since the next attempt computes it.
    return isinstance(value, list) and all(
        isinstance(attempt["started"], float) and isinstance(attempt["seconds"], (float, NoneType)) for attempt in value
    )


def _started(attempt: Attempt) -> float:
    assert attempt["started"] is not None
    return attempt["started"]

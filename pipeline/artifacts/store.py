"""Artifacts: directories named by what made them, whole or absent. Standard library only.

A key is the SHA-256 of a stage's name and version, its settings, its parents' keys and the content of its
outside inputs. Work happens in ``<key>.partial``; ``manifest.json`` is written last and one rename commits.
A lock beside the directory lets one process build while others wait (see ``lock``).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.artifacts.lock import Holder, Lock
from pipeline.files import fsync_directory, read_json, sha256_file, sha256_json, write_json

MANIFEST = "manifest.json"


# ------------------------------------------------------------------------------------------- files


# ------------------------------------------------------------------------------------------- keys


def make_key(
    stage: str, version: int, settings: Mapping[str, Any], parents: Mapping[str, str], inputs: Mapping[str, str]
) -> str:
    """64 hexadecimal digits naming the one artifact that these inputs make."""
    return sha256_json({"stage": stage, "version": version, "settings": settings, "parents": parents, "inputs": inputs})


@dataclass(frozen=True)
class Fingerprints:
    """SHA-256 of local inputs, remembered by path, size and modification time so that a rerun reads nothing."""

    memo: Path
    writes: bool = True  # else the memo is only read

    def of_file(self, path: Path) -> str:
        """The hash of one file; recomputed when its size or time changed."""
        name, known = self._name(path), self._known()
        if name not in known:
            known[name] = sha256_file(path)
            if self.writes:
                self.memo.parent.mkdir(parents=True, exist_ok=True)
                write_json(self.memo, known)
        return str(known[name])

    def _name(self, path: Path) -> str:
        status = path.stat()
        return f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"

    def _known(self) -> dict[str, str]:
        known: dict[str, str] = read_json(self.memo) if self.memo.exists() else {}
        return known

    def of_files(self, paths: Iterable[Path]) -> str:
        """One hash for a list of files: their names and contents, in order."""
        lines = [f"{path.name} {self.of_file(path)}" for path in paths]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class RememberedFingerprints(Fingerprints):
    """Only what is remembered: nothing is read, nothing is written."""

    def of_file(self, path: Path) -> str:
        """The hash of a file as it was when it was last read; for one never read, what tells it from others."""
        name = self._name(path)
        return self._remembered.get(name, f"unread {name}")

    @cached_property
    def _remembered(self) -> dict[str, str]:
        return self._known()


# ---------------------------------------------------------------------------------------- the store


@dataclass(frozen=True)
class Artifact:
    """One artifact's place: ``<root>/<stage>/<key>``."""

    root: Path
    stage: str
    key: str

    @property
    def path(self) -> Path:
        """The finished directory."""
        return self.root / self.stage / self.key

    @property
    def partial(self) -> Path:
        """Where it is being made."""
        return self.path.with_name(f"{self.key}.partial")

    def is_complete(self) -> bool:
        """Whether the manifest is there and every file it names has its size. Contents are not read."""
        manifest = self.path / MANIFEST
        if self._redo.exists() or not manifest.is_file():
            return False
        files = read_json(manifest)["files"]
        return all(_size_of(self.path / name) == entry["bytes"] for name, entry in files.items())

    def manifest(self) -> dict[str, Any]:
        """The finished artifact's manifest."""
        manifest: dict[str, Any] = read_json(self.path / MANIFEST)
        return manifest

    def commit(self, manifest: Mapping[str, Any]) -> None:
        """Hashes every file, writes the manifest last and renames. An older artifact is replaced."""
        files = {
            str(path.relative_to(self.partial)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in sorted(self.partial.rglob("*"))
            if path.is_file() and path.name != MANIFEST
        }
        write_json(self.partial / MANIFEST, {**manifest, "files": files})
        fsync_directory(self.partial)
        if self.path.exists():
            # A rename cannot replace a directory that holds files; the old one steps aside first.
            old = self.path.with_name(f"{self.key}.old")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(self.path, old)
            os.replace(self.partial, self.path)
            shutil.rmtree(old)
        else:
            os.replace(self.partial, self.path)
        self._redo.unlink(missing_ok=True)

    def lock(self) -> Lock:
        """What one process at a time holds to build this artifact."""
        return Lock(self.path.with_name(f"{self.key}.builder"), Holder.current(os.environ))

    # An artifact to be redone keeps its files until the new ones replace them, but counts as missing.

    @property
    def _redo(self) -> Path:
        return self.path.with_name(f"{self.key}.redo")

    def invalidate(self) -> None:
        """Asks for it to be made anew, from the beginning; for the holder of the lock."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._redo.touch()
        shutil.rmtree(self.partial, ignore_errors=True)


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


# --------------------------------------------------------------------------------------------------
# How long an artifact took to make, over all attempts at it: killed ones count too.
#
# A killed attempt cannot say when it ended, but the files that it wrote do.

ATTEMPTS_FILE = "attempts.json"


def begin_attempt(partial: Path) -> None:
    """Notes in a partial directory that an attempt begins now, and closes the one before."""
    started = [*_closed(partial), {"started": time.time(), "seconds": None}]
    write_json(partial / ATTEMPTS_FILE, started)


def finish_attempts(partial: Path) -> tuple[int, float]:
    """Removes the notes; returns how many attempts there were and how many seconds they took together."""
    attempts = read_json(partial / ATTEMPTS_FILE)
    (partial / ATTEMPTS_FILE).unlink()
    last = time.time() - attempts[-1]["started"]
    return len(attempts), sum(attempt["seconds"] for attempt in attempts[:-1]) + last


def _closed(partial: Path) -> list[dict[str, float]]:
    """Earlier attempts, the last of them as long as it wrote."""
    file = partial / ATTEMPTS_FILE
    if not file.exists():
        return []
    attempts: list[dict[str, float]] = read_json(file)
    written = max(path.stat().st_mtime for path in partial.rglob("*"))
    return [*attempts[:-1], {**attempts[-1], "seconds": max(0.0, written - attempts[-1]["started"])}]

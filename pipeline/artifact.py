"""Artifacts: directories named by what made them, whole or absent. Standard library only.

A key is the SHA-256 of a stage's name and version, its settings, its parents' keys and the content of its
outside inputs. Work happens in ``<key>.partial``; ``manifest.json`` is written last and one rename commits.
A lock beside the directory lets one process build while others wait (see ``lock``).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

from pipeline.lock import Holder, Lock

MANIFEST = "manifest.json"


# ------------------------------------------------------------------------------------------- files


def beside(path: Path) -> Path:
    """A hidden name beside ``path`` for what will take its place; no other process has it, on any node."""
    return path.with_name(f".{path.name}.{uuid4().hex}")


def write_json(path: Path | str, value: Any) -> None:
    """Writes ``value`` as JSON so that a reader sees the old file or the whole new one."""
    path = Path(path)
    temporary = beside(path)
    temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    os.replace(temporary, path)


def read_json(path: Path | str) -> Any:
    """Reads one JSON file."""
    return json.loads(Path(path).read_text())


# ------------------------------------------------------------------------------------------- keys


def make_key(
    stage: str, version: int, settings: Mapping[str, Any], parents: Mapping[str, str], inputs: Mapping[str, str]
) -> str:
    """64 hexadecimal digits naming the one artifact that these inputs make."""
    return sha256_json({"stage": stage, "version": version, "settings": settings, "parents": parents, "inputs": inputs})


def sha256_json(value: Mapping[str, Any] | Sequence[Any]) -> str:
    """The SHA-256 of JSON values, however they would be laid out in a file."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def sha256_file(path: Path | str) -> str:
    """The SHA-256 of a file's bytes, read in pieces."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
        sync_directory(self.partial)
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


def sync(path: Path) -> None:
    """Flushes a file's contents, or a directory's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Flushes everything in it: a crash after what then says that all is there cannot leave it hollow."""
    for path in [*directory.rglob("*"), directory]:
        with suppress(FileNotFoundError):  # somebody's temporary file
            sync(path)

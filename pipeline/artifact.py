"""Artifacts: directories named by what made them, whole or absent. Standard library only.

A key is the SHA-256 of a stage's name and version, its settings, its parents' keys and the content of its
outside inputs. Work happens in ``<key>.partial``; ``manifest.json`` is written last and one rename commits.
A lock beside the directory lets one process build while others wait; the kernel drops it when its holder dies.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
WAIT_POLL_SECONDS = 1.0


# ------------------------------------------------------------------------------------------- JSON


def write_json(path: Path | str, value: Any) -> None:
    """Writes ``value`` as JSON so that a reader sees the old file or the whole new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
    recipe = {"stage": stage, "version": version, "settings": settings, "parents": parents, "inputs": inputs}
    canonical = json.dumps(recipe, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def sha256_file(path: Path | str) -> str:
    """The SHA-256 of a file's bytes, read in pieces."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class Fingerprints:
    """SHA-256 of local inputs, remembered by path, size and modification time so that a rerun reads nothing."""

    memo: Path

    def of_file(self, path: Path) -> str:
        """The hash of one file; recomputed when its size or time changed."""
        name, known = self._name(path), self._known()
        if name not in known:
            known[name] = sha256_file(path)
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
        if not manifest.is_file():
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
        _sync_directory(self.partial)
        if self.path.exists():
            # A rename cannot replace a directory that holds files; the old one steps aside first.
            old = self.path.with_name(f"{self.key}.old")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(self.path, old)
            os.replace(self.partial, self.path)
            shutil.rmtree(old)
        else:
            os.replace(self.partial, self.path)

    @contextmanager
    def lock(self, on_wait: Callable[[str], None]) -> Iterator[None]:
        """Holds this artifact for building; waits while another process does, and says so once.

        Args:
            on_wait: called once with who holds the lock.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_name(f"{self.key}.lock"), "a+") as stream:
            _acquire(stream.fileno(), lambda: on_wait(_holder(stream.name)))
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {os.uname().nodename}\n")
            stream.flush()
            yield


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _holder(lock: str) -> str:
    return Path(lock).read_text().strip() or "another process"


def _acquire(descriptor: int, on_wait: Callable[[], None]) -> None:
    waited = False
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        if not waited:
            on_wait()
            waited = True
        time.sleep(WAIT_POLL_SECONDS)


def _sync_directory(directory: Path) -> None:
    """Flushes file contents and names, so that a crash after the rename cannot leave a hollow artifact."""
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

"""Hashes of local input files, which identify their contents in artifacts' keys, and a cache of these hashes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from pipeline.files import no_access, report_once, sha256_file, sha256_text

FINGERPRINTS_FILE = "fingerprints.jsonl"  # in the directory of all artifacts


@dataclass(frozen=True)
class Fingerprints:
    """SHA-256 hashes of local files, cached so that a rerun reads nothing.

    A file is recognized by its path, size, inode, and times of modification and of status change. The cache is read
    once, and one line is appended for every file that is hashed.

    Args:
        memo: the file with the cached hashes, in JSON lines of a recognized file and its hash.
        writes: whether new hashes are added to the cache.
    """

    memo: Path
    writes: bool = True

    def of_file(self, path: Path) -> str:
        """Returns the hash of one file, computed again if the file may have changed."""
        name = self._name(path)
        if name not in self._known:
            self._known[name] = sha256_file(path)
            if self.writes:
                self._append(name)
        return self._known[name]

    def of_files(self, paths: Iterable[Path]) -> str:
        """Returns one hash for several files: of their names and contents, in the given order."""
        lines = [f"{path.name} {self.of_file(path)}" for path in paths]
        return sha256_text("\n".join(lines))

    def _name(self, path: Path) -> str:
        status = path.stat()
        # A modification time can be set, for example by rsync or tar; the time of the status change cannot.
        identity = (path.resolve(), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        return "|".join(map(str, identity))

    @cached_property
    def _known(self) -> dict[str, str]:
        try:
            status = self.memo.stat()
        except OSError:  # usually because there is none yet; the checks report a directory that cannot be used
            return {}
        return dict(_read_memo(self.memo, status.st_size, status.st_mtime_ns))

    def _append(self, name: str) -> None:
        self.memo.parent.mkdir(parents=True, exist_ok=True)
        # One write per line, so that lines of concurrent commands do not mix. It is not flushed to disk, since a line
        # that is lost or damaged only costs hashing the file again.
        try:
            stream = open(self.memo, "a+b", buffering=0)
        except PermissionError as error:  # another user's
            raise no_access(self.memo) from error
        with stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 1))
            cut_off = stream.read() not in (b"", b"\n")
            stream.write(b"\n" * cut_off + json.dumps([name, self._known[name]]).encode() + b"\n")


@lru_cache(maxsize=1)  # the runs of a sweep share the memo
def _read_memo(memo: Path, size: int, modified: int) -> dict[str, str]:
    """Reads all hashes of a memo. Its size and modification time are arguments only to recognize a changed one."""
    try:
        text = memo.read_text(errors="replace")
    except PermissionError as error:  # another user's
        raise no_access(memo) from error
    lines = [line for line in text.split("\n") if line]
    found = [entry for line in lines if (entry := _parse_fingerprint(line)) is not None]
    if len(found) < len(lines):
        report_once(f"{len(lines) - len(found)} line(s) of {memo} cannot be used; their files are hashed again")
    return dict(found)


def _parse_fingerprint(line: str) -> tuple[str, str] | None:
    try:
        name, digest = json.loads(line)
        return (name, digest) if re.fullmatch("[0-9a-f]{64}", digest) and isinstance(name, str) else None
    except (ValueError, TypeError, RecursionError):
        return None


class RememberedFingerprints(Fingerprints):
    """Only the cached hashes: no input is read and nothing is written."""

    def of_file(self, path: Path) -> str:
        """Returns the cached hash of a file, or a unique placeholder if the file was never hashed."""
        name = self._name(path)
        return self._known.get(name, f"unread {name}")

"""Room on the disk: how much there is, and one message where it does not suffice. Standard library only."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from pipeline.errors import UserError


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


def sha256_json(value: Mapping[str, Any] | Sequence[Any]) -> str:
    """The SHA-256 of JSON values, however they would be laid out in a file."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def sha256_file(path: Path | str) -> str:
    """The SHA-256 of a file's bytes, read in pieces."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the disk's end, the user's quota's, the process's limit

SCRATCH_ON_DISK_BYTES = 1_000_000_000  # room to work in that an expansion asks for is in memory below this


def gib(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / 2**30:.1f} GiB"


def free_bytes(directory: Path | str) -> int:
    """What an ordinary user may still write there."""
    return shutil.disk_usage(directory).free


def no_room(directory: Path | str, rule: str) -> UserError:
    """The refusal of a disk that is too small."""
    remedy = "Free some space, or say output_dir=DIRECTORY on a larger disk."
    return UserError(setting="output_dir", value=directory, rule=rule, remedy=remedy)


@contextmanager
def refused_where_full(directory: Path, needed: int | None = None) -> Iterator[None]:
    """Turns a full disk's error into a refusal that names the directory, the bytes needed and the bytes free.

    Args:
        needed: bytes that are about to be written, where that is known.

    Raises:
        UserError: the disk is full, or the user may write no more.
    """
    before = free_bytes(directory)
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        wanted, free = ("more", free_bytes(directory)) if needed is None else (f"{needed:,}", before)
        rule = f"{wanted} bytes are needed there and {free:,} are free ({error.strerror})"
        raise no_room(directory, rule) from error

"""Room on the disk: how much there is, and one message where it does not suffice. Standard library only."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import UserError

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

"""Files that survive crashes: atomic JSON, hashes, flushing to disk, and errors of full disks."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import pwd
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from pipeline.errors import TrainingFailure, UserError

ABANDONED_SECONDS = 3600.0
MAX_NESTING = 64  # levels of lists and objects in JSON of others
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of renameat2(2)

# The disk is full, the user's quota is exhausted, or the process's limit on file sizes is reached.
DISK_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# The disk fails, or a network file system does not answer or has lost the file.
DISK_FAILED_ERRNOS = {
    errno.EIO, errno.EROFS, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EREMOTEIO, errno.ETIMEDOUT, errno.EHOSTDOWN,
}  # fmt: skip


# ------------------------------------------------------------------------------------------- JSON


def read_json(path: Path | str) -> Any:
    """Reads a JSON file."""
    return json.loads(Path(path).read_text())


def is_nested_deeper(value: Any, levels: int = MAX_NESTING) -> bool:
    """Whether a JSON value has more levels of lists and objects.

    Values with hundreds of levels can be read, and then exhaust the stack of whatever copies or writes them.
    """
    if not isinstance(value, (dict, list)):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(is_nested_deeper(each, levels - 1) for each in inner)


def merge_nested(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``base`` updated by ``changes``. Nested dictionaries are merged recursively."""
    merged = dict(base)
    for name, value in changes.items():
        inner = merged.get(name)
        if isinstance(inner, Mapping) and isinstance(value, Mapping):
            value = merge_nested(inner, value)
        merged[name] = value
    return merged


def read_record(path: Path, is_valid: Callable[[Any], object]) -> Any | None:
    """Reads a JSON file that a later run relies on but can do without, such as a cache or a record of progress.

    A power cut can leave such a file truncated or filled with zeros, in particular one that an earlier version wrote
    without flushing it to disk. An unreadable file counts as absent and is reported once, in one line on stderr.

    Args:
        path: the file.
        is_valid: whether the value has the expected structure. It may also raise the error of a failed look-up.

    Returns:
        The value, or None if the file does not exist or cannot be used.
    """
    try:
        value = read_json(path)
        if is_valid(value):
            return value
        fault = "unexpected content"
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:  # not absent: another user's file
        raise no_access(path) from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:  # ValueError: not JSON
        fault = type(error).__name__
    report_once(f"{path} cannot be used ({fault}) and counts as absent")
    return None


@cache  # a command may read the same file many times
def report_once(message: str) -> None:
    """Prints a line on stderr, unless this process has already printed it."""
    print(message, file=sys.stderr)


def write_json(path: Path | str, value: Any, mode: int = 0o666) -> None:
    """Writes ``value`` as JSON, atomically and durably; see ``write_text``."""
    write_text(Path(path), json.dumps(value, indent=2, allow_nan=False) + "\n", mode)


def write_text(path: Path, text: str, mode: int = 0o666) -> None:
    """Writes a file atomically and durably.

    A reader sees either the old file or the new one, also after a power cut: the content is on disk before the rename,
    and the rename before this function returns.

    Args:
        path: the file, which may exist.
        text: its content.
        mode: its permissions before the umask is applied.
    """
    temporary = temporary_path(path)
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def temporary_path(path: Path) -> Path:
    """Returns a hidden path in the same directory, to be renamed to ``path``. It is unique across all nodes."""
    return path.with_name(f".{path.name}.{uuid4().hex}")


def remove_abandoned(directory: Path) -> None:
    """Removes temporary files of processes that were killed, where no lock tells which processes are alive.

    A temporary file exists for milliseconds, so one that is ``ABANDONED_SECONDS`` old is nobody's.
    """
    for path in directory.glob(".*"):
        if re.fullmatch(r"\..+\.[0-9a-f]{32}", path.name):
            with suppress(OSError):  # another process has removed it, or it is another user's
                if time.time() - path.lstat().st_mtime > ABANDONED_SECONDS:
                    path.unlink()


def exchange(first: Path, second: Path) -> bool:
    """Swaps two existing paths in one atomic step.

    Returns:
        False if the operating system or the file system does not support it, as on NFS. Nothing has changed then.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # not Linux, or a C library without it
        return False
    arguments = (AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE)
    if renameat2(*arguments) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(first), None, str(second))


# ------------------------------------------------------------------------------------ several users


def let_group_write() -> None:
    """Lets the group write to all files that this process and its children create from now on."""
    mask = os.umask(0) & ~0o070
    os.umask(mask)
    os.environ["SLURM_UMASK"] = f"{mask:04o}"  # srun sets it in the processes that it starts on other nodes


def may_write(path: Path) -> bool:
    """Whether this user may change an existing file, or create and remove files in an existing directory."""
    return os.access(path, os.W_OK | os.X_OK if path.is_dir() else os.W_OK)


def no_access(path: Path) -> UserError:
    """Returns the error for a file or directory in ``output_dir`` that this user may not read or write."""
    place, status = path, None
    while status is None:
        try:
            status = place.stat()
        except OSError:  # in a directory that this user may not enter
            place = place.parent
    mask = os.umask(0o077)
    os.umask(mask)
    return UserError(
        setting="output_dir",
        value=place,
        rule=f"it belongs to {_user_name(status.st_uid)} with mode {stat.S_IMODE(status.st_mode):04o}, so "
        f"{_user_name(os.geteuid())} cannot use it; the umask of this command is {mask:04o}",
        remedy="Set output_dir=DIRECTORY to your own. To share one, its owner must let the group write (chmod -R "
        "g+rwX; chmod g+s for new files to have its group), and all users must set group_writable=true.",
    )


def _user_name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user {user}"


# ----------------------------------------------------------------------------------------- hashes


def sha256_json(value: Mapping[str, Any] | Sequence[Any]) -> str:
    """Returns the SHA-256 of JSON values, regardless of key order and formatting."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256_text(canonical)


def sha256_text(text: str) -> str:
    """Returns the SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path | str) -> str:
    """Returns the SHA-256 of a file's content, read in chunks."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def seal(record: Path, files: Iterable[Path]) -> None:
    """Records the hashes of finished files that a later attempt may use instead of writing them again.

    Args:
        record: the file to write. A hidden one does not become part of an artifact.
        files: files in the directory of ``record`` or below.
    """
    write_json(record, {str(path.relative_to(record.parent)): sha256_file(path) for path in files})


def is_intact(record: Path) -> bool:
    """Whether all files that ``seal`` recorded still have the same content. Damage is reported once, on stderr."""
    sealed: dict[str, str] | None = read_record(record, lambda value: isinstance(value.items(), Iterable))
    if sealed is None:
        return False
    for name, expected in sealed.items():
        path = record.parent / name
        if not path.is_file() or sha256_file(path) != expected:
            report_once(f"{path} is missing or damaged")
            return False
    return True


# ------------------------------------------------------------------------------ flushing to disk


def fsync(path: Path) -> None:
    """Flushes a file's content, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_directory(directory: Path) -> None:
    """Flushes a directory and everything in it to disk.

    Call this before the rename that marks the directory as complete. Otherwise a crash shortly afterwards could leave
    a complete directory with empty files.
    """
    for path in [*directory.rglob("*"), directory]:
        with suppress(FileNotFoundError):  # another process's temporary file, gone in the meantime
            fsync(path)


# ------------------------------------------------------------------------------------- disk space


def gib(size: int) -> str:
    """Formats a number of bytes as GiB."""
    return f"{size / 2**30:.1f} GiB"


def nearest_existing(place: Path) -> Path:
    """Returns the path itself, or its nearest ancestor that exists."""
    place = place.absolute()
    # Path.exists raises an error in another user's directory that may not be entered.
    return place if os.path.exists(place) else nearest_existing(place.parent)


def free_bytes(directory: Path | str) -> int:
    """Returns how many bytes an unprivileged user can still write to the disk of ``directory``, which may not exist."""
    return shutil.disk_usage(nearest_existing(Path(directory))).free


def insufficient_space(directory: Path | str, rule: str) -> UserError:
    """Returns the error for a disk that is too small."""
    remedy = "Free some space, or set output_dir=DIRECTORY to a directory on a larger disk."
    return UserError(setting="output_dir", value=directory, rule=rule, remedy=remedy)


@contextmanager
def disk_errors_as_user_errors(directory: Path, needed: int | None = None) -> Iterator[None]:
    """Converts the errors of a full or failing disk into a ``UserError``, with the bytes needed and the bytes free.

    Args:
        directory: where the body of the ``with`` statement writes.
        needed: the number of bytes it is about to write, if known.

    Raises:
        UserError: the disk is full, a quota or limit is reached, or the disk fails.
    """
    free_before = None if needed is None else free_bytes(directory)
    try:
        yield
    except (UserError, TrainingFailure):  # an error of the disk among others, which has its message
        raise
    except Exception as error:
        number = disk_errno(error)
        if number is None:
            raise
        if number in DISK_FAILED_ERRNOS:
            raise UserError(
                setting="output_dir",
                value=directory,
                rule=f"the disk cannot be used now: {os.strerror(number)}",
                remedy="Check the disk and how it is mounted, then repeat the same command, which resumes.",
            ) from error
        # If the size is known, the space free before the attempt is what explains the failure.
        wanted, free = ("more", free_bytes(directory)) if needed is None else (f"{needed:,}", free_before)
        rule = f"{wanted} bytes are needed there and {free:,} are free ({os.strerror(number)})"
        raise insufficient_space(directory, rule) from error


def disk_errno(error: Exception) -> int | None:
    """Returns the error number if an exception means that a disk is full or fails, and None otherwise.

    Libraries in Rust, such as safetensors, raise exceptions of their own with the number only in the text.
    """
    if isinstance(error, OSError):
        number = error.errno
    else:
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = int(found[1]) if found else None
    return number if number in DISK_FULL_ERRNOS | DISK_FAILED_ERRNOS else None
